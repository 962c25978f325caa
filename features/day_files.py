"""Counted days as Parquet files that tasks write and read themselves: co_engagement_daily without a detour through Spark's rows.

A rebuild counts tens of millions of rows, of which nearly all are pairs seen once. Handing them to Spark one by one, and back to the
tasks that add days up, takes several times as long as counting them. A task here writes one file with coded ids and returns what a
commit needs to know; the files of tasks that failed are in no commit, and a VACUUM removes them.
"""

from collections.abc import Iterable, Iterator, Sequence
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from features.pair_kernels import DAY_ARROW, PACKED_ROWS, pack_by_pair

FILE_SCHEMA = "name string, size bigint, num_rows bigint, first_day date, last_day date"
"""What a commit needs to know of a file: its name below the table's folder, bytes, rows, and its days."""

SLICE_SCHEMA = "number int, uri string, first_group int, num_groups int"
"""Row groups of a file, which one task reads; slices are numbered."""

_SLICE_ROWS = 2_000_000


def write_days(batches: Iterable[pa.RecordBatch], *, folder: str) -> Iterator[pa.RecordBatch]:
    """Write rows of DAY_ARROW to one file of the folder, and return its row of FILE_SCHEMA; no row, no file."""
    name = f"part-{uuid4()}.parquet"
    files, path = _open(f"{folder}/{name}")
    num_rows, first, last = 0, None, None
    writer: pq.ParquetWriter | None = None
    for table in _tables(batches):
        if writer is None:
            writer = pq.ParquetWriter(path, DAY_ARROW, filesystem=files, store_schema=False)
        writer.write_table(table, row_group_size=table.num_rows)
        days = table["event_date"]
        first, last, num_rows = days[0] if first is None else first, days[-1], num_rows + table.num_rows
    if writer is not None:
        writer.close()
        size = files.get_file_info(path).size
        values = [name, size, num_rows, first, last]
        types = [pa.string(), pa.int64(), pa.int64(), pa.date32(), pa.date32()]
        columns = [pa.array([value], type_) for value, type_ in zip(values, types, strict=True)]
        yield pa.RecordBatch.from_arrays(columns, names=["name", "size", "num_rows", "first_day", "last_day"])


def slices(uris: Sequence[str]) -> list[tuple[int, str, int, int]]:
    """Rows of SLICE_SCHEMA that cover the files, each of about 2 million rows where their row groups are not larger."""
    found: list[tuple[int, str, int, int]] = []
    for uri in uris:
        files, path = _open(uri)
        about = pq.read_metadata(path, filesystem=files)
        sizes = [about.row_group(group).num_rows for group in range(about.num_row_groups)]
        first = held = 0
        for group, size in enumerate(sizes):
            held += size
            if held >= _SLICE_ROWS or group + 1 == len(sizes):
                found.append((len(found), uri, first, group + 1 - first))
                first, held = group + 1, 0
    return found


def pack_slices(batches: Iterable[pa.RecordBatch], *, num_buckets: int) -> Iterator[pa.RecordBatch]:
    """As `pack_by_pair`, for the rows of SLICE_SCHEMA's row groups."""
    yield from pack_by_pair(_rows(batches), num_buckets=num_buckets)


def _rows(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    ids = ["trigger_item_id", "target_item_id"]
    for batch in batches:
        for row in batch.to_pylist():
            files, path = _open(row["uri"])
            with pq.ParquetFile(path, filesystem=files, read_dictionary=ids, memory_map=True) as file:
                groups = range(row["first_group"], row["first_group"] + row["num_groups"])
                for part in file.iter_batches(PACKED_ROWS, row_groups=groups, columns=DAY_ARROW.names):
                    day = part["event_date"].cast(pa.int32())
                    columns = [*(part[name] for name in ids), day, part["num_users"], part["user_hashes"]]
                    yield pa.RecordBatch.from_arrays(columns, names=[*ids, "day", "num_users", "user_hashes"])


def _tables(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """The same rows in tables of at least PACKED_ROWS, each with one dictionary a column: a row group of the file."""
    held, num_rows = list[pa.RecordBatch](), 0
    for batch in batches:
        held.append(batch)
        num_rows += batch.num_rows
        if num_rows >= PACKED_ROWS:
            yield pa.Table.from_batches(held).unify_dictionaries()
            held, num_rows = [], 0
    if num_rows:
        yield pa.Table.from_batches(held).unify_dictionaries()


def _open(uri: str) -> tuple[fs.FileSystem, str]:
    if "://" not in uri:
        return fs.LocalFileSystem(), uri
    files, path = fs.FileSystem.from_uri(uri.replace("s3a://", "s3://", 1))
    return files, path
