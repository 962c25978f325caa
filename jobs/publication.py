"""How a run of the history becomes the current night: its files, under names of their own, in one fenced commit, without Spark.

`item_neighbors_history` and `item_neighbors` have the same columns and layout, and a file of the history holds one run. So a publication
writes no row a second time: on a local lake the new names are links, elsewhere the files are copied whole. A reader sees the commit
before or the one after; a publication that is killed in between leaves files that no commit names, which a VACUUM removes.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from deltalake import CommitProperties, DeltaTable, write_deltalake
from deltalake.exceptions import CommitFailedError
from deltalake.transaction import AddAction, RemoveAction
from pyarrow import fs

from conf.errors import PublishError, TableError
from conf.faults import reach
from conf.tables import ITEM_NEIGHBORS, ITEM_NEIGHBORS_HISTORY
from features.pair_kernels import PACKED_ROWS, chunks
from jobs.reader import changes_since, first_row, open_table, table_exists

_MERGED_AGAIN = ".m"  # between the run id of a night and the version of merge_policy under which its lists were merged again


def base_run(run_id: str) -> str:
    """The night whose candidates a run's lists were merged from."""
    return run_id.partition(_MERGED_AGAIN)[0]


def merged_run(run_id: str, policy_version: int) -> str:
    """The run id of a night's lists, merged again under a version of merge_policy."""
    return f"{base_run(run_id)}{_MERGED_AGAIN}{policy_version}"


def merged_policy(run_id: str) -> int | None:
    """The version of merge_policy under which a run's lists were merged again; None: they are a night's own."""
    _, again, version = run_id.partition(_MERGED_AGAIN)
    return int(version) if again else None


@dataclass(frozen=True, kw_only=True)
class Published:
    """What item_neighbors holds at a version."""

    version: int
    run_id: str
    run_date: date


def published(root: str, version: int | None = None) -> Published:
    """The run behind item_neighbors at a version (None: latest).

    Raises:
        PublishError: nothing has been published yet.
    """
    if not table_exists(root, ITEM_NEIGHBORS):
        raise PublishError(f"nothing is published under {root}; run `python -m jobs.nightly` first")
    table = open_table(root, ITEM_NEIGHBORS, version)
    row = first_row(table, ["run_id", "run_date"])
    if row is None:
        raise PublishError(f"item_neighbors version {table.version()} under {root} is empty; run `python -m jobs.nightly` first")
    return Published(version=table.version(), **row)


def kept_runs(root: str) -> dict[str, date]:
    """Runs in the history with their dates, oldest first."""
    if not table_exists(root, ITEM_NEIGHBORS_HISTORY):
        return {}
    found: set[tuple[date, str]] = set()
    for batch in open_table(root, ITEM_NEIGHBORS_HISTORY).to_pyarrow_dataset().to_batches(columns=["run_date", "run_id"]):
        found |= {(row["run_date"], row["run_id"]) for row in pa.table(batch).group_by(["run_date", "run_id"]).aggregate([]).to_pylist()}
    return {run_id: run_date for run_date, run_id in sorted(found)}


def publish_run(root: str, run_id: str, *, expected: int, inputs: Mapping[str, int], because: Mapping[str, str] | None = None) -> int:
    """Replace item_neighbors by the lists of a run if it still is at the expected version; returns the new version.

    Args:
        root: of the lake.
        run_id: a run of the history.
        expected: version of item_neighbors that the caller has seen.
        inputs: version of each table that the lists were made from. The commit says them, the run, its date and its model.
        because: further words for the commit.

    Raises:
        PublishError: somebody else published in between; nothing is published.
        TableError: the history does not hold the run.
    """
    latest = open_table(root, ITEM_NEIGHBORS).version()  # looked at before what it holds is: what comes later fails at the fence
    if not changes_since(root, ITEM_NEIGHBORS, expected):
        expected = latest  # somebody may have compacted it, which publishes nothing
    table, history = open_table(root, ITEM_NEIGHBORS, expected), open_table(root, ITEM_NEIGHBORS_HISTORY)
    files = run_files(history, run_id)
    columns = ["run_id", "run_date", "model_version"]
    about = first_row(history, columns, run_id=run_id)
    assert about is not None  # run_files has found some
    about |= {"run_date": about["run_date"].isoformat(), "inputs": {name: str(version) for name, version in inputs.items()}}
    properties = commit_properties({**about, **(because or {})}, fenced=True)
    try:
        if files is None:  # somebody compacted the history, so that a file holds several runs
            rows = history.to_pyarrow_dataset().scanner(filter=ds.field("run_id") == run_id)
            write_deltalake(table, rows.to_reader(), mode="overwrite", commit_properties=properties)
        else:
            actions: list[AddAction | RemoveAction] = [_linked(action, source=history, target=table) for action in files]
            reach("publish_neighbors.linked")
            table.create_write_transaction(actions, "overwrite", table.schema(), [], commit_properties=properties)
    except CommitFailedError as error:
        found = open_table(root, ITEM_NEIGHBORS).version()
        raise PublishError(
            f"item_neighbors is at version {found}, this run expected {expected}: another run was published in between. "
            "Nothing was published; run again if its lists are still wanted."
        ) from error
    return open_table(root, ITEM_NEIGHBORS).version()


