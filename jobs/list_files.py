"""Files of lists: written by whoever makes the lists, in Spark's tasks or beside Spark, and committed to the history. No Spark import.

Lists leave the retriever as Arrow. Handed to Spark, the ten thousands of neighbors of each block would become rows and columns again,
which takes four times as long as writing them here. A file holds all lists of a range of items of one run, sorted by item and head, in row
groups of some 2 MB, so that a point lookup decodes little.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake.exceptions import CommitFailedError
from deltalake.transaction import AddAction, RemoveAction

from conf.errors import TableError
from conf.tables import CONTRACT_VERSION, ITEM_NEIGHBORS_HISTORY
from features.file_stats import FileStats
from features.pair_files import open_uri
from jobs.publication import commit_properties, files_of
from jobs.reader import open_table
from models.list_rows import ARROW_SCHEMA

FILE_SCHEMA = "name string, size bigint, stats string"
"""A written file as a row of Spark: its name below the table's folder, bytes, and Delta's statistics as JSON."""

_SCHEMA = pa.schema(
    [
        ("run_date", pa.date32()),
        ("run_id", pa.string()),
        *ARROW_SCHEMA,
        ("model_version", pa.string()),
        ("contract_version", pa.int32()),
    ]
)
_ROWS_PER_GROUP = 600  # of 100 neighbors: 2 MB
_MOST_ATTEMPTS = 5  # of a commit that others come before
_PLAIN = [field.name for field in _SCHEMA if not pa.types.is_nested(field.type)]
_LAYOUT = [("item_id", "ascending"), ("head", "ascending")]

Batches = Iterable[pa.RecordBatch]
MakeLists = Callable[[Iterator[pa.RecordBatch]], Batches]
"""What turns a task's input into lists of models.list_rows.ARROW_SCHEMA, in ascending order of their items."""


@dataclass(frozen=True, kw_only=True)
class ListsOf:
    """What all lists of a run share."""

    run_date: date
    run_id: str
    model_version: str


@dataclass(frozen=True, kw_only=True)
class ListFile:
    """A file that was written: its name below the history's folder, size in bytes, and Delta's statistics."""

    name: str
    size: int
    stats: str


def write_task(batches: Iterator[pa.RecordBatch], *, make: MakeLists, of: ListsOf, folder: str) -> Iterator[pa.RecordBatch]:
    """One file of everything that a Spark task makes: a row of FILE_SCHEMA, none where there are no lists."""
    file = write_lists((_identified(made, of) for made in make(batches)), folder)
    if file is not None:
        yield pa.RecordBatch.from_pylist([file.__dict__])


def _identified(lists: pa.RecordBatch, of: ListsOf) -> pa.Table:
    shared = {**of.__dict__, "contract_version": CONTRACT_VERSION}
    given = {name: lists[name] for name in ARROW_SCHEMA.names}
    columns = [given[f.name] if f.name in given else pa.repeat(pa.scalar(shared[f.name], f.type), len(lists)) for f in _SCHEMA]
    return pa.table(columns, schema=_SCHEMA)


def write_lists(tables: Iterable[pa.Table], folder: str) -> ListFile | None:
    """Write lists to a file of their own below the history's folder; None where there are none.

    Args:
        tables: columns of item_neighbors_history, each with the lists of a range of items behind that of the one before.
        folder: path or URI.
    """
    writer = _Writer(folder=folder)
    for table in tables:
        writer.add(_sorted(table.select(_SCHEMA.names).cast(_SCHEMA)))
    return writer.close()


def _sorted(lists: pa.Table) -> pa.Table:
    """In the order of the layout; lists that are in it are not copied."""
    order = pc.sort_indices(lists, sort_keys=_LAYOUT)
    return lists if (np.diff(order.to_numpy()) == 1).all() else lists.take(order)


@dataclass(kw_only=True)
class _Writer:
    """A file being written: rows are held until they make a row group."""

    folder: str
    name: str = field(default_factory=lambda: f"part-{uuid4()}.parquet")
    _held: list[pa.Table] = field(default_factory=list)
    _stats: FileStats = field(default_factory=FileStats)
    _writer: Any = None

    def add(self, rows: pa.Table) -> None:
        self._stats.add(rows)
        self._held.append(rows)
        whole = sum(part.num_rows for part in self._held) // _ROWS_PER_GROUP * _ROWS_PER_GROUP
        if whole:
            held = pa.concat_tables(self._held)
            self._write(held.slice(0, whole))
            self._held = [held.slice(whole)]

    def _write(self, rows: pa.Table) -> None:
        if self._writer is None:
            files, path = open_uri(f"{self.folder}/{self.name}")
            self._writer = pq.ParquetWriter(
                path, _SCHEMA, filesystem=files, store_schema=False, compression="snappy", write_statistics=_PLAIN
            )
        self._writer.write_table(rows, row_group_size=_ROWS_PER_GROUP)

    def close(self) -> ListFile | None:
        if not self._stats.num_rows:
            return None
        if rest := [part for part in self._held if part.num_rows]:
            self._write(pa.concat_tables(rest))
        self._writer.close()
        files, path = open_uri(f"{self.folder}/{self.name}")
        return ListFile(name=self.name, size=int(files.get_file_info(path).size), stats=self._stats.as_json())


def commit_lists(root: str, run_id: str, files: Sequence[ListFile], *, metadata: Mapping[str, object]) -> int:
    """Make files the lists of a run in the history, instead of what an earlier attempt left there; returns the new version.

    One commit, but where somebody has compacted the history, so that files hold several runs: there the earlier rows go by a commit before.

    Args:
        root: of the lake, whose history exists.
        run_id: of all lists in the files.
        files: in the history's folder.
        metadata: of the commit.

    Raises:
        TableError: other commits came in between, time and again.
    """
    properties = commit_properties(metadata, fenced=True)
    for _ in range(_MOST_ATTEMPTS):
        history = open_table(root, ITEM_NEIGHBORS_HISTORY)
        earlier, pure = files_of(history, run_id)
        if not pure:
            history.delete(f"run_id = '{run_id}'", commit_properties=commit_properties(metadata, fenced=False))
            history, earlier = open_table(root, ITEM_NEIGHBORS_HISTORY), []
        moment = int(time.time() * 1000)
        actions: list[AddAction | RemoveAction] = [RemoveAction(action.path, True, moment, action.size) for action in earlier]
        actions += [AddAction(file.name, file.size, {}, modification_time=moment, data_change=True, stats=file.stats) for file in files]
        try:
            history.create_write_transaction(actions, "append", history.schema(), [], commit_properties=properties)
        except CommitFailedError:  # somebody added other lists, or compacted, in between: look again
            continue
        return open_table(root, ITEM_NEIGHBORS_HISTORY).version()
    raise TableError(
        f"{_MOST_ATTEMPTS} times another commit to {ITEM_NEIGHBORS_HISTORY.name} under {root} came before that of the lists of {run_id}; "
        "wanted one to succeed: run the same command again once the other jobs on this lake have ended"
    )
