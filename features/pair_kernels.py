"""What the numpy side of pair counting shares: codes, runs, orders, and blocks that travel between tasks. No Spark import.

Spark tasks hand each other tables as few large binary blocks: an exchange then moves a thousand blocks and not tens of millions of rows,
each of which Spark would serialize, compress and sort. `features.windows` makes windows of users, `features.pair_counts` counts them,
`features.pair_totals` adds days up.

Days are days since 1970-01-01, times microseconds since then, both UTC.
"""

import zlib
from collections.abc import Iterable, Iterator, Mapping
from datetime import date
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from conf.errors import SettingsError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

EPOCH = date(1970, 1, 1)
MAX_ITEMS = 2**31 - 1
"""Different values that a task can number: dictionaries and lists of Arrow hold 32-bit positions, a pair of codes 62 bits."""
LEAST_EXPONENT = -1000.0
"""Half-lives beyond which an engagement fades no further: a weight of 0 would be that of a pair which nobody has engaged with."""
OUTPUT_ROWS = 50_000
PACKED_ROWS = 1_000_000
"""Rows that a task holds before it packs or writes them: some 80 MB."""
PACKED_SCHEMA = "bucket int, block binary"
CODED = pa.dictionary(pa.int32(), pa.string())
_MAX_KEY_BYTES = 64
KEY_BITS = 63
"""Bits of a sort key: those of a signed number that stays positive."""


def day_number(day: date) -> int:
    """Days since 1970-01-01."""
    return (day - EPOCH).days


def keyed_hash(text: str, *, key: bytes) -> int:
    """64-bit keyed BLAKE2b of a text, as a signed integer. A key above 64 bytes, BLAKE2b's limit, is hashed first."""
    return int(keyed_hashes([text], key=key)[0])


def keyed_hashes(texts: Iterable[str], *, key: bytes) -> Ints:
    """`keyed_hash` of many texts; the key is taken in once."""
    keyed = blake2b(digest_size=8, key=key if len(key) <= _MAX_KEY_BYTES else blake2b(key).digest())
    found = bytearray()
    for text in texts:
        state = keyed.copy()
        state.update(text.encode())
        found += state.digest()
    return np.frombuffer(found, dtype=">i8").astype(np.int64)


def ranges(starts: Ints, lengths: Ints) -> Ints:
    """The ranges [start, start + length) one after the other: `[5, 0], [2, 3]` gives `[5, 6, 0, 1, 2]`."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    rows: Ints = np.arange(total, dtype=np.int64) + np.repeat(starts - (ends - lengths), lengths)
    return rows


def first_of_runs(*columns: NDArray[Any]) -> Mask:
    """Whether a row differs from the one before it."""
    first = np.zeros(len(columns[0]), dtype=np.bool_)
    first[:1] = True
    for column in columns:
        first[1:] |= column[1:] != column[:-1]
    return first


def run_starts(*columns: NDArray[Any]) -> Ints:
    """Row at which each run of equal rows begins."""
    return np.flatnonzero(first_of_runs(*columns))


def run_lengths(starts: Ints, num_rows: int) -> Ints:
    """Lengths of the runs that begin at `starts`, of so many rows in all."""
    return np.diff(np.append(starts, num_rows))


def equal_runs(*columns: Ints) -> list[tuple[int, int]]:
    """First row and length of each run of equal rows."""
    starts = run_starts(*columns)
    return list(zip(starts.tolist(), run_lengths(starts, len(columns[0])).tolist(), strict=True))


def num_bits(size: int) -> int:
    """Bits that hold every code below the size."""
    return max(1, (size - 1).bit_length())


def row_order(*columns: Ints) -> Ints:
    """Rows in the order of the columns, the first one first, then of their place.

    Columns are packed into as few 63-bit numbers as their ranges allow. One number that also holds the row is sorted by itself, which is
    several times as fast as sorting rows by numbers.
    """
    keys, widths = list[Ints](), list[int]()
    for column in columns:
        if not len(column):
            return np.zeros(0, dtype=np.int64)
        low = int(column.min())
        width = num_bits(int(column.max()) - low + 1)
        if width > KEY_BITS:  # the range itself overflows
            keys, widths = [*keys, column], [*widths, KEY_BITS]
        elif keys and widths[-1] + width <= KEY_BITS:
            keys[-1], widths[-1] = (keys[-1] << width) | (column - low), widths[-1] + width
        else:
            keys, widths = [*keys, column - low], [*widths, width]
    row_bits = num_bits(len(columns[0]))
    if len(keys) == 1 and widths[0] + row_bits <= KEY_BITS:
        held = (keys[0] << row_bits) | np.arange(len(columns[0]))
        held.sort()
        return held & ((1 << row_bits) - 1)
    return np.lexsort(keys[::-1])


def compact_codes(codes: NDArray[Any], size: int) -> tuple[Ints, Ints]:
    """The codes below `size` that occur, ascending, and each code's position among them."""
    used = np.zeros(size, dtype=np.bool_)
    used[codes] = True
    place = np.cumsum(used) - 1
    return np.flatnonzero(used), place[codes]


def check_num_items(num_items: int) -> None:
    """Raise SettingsError where a pair of items no longer fits into a 63-bit number of two codes."""
    if num_items > MAX_ITEMS:
        raise SettingsError(
            f"found {num_items:,} different items, wanted at most {MAX_ITEMS:,}: a pair of them no longer fits into a 64-bit index; "
            "check source.events.columns.item_id, which seems to hold something finer than items"
        )