def commit_properties(metadata: Mapping[str, Any], *, fenced: bool) -> CommitProperties:
    """Metadata as Spark writes it (`userMetadata` of the table's history); fenced: fail where somebody else committed first."""
    return CommitProperties(custom_metadata={"userMetadata": json.dumps(dict(metadata))}, max_commit_retries=0 if fenced else None)


def run_files(history: DeltaTable, run_id: str) -> list[AddAction] | None:
    """The files of a run; None if one of them may hold rows of another run, too.

    Raises:
        TableError: there are none.
    """
    mine, pure = files_of(history, run_id)
    if not mine and first_row(history, ["run_id"], run_id=run_id) is None:
        raise TableError(f"{history.table_uri} holds no lists of run {run_id}")
    return mine if pure else None


def files_of(history: DeltaTable, run_id: str) -> tuple[list[AddAction], bool]:
    """The files that hold nothing but lists of a run, and whether no other file can hold one of them."""
    mine, pure = list[AddAction](), True
    for row in pa.table(history.get_add_actions()).to_pylist():
        low, high = ((row[end] or {}).get("run_id") for end in ("min", "max"))
        if low == high == run_id:
            mine.append(add_action(row))
        elif low is None or high is None or low <= run_id <= high:
            pure = False
    return mine, pure


def add_action(row: Mapping[str, Any]) -> AddAction:
    """What a commit would say to add a file, from its row of `DeltaTable.get_add_actions`."""
    counts = {name: count for name, count in (row["null_count"] or {}).items() if isinstance(count, int)}
    stats = {"numRecords": row["num_records"], "minValues": row["min"], "maxValues": row["max"], "nullCount": counts}
    return AddAction(
        path=row["path"],
        size=row["size_bytes"],
        partition_values={},
        modification_time=int(row["modification_time"]),
        data_change=True,
        stats=json.dumps(stats, default=str),
    )


def _linked(action: AddAction, *, source: DeltaTable, target: DeltaTable) -> AddAction:
    """The same file under a new name in another table."""
    name = f"part-{uuid4()}.parquet"
    here, there = f"{source.table_uri.rstrip('/')}/{action.path}", f"{target.table_uri.rstrip('/')}/{name}"
    if "://" in there and not there.startswith("file://"):
        fs.copy_files(here, there)
    else:
        _link(Path(here.removeprefix("file://")), Path(there.removeprefix("file://")))
    return AddAction(**{**action.__dict__, "path": name})


def _link(here: Path, there: Path) -> None:
    try:
        os.link(here, there)
    except OSError:  # another file system below one of the folders, or one without links
        partial = there.with_suffix(".partial")
        shutil.copyfile(here, partial)
        partial.replace(there)


def item_ids_ever(root: str) -> pa.Array:
    """Every trigger item that some kept night had."""
    history = open_table(root, ITEM_NEIGHBORS_HISTORY).to_pyarrow_dataset()
    known = pa.array([], pa.string())
    for rows in chunks(history.to_batches(columns=["item_id"], filter=ds.field("head") == "merged"), min_rows=PACKED_ROWS):
        known = pc.unique(pa.chunked_array([known, *rows["item_id"].cast(pa.string()).chunks]))  # not once per batch of some hundred rows
    return known
