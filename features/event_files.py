"""Engagements read from their Parquet files by the tasks themselves.

Spark would hand each engagement to Python as a row, which takes longer than counting its pairs. Read by columns, ids stay codes of a
dictionary from the file to the exchange. A task gets files of about one size: many small ones, or some row groups of a large one.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import ceil
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features.pair_files import ends_in, open_uri
from features.pair_kernels import PACKED_ROWS, day_number, text_hashes

PART_SCHEMA = "task int, uri string, part int, num_parts int"
_TASK_BYTES = 32 << 20  # some 2 million engagements
_IDS = ("user_id", "item_id", "session_id")


@dataclass(frozen=True, kw_only=True)
class EventFiles:
    """Parquet files with the columns of engagements: bytes by path or URI; `actions` that count, None: all."""

    sizes: Mapping[str, int]
    actions: tuple[str, ...] | None = None


class FilePart(NamedTuple):
    """A row of PART_SCHEMA: of the row groups of a file those whose number leaves the remainder `part` by `num_parts`."""

    task: int
    uri: str
    part: int
    num_parts: int


@dataclass(frozen=True, kw_only=True)
class EventRule:
    """Which engagements are read: of some days, of some actions (None: of all), in a session or not.

    Attributes:
        days: (first, last) of runs of days since 1970-01-01.
        actions: that count.
        by_session: only engagements in a session.
    """

    days: tuple[tuple[int, int], ...]
    actions: tuple[str, ...] | None
    by_session: bool

    @property
    def columns(self) -> list[str]:
        """What is read of a file."""
        wanted = ["user_id", "item_id", "engaged_at", "event_date"]
        return wanted + ["session_id"] * self.by_session + ["action"] * (self.actions is not None)


def deal_files(sizes: Mapping[str, int], *, task_bytes: int = _TASK_BYTES) -> list[FilePart]:
    """Parts of files for tasks of about one size, numbered from 0.

    Args:
        sizes: bytes by path or URI.
        task_bytes: of a task; a file larger than this is read by several.
    """
    pieces = list[tuple[str, int, int, int]]()
    for uri, size in sorted(sizes.items()):
        num_parts = max(1, -(-size // task_bytes))
        pieces += [(uri, part, num_parts, size // num_parts) for part in range(num_parts)]
    tasks = deal([size for *_, size in pieces], most=task_bytes)
    return [FilePart(task, uri, part, num_parts) for task, (uri, part, num_parts, _) in zip(tasks, pieces, strict=True)]


def deal(sizes: Sequence[int], *, most: int) -> list[int]:
    """The task of each of some pieces, in their order: a task takes pieces until one more would be too much."""
    tasks, task, held = list[int](), 0, 0
    for size in sizes:
        if held and held + size > most:
            task, held = task + 1, 0
        tasks.append(task)
        held += size
    return tasks


def read_events(parts: Iterable[pa.RecordBatch], *, rule: EventRule, num_buckets: int) -> Iterator[pa.RecordBatch]:
    """The engagements of some parts, as `features.windows.pack_by_user` takes them.

    Args:
        parts: rows of PART_SCHEMA.
        rule: which engagements.
        num_buckets: of users.
    """
    for batch in parts:
        for row in batch.to_pylist():
            yield from _read(FilePart(**row), rule, num_buckets)


def _read(place: FilePart, rule: EventRule, num_buckets: int) -> Iterator[pa.RecordBatch]:
    files, path = open_uri(place.uri)
    with files.open_input_file(path) as source:
        ids = [name for name in _IDS if name in rule.columns]
        file = pq.ParquetFile(source, read_dictionary=ids, coerce_int96_timestamp_unit="us")
        groups = [n for n in range(place.part, file.num_row_groups, place.num_parts) if _may_hold(file.metadata.row_group(n), rule)]
        for group in groups:  # never across two: each has dictionaries of its own
            num_rows = max(1, file.metadata.row_group(group).num_rows)
            size = ceil(num_rows / max(1, round(num_rows / PACKED_ROWS)))
            for batch in file.iter_batches(size, row_groups=[group], columns=rule.columns, use_threads=False):
                yield _prepared(batch, rule, num_buckets)


def _may_hold(group: pq.RowGroupMetaData, rule: EventRule) -> bool:
    """Whether a row group may have engagements of the days, by its statistics."""
    if (ends := ends_in(group, "event_date")) is None:
        return True
    low, high = map(day_number, ends)
    return any(first <= high and low <= last for first, last in rule.days)


def _prepared(batch: pa.RecordBatch, rule: EventRule, num_buckets: int) -> pa.RecordBatch:
    day = batch["event_date"].cast(pa.int32())
    wanted = _any([pc.and_(pc.greater_equal(day, first), pc.less_equal(day, last)) for first, last in rule.days])
    if rule.actions is not None:
        wanted = pc.and_(wanted, pc.is_in(batch["action"], value_set=pa.array(rule.actions)))
    if rule.by_session:
        wanted = pc.and_(wanted, pc.is_valid(batch["session_id"]))
    columns = {
        "bucket": _buckets(batch["user_id"], num_buckets),
        "user_id": batch["user_id"],
        **({"session_id": batch["session_id"]} if rule.by_session else {}),
        "item_id": batch["item_id"],
        "day": day,
        "time": batch["engaged_at"].cast(pa.timestamp("us", tz="UTC")).cast(pa.int64()),
    }
    rows = pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))
    return rows if wanted.true_count == len(wanted) else rows.filter(wanted)


def _any(masks: Sequence[pa.Array]) -> pa.Array:
    return reduce(pc.or_, masks)


def _buckets(users: pa.DictionaryArray, num_buckets: int) -> pa.Array:
    """The bucket of each row's user: equal in every task, whatever the dictionary."""
    return pa.array((text_hashes(users.dictionary) % num_buckets)[users.indices.to_numpy()].astype(np.int32))
