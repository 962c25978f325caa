"""What changed days do to counted pairs, file by file and by columns: what the tasks of a night that builds on another one do. No Spark.

The days that a change can reach are counted again. A pair that has, or had, a row on one of them, or on a day that left or entered the
holdout, is *touched*: its total is added up again from all its daily rows, as distinct users cannot be subtracted. All other totals stay:
in landmark form a total does not change as it ages. So a night

1. counts the changed days anew (`features.pair_counts`);
2. writes the files that held them without these days (`drop_days`);
3. looks through all daily rows for those of touched pairs (`rows_of_touched`), and adds them up (`features.pair_totals`);
4. writes the files of totals without the touched pairs (`drop_touched`).

Decoding the daily rows is what most of it costs.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features.pair_files import PairFile, open_uri
from features.pair_kernels import CODED, Ints, Mask, encode, num_bits, packed, unpack

DROPPED_SCHEMA = "kind string, name string, size bigint, num_rows bigint, first_day date, last_day date, replaces string, pairs binary"
"""A row is a new file (columns of FILE_SCHEMA), or the name of a file that the new ones replace, or pairs, as a block with trigger_item_id
and target_item_id; or several of these."""

_DROPPED = pa.schema(
    [
        ("kind", pa.string()),
        ("name", pa.string()),
        ("size", pa.int64()),
        ("num_rows", pa.int64()),
        ("first_day", pa.date32()),
        ("last_day", pa.date32()),
        ("replaces", pa.string()),
        ("pairs", pa.binary()),
    ]
)
_IDS = ["trigger_item_id", "target_item_id"]
_MOST_SIEVE_BITS = 27  # 128 MB
_MOST_DICTIONARIES = 64  # kept by a worker: some 100 MB
_SIEVE_ROOM = 16  # places for each pair: most others are told apart by one look
_SPREAD = np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing, Knuth, TAOCP 3, 6.4


@dataclass(frozen=True, kw_only=True)
class Touched:
    """A set of pairs.

    Attributes:
        items: (N,) ids that are in some pair, ascending.
        keys: (P,) trigger * N + target by these positions, ascending.
    """

    items: pa.Array
    keys: Ints

    @classmethod
    def of(cls, tables: Iterable[pa.Table]) -> Self:
        """The distinct pairs of some tables with trigger_item_id and target_item_id."""
        parts = [table.select(_IDS).cast(pa.schema([(name, CODED) for name in _IDS])) for table in tables]
        chunks = [[chunk for part in parts for chunk in part[name].chunks] for name in _IDS]
        codes, items = encode(pa.chunked_array(chunks[0] + chunks[1], CODED))
        trigger, target = np.split(codes, [len(codes) // 2])
        return cls(items=items, keys=np.unique(trigger * len(items) + target))

    @cached_property
    def _sieve(self) -> Mask:
        """Whether a key with this hash is among the keys; made by each worker, as sending it takes longer."""
        bits = min(_MOST_SIEVE_BITS, num_bits(_SIEVE_ROOM * len(self.keys) + 1))
        sieve = np.zeros(1 << bits, np.bool_)
        sieve[_hashes(self.keys, bits)] = True
        return sieve

    def among(self, rows: pa.Table, *, either_order: bool) -> Mask:
        """Which rows, with coded ids, are of one of the pairs; `either_order`: of its mirror image, too, the smaller id first here."""
        trigger, target = (self._codes(rows[name]) for name in _IDS)
        if either_order:
            trigger, target = np.minimum(trigger, target), np.maximum(trigger, target)
        keys = trigger * len(self.items) + target
        found = (np.minimum(trigger, target) >= 0) & self._sieve[_hashes(keys, num_bits(len(self._sieve)))]
        at = np.flatnonzero(found)
        place = np.minimum(np.searchsorted(self.keys, keys[at]), len(self.keys) - 1)
        found[at] = self.keys[place] == keys[at]
        return found

    def _codes(self, column: pa.ChunkedArray) -> Ints:
        """Positions among the items, -1 for others."""
        return np.concatenate(
            [np.zeros(0, np.int64), *(self._known(chunk.dictionary)[chunk.indices.to_numpy()] for chunk in column.chunks)]
        )

    def _known(self, ids: pa.Array) -> Ints:
        """Positions of the ids of a dictionary. All files of a cell have the same one, and looking it up takes longer than its rows."""
        seen = self._seen.setdefault(len(ids), [])
        for other, known in seen:
            if other.equals(ids):
                return known
        found: Ints = pc.fill_null(pc.index_in(ids, value_set=self.items), -1).to_numpy().astype(np.int64)
        if sum(map(len, self._seen.values())) >= _MOST_DICTIONARIES:
            self._seen.clear()
        self._seen.setdefault(len(ids), []).append((ids, found))
        return found

    @cached_property
    def _seen(self) -> dict[int, list[tuple[pa.Array, Ints]]]:
        return {}


def _hashes(keys: Ints, bits: int) -> Ints:
    hashes: Ints = ((keys.astype(np.uint64) * _SPREAD) >> np.uint64(64 - bits)).astype(np.int64)
    return hashes


def drop_days(
    batches: Iterable[pa.RecordBatch], *, folder: str, added: Collection[str], recounted: Collection[int], moved: Collection[int]
) -> Iterator[pa.RecordBatch]:
    """Write daily files without the recounted days, and tell the pairs of their rows on recounted and moved days.

    Args:
        batches: with a column `uri`, of files of co_engagement_daily.
        folder: path or URI of the table.
        added: names of files with the recounted days as they are now, whose pairs are told as well.
        recounted: days, since 1970-01-01, whose rows are written anew elsewhere.
        moved: days that left or entered the holdout.

    Returns:
        Rows of DROPPED_SCHEMA; a file stays one of its own, as its days tell a later night whether to open it.
    """
    gone, either = np.array(sorted(recounted), np.int64), np.array(sorted({*recounted, *moved}), np.int64)
    for uri in _uris(batches):
        with _opened(uri) as file:
            groups = range(file.num_row_groups)
            days = [_days(file.read_row_group(number, columns=["event_date"], use_threads=False)) for number in groups]
            told = [(number, np.isin(day, either)) for number, day in enumerate(days)]
            pairs = [_rows(file, number, mask, _IDS) for number, mask in told if mask.any()]
            stays = [~np.isin(day, gone) | (_below(folder, uri) in added) for day in days]
            new = PairFile(kind="daily", folder=folder)
            replaced = _moved_over(file, stays, new)
            block = packed(0, _distinct(pairs))["block"][0].as_py() if pairs else None
            yield _row(replaces=_below(folder, uri) if replaced else None, pairs=block)
            yield from _closed(new)


def rows_of_touched(batches: Iterable[pa.RecordBatch], *, touched: Touched) -> Iterator[pa.RecordBatch]:
    """The rows of touched pairs in some daily files, as `features.pair_totals.pack_by_pair` reads them.

    Args:
        batches: with a column `uri`, of files of co_engagement_daily.
        touched: pairs.
    """
    for uri in _uris(batches):
        with _opened(uri) as file:
            for number in range(file.num_row_groups):
                rows = file.read_row_group(number, use_threads=False)
                rows = rows.filter(pa.array(touched.among(rows, either_order=False)))
                day = rows["event_date"].cast(pa.int32())
                yield from rows.drop_columns(["event_date"]).append_column("day", day).to_batches()


def drop_touched(batches: Iterable[pa.RecordBatch], *, folder: str, touched: Touched, symmetric: bool) -> Iterator[pa.RecordBatch]:
    """Write files of totals without the touched pairs, one for all files of a task that hold some: rows of DROPPED_SCHEMA.

    Args:
        batches: with a column `uri`, of files of co_engagement_totals.
        folder: path or URI of the table.
        touched: pairs; of a symmetric window in one order, while totals have both.
        symmetric: the window is.
    """
    new, held = PairFile(kind="totals", folder=folder), list[pa.Table]()
    for uri in _uris(batches):
        with _opened(uri) as file:
            ids = (file.read_row_group(number, columns=_IDS, use_threads=False) for number in range(file.num_row_groups))
            stays = [~touched.among(rows, either_order=symmetric) for rows in ids]
            if not all(mask.all() for mask in stays):
                held += [_rows(file, number, mask) for number, mask in enumerate(stays)]
                yield _row(replaces=_below(folder, uri))
    if held:
        new.write(pa.concat_tables(held))
    yield from _closed(new)


def write_totals(batches: Iterable[pa.RecordBatch], *, folder: str) -> Iterator[pa.RecordBatch]:
    """Rows of TOTAL_SCHEMA to one file of co_engagement_totals: a row of FILE_SCHEMA, none without rows."""
    new, held = PairFile(kind="totals", folder=folder), list(batches)
    if held:
        rows = pa.Table.from_batches(held)
        new.write(pa.table([_coded(column) for column in rows.columns], names=rows.column_names))
    yield from new.close()


def _coded(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.combine_chunks().dictionary_encode() if pa.types.is_string(column.type) else column


def _moved_over(file: pq.ParquetFile, stays: Sequence[Mask], new: PairFile) -> bool:
    """Write the rows that stay to a new file, if not all of them do; whether that is so."""
    replaced = not all(mask.all() for mask in stays)
    for number, mask in enumerate(stays if replaced else ()):
        new.write(_rows(file, number, mask))
    return replaced


def _closed(new: PairFile) -> Iterator[pa.RecordBatch]:
    for batch in new.close():
        yield _row(**batch.to_pylist()[0])


def _row(**values: Any) -> pa.RecordBatch:
    """Of DROPPED_SCHEMA, null where there is nothing to say."""
    return pa.RecordBatch.from_pylist([values], schema=_DROPPED)


def _below(folder: str, uri: str) -> str:
    """A file's path below the table's folder."""
    return uri.removeprefix(f"{folder}/")


def _distinct(pairs: Sequence[pa.Table]) -> pa.Table:
    """In one chunk, with a dictionary that holds no others."""
    found = Touched.of(pairs)
    columns = [
        pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), found.items) for codes in np.divmod(found.keys, len(found.items))
    ]
    return pa.table(columns, names=_IDS)


def told_pairs(block: bytes) -> pa.Table:
    """The pairs of a row of DROPPED_SCHEMA."""
    return unpack(pa.scalar(block, pa.binary()))


def _uris(batches: Iterable[pa.RecordBatch]) -> Iterator[str]:
    return (uri for batch in batches for uri in batch["uri"].to_pylist())


@contextmanager
def _opened(uri: str) -> Iterator[pq.ParquetFile]:
    files, path = open_uri(uri)
    with files.open_input_file(path) as source:
        yield pq.ParquetFile(source, read_dictionary=_IDS)


def _rows(file: pq.ParquetFile, number: int, wanted: Mask, columns: Sequence[str] | None = None) -> pa.Table:
    """Some rows of a row group."""
    return file.read_row_group(number, columns=columns, use_threads=False).filter(pa.array(wanted))


def _days(rows: pa.Table) -> Ints:
    days: Ints = rows["event_date"].cast(pa.int32()).to_numpy().astype(np.int64)
    return days
