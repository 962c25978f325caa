"""What changed days do to counted pairs, file by file and by columns: what the tasks of a night that builds on another one do. No Spark.

The days that a change can reach are counted again. A pair whose row differs on one of them, or that has one on a day that left or entered
the holdout, is *touched*. All other totals stay: in landmark form a total does not change as it ages. So a night

1. counts the changed days anew (`features.pair_counts`);
2. writes the files that held them without these days, and tells what touched pairs have gained and which have lost rows (`drop_days`);
3. writes the files of totals with what their pairs have gained (`renew_totals`), but for pairs that have lost rows, or whose gain may let
   them reach the privacy minimum: distinct users can be neither subtracted nor added;
4. looks through all daily rows for those of the pairs that are left (`rows_of_touched`), and adds them up (`features.pair_totals`).

Decoding the daily rows is what most of it costs.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features.pair_files import IDS, PairFile, opened, uris_of, with_small_dictionaries
from features.pair_kernels import CODED, Floats, Ints, Mask, encode, ints, num_bits, packed, row_order, run_starts, unpack
from features.pair_totals import TotalRule, sums

DROPPED_SCHEMA = "kind string, name string, size bigint, num_rows bigint, stats string, replaces string, pairs binary"
"""A row is a new file (columns of FILE_SCHEMA), or the name of a file that the new ones replace, or a block of `pairs`; or several of
these. `drop_days` tells rows of co_engagement_daily of touched pairs, `renew_totals` places of pairs whose totals stand.
"""

_DROPPED = pa.schema(
    [
        ("kind", pa.string()),
        ("name", pa.string()),
        ("size", pa.int64()),
        ("num_rows", pa.int64()),
        ("stats", pa.string()),
        ("replaces", pa.string()),
        ("pairs", pa.binary()),
    ]
)
_TOLD = ("day", "num_users", "kind", "mark")
_NEW, _LEFT, _OLD, _LOST = range(4)
"""Rows of touched pairs: counted tonight; of a day that left the holdout; of a recounted day, as they were, which one counted tonight may
equal; and of a day that the holdout has moved over otherwise."""
_MOST_SIEVE_BITS = 27  # 128 MB
_MOST_DICTIONARIES = 64  # kept by a worker: some 100 MB
_LEAST_ROWS = 250_000  # of a row group of renewed totals: small ones of many nights become one, and memory is used again
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

    @cached_property
    def _sieve(self) -> Mask:
        """Whether a key with this hash is among the keys; made by each worker, as sending it takes longer."""
        bits = min(_MOST_SIEVE_BITS, num_bits(_SIEVE_ROOM * len(self.keys) + 1))
        sieve = np.zeros(1 << bits, np.bool_)
        sieve[_hashes(self.keys, bits)] = True
        return sieve

    def places(self, rows: pa.Table, *, either_order: bool) -> Ints:
        """Place of each row's pair among the keys, -1 for others; ids are coded. `either_order`: of its mirror image, too, the smaller id
        first here.
        """
        trigger, target = (self._codes(rows[name]) for name in IDS)
        if either_order:
            trigger, target = np.minimum(trigger, target), np.maximum(trigger, target)
        keys = trigger * len(self.items) + target
        at = np.flatnonzero((np.minimum(trigger, target) >= 0) & self._sieve[_hashes(keys, num_bits(len(self._sieve)))])
        place = np.minimum(np.searchsorted(self.keys, keys[at]), len(self.keys) - 1)
        found = self.keys[place] == keys[at]
        places = np.full(len(keys), -1, np.int64)
        places[at[found]] = place[found]
        return places

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


@dataclass(frozen=True, kw_only=True)
class Gains:
    """What touched pairs have gained since the night before.

    Attributes:
        pairs: P of them.
        weight: (P,) of their new rows, decayed.
        num_user_days: (P,) of their new rows.
        fit_weight: (P,) of rows before the holdout that are new, or were in it.
        again: (P,) a row of the pair is gone, is another one, or is of the holdout now: it is added up anew.
    """

    pairs: Touched
    weight: Floats
    num_user_days: Ints
    fit_weight: Floats
    again: Mask

    @classmethod
    def of(cls, blocks: Iterable[bytes], rule: TotalRule) -> Self:
        """Added up, in the order of days.

        Args:
            blocks: `pairs` of `drop_days`.
            rule: of the totals.
        """
        tables = [unpack(pa.scalar(block, pa.binary())) for block in blocks]
        coded = [[chunk for table in tables for chunk in table[name].chunks] for name in IDS]
        codes, items = encode(pa.chunked_array(coded[0] + coded[1], CODED))
        trigger, target = np.split(codes, [len(codes) // 2])
        key = trigger * len(items) + target
        columns = [np.concatenate([np.zeros(0, np.int64), *(ints(table, name) for table in tables)]) for name in _TOLD]
        order = row_order(key, columns[0])
        order = order[_differs(key[order], *(column[order] for column in columns))]
        key, day, users, kind = (values[order] for values in (key, *columns[:3]))
        starts = run_starts(key)
        decayed, new = users * rule.decay(day), kind == _NEW
        return cls(
            pairs=Touched(items=items, keys=key[starts]),
            weight=sums(np.where(new, decayed, 0.0), starts),
            num_user_days=sums(np.where(new, users, 0), starts),
            fit_weight=sums(np.where((kind <= _LEFT) & (day < rule.holdout_from), decayed, 0.0), starts),
            again=np.maximum.reduceat(kind, starts) >= _OLD,
        )

    def without(self, settled: Collection[bytes]) -> Touched:
        """The pairs whose totals do not stand yet; `settled` as `renew_totals` told."""
        open_ = np.ones(len(self.pairs.keys), np.bool_)
        for block in settled:
            open_[np.frombuffer(block, np.int64)] = False
        return Touched(items=self.pairs.items, keys=self.pairs.keys[open_])


def _differs(key: Ints, day: Ints, users: Ints, kind: Ints, mark: Ints) -> Mask:
    """Rows in the order of pairs and days, without those of a recounted day that are as they were."""
    same = (kind[1:] != kind[:-1]) & (kind[1:] + kind[:-1] == _OLD + _NEW)
    for column in (key, day, users, mark):
        same &= column[1:] == column[:-1]
    differs = np.ones(len(key), np.bool_)
    differs[1:] &= ~same
    differs[:-1] &= ~same
    return differs


def drop_days(
    batches: Iterable[pa.RecordBatch],
    *,
    folder: str,
    added: Collection[str],
    recounted: Collection[int],
    moved: Collection[int],
    holdout_from: int,
) -> Iterator[pa.RecordBatch]:
    """Write daily files without the recounted days, and tell the rows of recounted and moved days.

    Args:
        batches: with a column `uri`, of files of co_engagement_daily.
        folder: path or URI of the table.
        added: names of files with the recounted days as they are now, whose rows are told as well.
        recounted: days, since 1970-01-01, whose rows are written anew elsewhere.
        moved: days that left or entered the holdout.
        holdout_from: its first day.

    Returns:
        Rows of DROPPED_SCHEMA; a file stays one of its own, as its days tell a later night whether to open it. `pairs` are blocks of
        trigger_item_id, target_item_id, day, num_users, kind, and mark: the sum of the user hashes.
    """
    gone, shifted = (np.array(sorted(days), np.int64) for days in (recounted, moved))
    for uri in uris_of(batches):
        with opened(uri) as file:
            is_new = _below(folder, uri) in added
            days = [_days(file.read_row_group(number, columns=["event_date"], use_threads=False)) for number in range(file.num_row_groups)]
            kinds = [_kinds(day, gone, shifted, is_new, holdout_from) for day in days]
            told = [_told(file, number, day, kind) for number, (day, kind) in enumerate(zip(days, kinds, strict=True)) if kind.max() >= 0]
            stays = [is_new | ~np.isin(day, gone) for day in days]
            new = PairFile(kind="daily", folder=folder)
            replaced = _moved_over(file, stays, new)
            block = packed(0, with_small_dictionaries(pa.concat_tables(told)))["block"][0].as_py() if told else None
            yield _row(replaces=_below(folder, uri) if replaced else None, pairs=block)
            yield from _closed(new)


def _kinds(day: Ints, gone: Ints, shifted: Ints, is_new: bool, holdout_from: int) -> Ints:
    """Of rows of these days, -1 where the pair is not touched by them."""
    if is_new:
        return np.full(len(day), _NEW)
    is_gone, is_shifted = np.isin(day, gone), np.isin(day, shifted)
    over = np.where(is_gone | (day >= holdout_from), _LOST, _LEFT)
    return np.where(is_shifted, over, np.where(is_gone, _OLD, -1))


def _told(file: pq.ParquetFile, number: int, day: Ints, kind: Ints) -> pa.Table:
    """The rows of a row group that have a kind, at least one."""
    rows = _rows(file, number, kind >= 0, [*IDS, "num_users", "user_hashes"])
    hashes = rows["user_hashes"].combine_chunks()
    lengths = pc.list_value_length(hashes).to_numpy(zero_copy_only=False).astype(np.int64)
    mark = sums(hashes.flatten().to_numpy(), np.cumsum(lengths) - lengths)
    columns = (("day", day[kind >= 0], np.int32), ("kind", kind[kind >= 0], np.int8), ("mark", mark, np.int64))
    rows = rows.drop_columns(["user_hashes"])
    for name, values, width in columns:
        rows = rows.append_column(name, pa.array(values.astype(width)))
    return rows


def rows_of_touched(batches: Iterable[pa.RecordBatch], *, touched: Touched) -> Iterator[pa.RecordBatch]:
    """The rows of touched pairs in some daily files, as `features.pair_totals.pack_by_pair` reads them.

    Args:
        batches: with a column `uri`, of files of co_engagement_daily.
        touched: pairs.
    """
    for uri in uris_of(batches):
        with opened(uri) as file:
            for number in range(file.num_row_groups):
                rows = file.read_row_group(number, use_threads=False)
                rows = rows.filter(pa.array(touched.places(rows, either_order=False) >= 0))
                if rows.num_rows:
                    day = rows["event_date"].cast(pa.int32())
                    yield from with_small_dictionaries(rows).drop_columns(["event_date"]).append_column("day", day).to_batches()


def renew_totals(batches: Iterable[pa.RecordBatch], *, folder: str, gains: Gains, symmetric: bool) -> Iterator[pa.RecordBatch]:
    """Write files of totals with what their pairs have gained, one for all files of a task that hold some: rows of DROPPED_SCHEMA.

    Of a pair that has lost rows, or that has gained some before the holdout and so far had too few users there, nothing is written; nor is
    its place told.

    Args:
        batches: with a column `uri`, of files of co_engagement_totals.
        folder: path or URI of the table.
        gains: of touched pairs; of a symmetric window in one order, while totals have both.
        symmetric: the window is.
    """
    new, held, settled = PairFile(kind="totals", folder=folder), list[pa.Table](), list[Ints]()
    for uri in uris_of(batches):
        with opened(uri) as file:
            replaced = False
            for rows, place in _holding(file, gains.pairs, symmetric):
                rows, stand = _renewed(rows, place, gains)
                held.append(rows)
                settled.append(stand)
                replaced = True
                if sum(part.num_rows for part in held) >= _LEAST_ROWS:
                    new.write(pa.concat_tables(held))
                    held.clear()
            if replaced:
                yield _row(replaces=_below(folder, uri))
    if held:
        new.write(pa.concat_tables(held))
    if settled:
        yield _row(pairs=np.unique(np.concatenate(settled)).tobytes())
    yield from _closed(new)


def _holding(file: pq.ParquetFile, pairs: Touched, symmetric: bool) -> Iterator[tuple[pa.Table, Ints]]:
    """All row groups of a file that has one of some pairs, and the place of each row's pair; of another file none."""
    waiting, holds = list[tuple[int, pa.Table, Ints]](), False
    others = [name for name in file.schema_arrow.names if name not in IDS]
    for number in range(file.num_row_groups):
        rows = file.read_row_group(number, columns=IDS, use_threads=False)
        waiting.append((number, rows, pairs.places(rows, either_order=symmetric)))
        holds |= bool((waiting[-1][2] >= 0).any())
        if not holds:
            continue
        for group, ids, place in waiting:
            numbers = file.read_row_group(group, columns=others, use_threads=False)
            yield pa.table([*ids.columns, *numbers.columns], names=[*IDS, *others]), place
        waiting.clear()