def encode(values: pa.Array | pa.ChunkedArray) -> tuple[Ints, pa.Array]:
    """Codes and the distinct values, both ascending in bytes as Spark sorts strings.

    Raises:
        SettingsError: there are more values than codes.
    """
    codes, names = number_values(values)
    order = pc.sort_indices(names).to_numpy()
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    return rank[codes], names.take(pa.array(order))


def number_values(values: pa.Array | pa.ChunkedArray) -> tuple[Ints, pa.Array]:
    """As `encode`, but numbered as they come: no sort of the distinct values."""
    if isinstance(values, pa.ChunkedArray):
        values = (values.unify_dictionaries() if pa.types.is_dictionary(values.type) else values).combine_chunks()
    array = values
    encoded = array if pa.types.is_dictionary(array.type) else array.dictionary_encode()
    check_num_items(len(encoded.dictionary))
    return encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64), encoded.dictionary


def positions(ids: pa.Array | pa.ChunkedArray, known: pa.Array) -> Ints:
    """Index of each id, coded or not, among the known ones, -1 where it is not."""
    codes, names = number_values(ids)
    found: Ints = pc.fill_null(pc.index_in(names, value_set=known), -1).to_numpy().astype(np.int64)
    return found[codes]


def ints(table: pa.Table | pa.RecordBatch, name: str) -> Ints:
    """A column without nulls as int64."""
    values: Ints = table.column(name).to_numpy(**({} if isinstance(table, pa.Table) else {"zero_copy_only": False}))
    return values.astype(np.int64, copy=False)


def text_hashes(names: pa.Array) -> Ints:
    """A 32-bit hash of each text, equal in every task and for every dictionary."""
    return np.array([zlib.crc32(name.encode()) for name in names.to_pylist()], dtype=np.int64)


# --- Blocks --------------------------------------------------------------------------------------------------------------------


def chunks(batches: Iterable[pa.RecordBatch], *, min_rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of at least so many rows, but for the last one."""
    held: list[pa.RecordBatch] = []
    num_rows = 0
    for batch in batches:
        held.append(batch)
        num_rows += batch.num_rows
        if num_rows >= min_rows:
            yield pa.Table.from_batches(held)
            held, num_rows = [], 0
    if num_rows:
        yield pa.Table.from_batches(held)


def packed_by(chunk: pa.Table, bucket: Ints, num_buckets: int) -> Iterator[pa.RecordBatch]:
    """A row of PACKED_SCHEMA for each bucket that a row goes to."""
    order = np.argsort(bucket.astype(np.uint16) if num_buckets < 2**16 else bucket, kind="stable")  # 16 bits: a radix sort
    ends = np.searchsorted(bucket[order], np.arange(num_buckets + 1))
    grouped = chunk.unify_dictionaries().combine_chunks().take(pa.array(order))
    for number in np.flatnonzero(np.diff(ends)).tolist():
        part = grouped.slice(ends[number], ends[number + 1] - ends[number])
        for place, column in enumerate(part.columns):
            if pa.types.is_dictionary(column.type):
                part = part.set_column(place, part.column_names[place], compacted(column.combine_chunks()))
        yield packed(number, part)


def compacted(coded: pa.DictionaryArray) -> pa.DictionaryArray:
    """The same values with a dictionary that holds no others."""
    used, codes = compact_codes(coded.indices.to_numpy(), len(coded.dictionary))
    return pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), coded.dictionary.take(pa.array(used)))


def packed(bucket: int, rows: pa.Table) -> pa.RecordBatch:
    """A row of PACKED_SCHEMA."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as writer:  # the exchange compresses
        writer.write_table(rows)
    content = sink.getvalue()
    ends = pa.array([0, content.size], pa.int32()).buffers()[1]
    block = pa.BinaryArray.from_buffers(pa.binary(), 1, [None, ends, content])
    return pa.RecordBatch.from_arrays([pa.array([bucket], pa.int32()), block], names=["bucket", "block"])


def packed_arrays(bucket: int, arrays: Mapping[str, Ints]) -> pa.RecordBatch:
    """A row of PACKED_SCHEMA of arrays of any lengths, each as narrow as its values allow, which `unpack_arrays` reads."""
    narrow = [pa.array(_narrowed(values)) for values in arrays.values()]
    lists = [pa.ListArray.from_arrays(pa.array([0, len(array)], pa.int32()), array) for array in narrow]
    return packed(bucket, pa.table(lists, names=list(arrays)))


def _narrowed(values: Ints) -> NDArray[Any]:
    low, high = int(values.min(initial=0)), int(values.max(initial=0))
    kinds = (kind for kind in (np.int8, np.int16, np.int32) if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max)
    return values.astype(next(kinds, np.int64), copy=False)


def unpack(block: pa.BinaryScalar) -> pa.Table:
    """The rows of one block."""
    return pa.ipc.open_stream(block.as_buffer()).read_all()


def unpacked(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """The rows of each block of some batches of PACKED_SCHEMA."""
    return (unpack(block) for batch in batches for block in batch["block"])


def unpack_arrays(block: pa.BinaryScalar) -> dict[str, NDArray[Any]]:
    """The arrays of one block of `packed_arrays`, which must hold numbers."""
    table = unpack(block)
    return {name: table[name].chunk(0).values.to_numpy() for name in table.column_names}
