"""Counted pairs as Parquet files that tasks write themselves, without a detour through Spark's rows.

A rebuild counts tens of millions of rows, of which nearly all are pairs seen once. Handing them to Spark one by one takes several times
as long as counting them. A task here writes them with coded ids and returns what a commit needs to know; the files of tasks that failed
are in no commit, and a VACUUM removes them.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from typing import Any, NamedTuple, Self
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from conf.tables import CO_ENGAGEMENT_PAIRS
from features.file_stats import FileStats
from features.pair_counts import CODED_TOTAL_ARROW, DAY_ARROW, Counted
from features.pair_kernels import CODED, EPOCH, compacted

FILE_SCHEMA = "kind string, name string, size bigint, num_rows bigint, stats string"
"""What a commit needs to know of a file: `daily`, `totals` or `pairs`, its name below the table's folder, bytes, rows, and Delta's
statistics as JSON.
"""

IDS = ["trigger_item_id", "target_item_id"]
"""Columns of every table of pairs."""

_ARROW = {"string": CODED, "bigint": pa.int64(), "double": pa.float64(), "date": pa.date32()}
_SCHEMAS = {
    "daily": DAY_ARROW,
    "totals": CODED_TOTAL_ARROW,
    "pairs": pa.schema([(column.name, _ARROW[column.type]) for column in CO_ENGAGEMENT_PAIRS.columns]),
}
_SPAN_ROWS = 250_000  # a first span with fewer engagements grows: its files would be tiny
_PAGE_BYTES = 64 * 1024 * 1024  # of a dictionary: all ids of a cell stay coded


class KnownFile(NamedTuple):
    """A file of pairs: its bytes, and the first and last day of its rows; None: nobody knows, or it is of totals."""

    size: int
    first_day: date | None = None
    last_day: date | None = None

    @classmethod
    def of(cls, row: Any) -> Self:
        """From a row of FILE_SCHEMA."""
        stats = json.loads(row["stats"])
        days = (stats[end].get("event_date") for end in ("minValues", "maxValues"))
        return cls(row["size"], *(day and date.fromisoformat(day) for day in days))

    def may_hold(self, days: Collection[date]) -> bool:
        """Whether it may have rows of one of the days."""
        if self.first_day is None or self.last_day is None:
            return True
        return any(self.first_day <= day <= self.last_day for day in days)


def day_spans(num_engagements: Mapping[date, int]) -> list[date]:
    """First days of spans of days, ascending, whose length doubles with age: a late event rewrites the files of its span only.

    Args:
        num_engagements: of each day; spans of few are joined to the span before them.
    """
    days = sorted(num_engagements)
    spans, end, length = list[date](), len(days), 1
    while end > 0:
        begin = max(0, end - length)
        while begin > 0 and sum(num_engagements[day] for day in days[begin:end]) < _SPAN_ROWS:
            begin -= 1
        spans.append(days[begin])
        end, length = begin, 2 * length
    return spans[::-1]


def write_counted(counted: Iterable[Counted], *, folders: Mapping[str, str], spans: Sequence[date]) -> Iterator[pa.RecordBatch]:
    """Write a file of totals and a file of daily rows for each span, and return their rows of FILE_SCHEMA; no row, no file.

    Args:
        counted: of one task.
        folders: path or URI of the table by kind, `daily` and `totals`.
        spans: of `day_spans`.
    """
    starts = [(day - EPOCH).days for day in spans]
    files: dict[tuple[str, int], PairFile] = {}
    for part in counted:
        day = part.daily["event_date"].combine_chunks().cast(pa.int32()).to_numpy()
        ends = [*day.searchsorted(starts).tolist(), len(day)]
        for number, begin in enumerate(ends[:-1]):
            _add(files, ("daily", number), part.daily.slice(begin, ends[number + 1] - begin), folders)
        _add(files, ("totals", 0), part.totals, folders)
    for file in files.values():
        yield from file.close()


def _add(files: dict[tuple[str, int], "PairFile"], key: tuple[str, int], rows: pa.Table, folders: Mapping[str, str]) -> None:
    if not rows.num_rows:
        return
    if key not in files:
        files[key] = PairFile(kind=key[0], folder=folders[key[0]])
    files[key].write(rows)


@dataclass(kw_only=True)
class PairFile:
    """A Parquet file of a table being written, in row groups as they come; without a row there is no file."""

    kind: str
    folder: str
    name: str = field(default_factory=lambda: f"part-{uuid4()}.parquet")
    stats: FileStats = field(default_factory=FileStats)
    _writer: Any = None
    _place: Any = None

    def write(self, rows: pa.Table) -> None:
        """A row group with the columns of the table, ids coded."""
        if not rows.num_rows:
            return
        schema = _SCHEMAS[self.kind]
        rows = with_small_dictionaries(rows.select(schema.names).cast(schema))
        if self._writer is None:
            self._place = open_uri(f"{self.folder}/{self.name}")
            files, path = self._place
            compressed = [name for name in schema.names if name != "user_hashes"]
            coded = [name for name in compressed if schema.field(name).type != pa.float64()]  # few weights are equal: finding them is dear
            random = {"user_hashes.list.element": "none"} if self.kind == "daily" else {}
            self._writer = pq.ParquetWriter(
                path,
                schema,
                filesystem=files,
                store_schema=False,
                use_dictionary=coded,
                compression=dict.fromkeys(compressed, "snappy") | random,
                write_statistics=["event_date"],  # those of coded ids take four times as long as all the rest, and rule out nothing
                dictionary_pagesize_limit=_PAGE_BYTES,
            )
        self._writer.write_table(rows, row_group_size=rows.num_rows)
        self.stats.add(rows)

    def close(self) -> Iterator[pa.RecordBatch]:
        """Its row of FILE_SCHEMA."""
        if self._writer is None:
            return
        self._writer.close()
        files, path = self._place
        row = {
            "kind": pa.array([self.kind]),
            "name": pa.array([self.name]),
            "size": pa.array([files.get_file_info(path).size]),
            "num_rows": pa.array([self.stats.num_rows]),
            "stats": pa.array([self.stats.as_json()]),
        }
        yield pa.RecordBatch.from_pydict(row)


def with_small_dictionaries(rows: pa.Table) -> pa.Table:
    """One chunk; where most ids of a dictionary are of no row, which a file would hold all the same, only the others."""
    rows = rows.unify_dictionaries().combine_chunks()
    for place, column in enumerate(rows.columns):
        if pa.types.is_dictionary(column.type) and len(column.chunk(0).dictionary) > rows.num_rows:
            rows = rows.set_column(place, rows.field(place), compacted(column.chunk(0)))
    return rows


def ends_in(group: pq.RowGroupMetaData, column: str) -> tuple[Any, Any] | None:
    """Least and greatest value of a column in a row group; None: its statistics do not say."""
    for number in range(group.num_columns):
        found = group.column(number)
        if found.path_in_schema == column and found.is_stats_set and found.statistics.has_min_max:
            return found.statistics.min, found.statistics.max
    return None


def open_uri(uri: str) -> tuple[fs.FileSystem, str]:
    """File system of a path or URI, and the path there; Spark's name for S3 is known."""
    if "://" not in uri:
        return fs.LocalFileSystem(), uri
    files, path = fs.FileSystem.from_uri(uri.replace("s3a://", "s3://", 1))
    return files, path


def uris_of(batches: Iterable[pa.RecordBatch]) -> Iterator[str]:
    """The column `uri` of some batches."""
    return (uri for batch in batches for uri in batch["uri"].to_pylist())


@contextmanager
def opened(uri: str) -> Iterator[pq.ParquetFile]:
    """A file of pairs, whose ids are read coded."""
    files, path = open_uri(uri)
    with files.open_input_file(path) as source:
        yield pq.ParquetFile(source, read_dictionary=IDS)