def _renewed(rows: pa.Table, place: Ints, gains: Gains) -> tuple[pa.Table, Ints]:
    """Totals with their gains, without those that do not stand; and the places of those that do."""
    at = np.flatnonzero(place >= 0)
    weight, days, fit = (rows[name].to_numpy().copy() for name in ("weight", "num_user_days", "fit_weight"))
    gained = gains.fit_weight[place[at]]
    stands = ~gains.again[place[at]] & ((fit[at] > 0) | (gained == 0))
    kept = np.ones(rows.num_rows, np.bool_)
    kept[at[~stands]] = False
    at, gained = at[stands], gained[stands]
    weight[at] += gains.weight[place[at]]
    days[at] += gains.num_user_days[place[at]]
    fit[at] += gained
    for name, values in (("weight", weight), ("num_user_days", days), ("fit_weight", fit)):
        rows = rows.set_column(rows.column_names.index(name), name, pa.array(values))
    return rows.filter(pa.array(kept)), place[at]


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


def _rows(file: pq.ParquetFile, number: int, wanted: Mask, columns: Sequence[str] | None = None) -> pa.Table:
    """Some rows of a row group."""
    return file.read_row_group(number, columns=columns, use_threads=False).filter(pa.array(wanted))


def _days(rows: pa.Table) -> Ints:
    days: Ints = rows["event_date"].cast(pa.int32()).to_numpy().astype(np.int64)
    return days
