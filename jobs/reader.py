"""Published tables without Spark: point lookups and whole columns through delta-rs, for terminals, exports and checks."""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.exceptions import TableNotFoundError

from conf.errors import TableError
from conf.settings import LakeSettings
from conf.tables import ITEM_FEATURES, ITEM_NEIGHBORS, Table

_REARRANGING = frozenset({"OPTIMIZE", "VACUUM START", "VACUUM END", "SET TBLPROPERTIES"})
_LEAST_DAYS = 7  # Delta's own minimum: a reader or writer may take so long


def lake_root(settings: LakeSettings) -> str:
    """Root of the tables: absolute where it is a local path."""
    root = "/".join(part for part in (settings.root.rstrip("/"), settings.variant) if part)
    return root if "://" in root else str(Path(root).absolute())


def shared_folder(settings: LakeSettings) -> Path:
    """Where files that are not tables lie: below `lake.artifacts`, or below the lake itself."""
    root = settings.root if settings.artifacts is None else settings.artifacts
    return Path(lake_root(settings.model_copy(update={"root": root})))


def artifacts_of(settings: LakeSettings, run_id: str) -> Path:
    """The folder of a night's files that are not tables: checkpoint, index, kept candidates."""
    return shared_folder(settings) / "_artifacts" / run_id


def open_table(root: str, table: Table, version: int | None = None) -> DeltaTable:
    """A table at a version (None: latest).

    Raises:
        TableError: it does not exist.
    """
    try:
        return DeltaTable(f"{root}/{table.name}", version=version)
    except TableNotFoundError as error:
        raise TableError(
            f"no table {table.name} under {root}; run the stage that writes it, or `python -m jobs.nightly`, or check lake.root"
        ) from error


def changes_since(root: str, table: Table, version: int) -> list[dict[str, Any]]:
    """Commits after a version, oldest first, without those of OPTIMIZE, VACUUM and properties: these change no row.

    Raises:
        TableError: the log does not go back to that version.
    """
    return _changes(_commits_since(root, table, version))


def known_changes(root: str, table: Table) -> list[dict[str, Any]]:
    """The same as far back as the table's log goes."""
    return _changes(open_table(root, table).history()[::-1])


def _changes(commits: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [commit for commit in commits if commit["operation"] not in _REARRANGING]


def _commits_since(root: str, table: Table, version: int) -> list[dict[str, Any]]:
    latest = open_table(root, table)
    commits = latest.history(latest.version() - version)[::-1] if latest.version() > version else []
    if len(commits) < latest.version() - version:
        raise TableError(
            f"the log of {table.name} under {root} goes back to version {commits[0]['version'] if commits else latest.version()}, wanted "
            f"{version}, which a night has read or written: Delta keeps it for `lake.keep_nights` days; repeat that night with --force"
        )
    return commits


def kept_days(lake: LakeSettings) -> int:
    """Days for which a version of a table can be read after it was replaced."""
    return max(_LEAST_DAYS, lake.keep_nights)


def retention_properties(lake: LakeSettings) -> dict[str, str]:
    """Properties of a table: how long Delta keeps the log of a version, and in its checkpoints the names of files to be vacuumed."""
    return dict.fromkeys(("delta.logRetentionDuration", "delta.deletedFileRetentionDuration"), f"interval {kept_days(lake)} days")


def same_rows(root: str, table: Table, version: int) -> int:
    """The newest version with the rows of this one: OPTIMIZE rewrites files, and a VACUUM long after it removes those of before.

    Raises:
        TableError: the log does not go back to that version.
    """
    rearranged = takewhile(lambda commit: commit["operation"] in _REARRANGING, _commits_since(root, table, version))
    return max((int(commit["version"]) for commit in rearranged), default=version)


def table_exists(root: str, table: Table) -> bool:
    """Whether the table has been created."""
    return DeltaTable.is_deltatable(f"{root}/{table.name}")


def check_columns(root: str, table: Table) -> None:
    """Refuse a table that an earlier version of this code made.

    Raises:
        TableError: it lacks a declared column.
    """
    found = [field.name for field in open_table(root, table).schema().fields]
    if missing := set(table.column_names) - set(found):
        raise TableError(
            f"table {table.name} under {root} lacks columns {sorted(missing)}: an earlier version of this code made it; "
            "set lake.root or lake.variant to a new place"
        )


def rows_where(
    root: str, table: Table, column: str, values: Sequence[str], columns: Sequence[str] | None = None, version: int | None = None
) -> pa.Table:
    """Rows whose column is one of the values, at a version (None: latest); files without any are skipped by their statistics."""
    dataset = open_table(root, table, None if version is None else same_rows(root, table, version)).to_pyarrow_dataset()
    return dataset.to_table(filter=ds.field(column).isin(list(values)), columns=list(columns) if columns else None)


def first_row(table: DeltaTable, columns: Sequence[str], *, run_id: str | None = None) -> dict[str, Any] | None:
    """Some row of a table, of a run if one is named, read by this thread alone; None where there is none.

    `Dataset.head` reads ahead in threads that it leaves running: a process that ends meanwhile hangs or aborts.
    """
    of_run, wanted = None, list(columns)
    if run_id is not None:
        of_run, wanted = ds.field("run_id") == run_id, list(dict.fromkeys([*columns, "run_id"]))
    for fragment in table.to_pyarrow_dataset().get_fragments(filter=of_run):
        with fragment.open() as source:
            file = pq.ParquetFile(source, pre_buffer=False)
            for group in range(file.num_row_groups):
                rows = file.read_row_group(group, columns=wanted, use_threads=False)
                if of_run is not None:
                    rows = rows.filter(of_run)
                if rows.num_rows:
                    found: dict[str, Any] = rows.select(list(columns)).slice(0, 1).to_pylist()[0]
                    return found
    return None


def neighbors_of(root: str, item_ids: Sequence[str]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """(item_id, head) -> neighbors, best first, from the current good night."""
    rows = rows_where(root, ITEM_NEIGHBORS, "item_id", item_ids, ["item_id", "head", "neighbors"]).to_pylist()
    return {(row["item_id"], row["head"]): row["neighbors"] for row in rows}


def titles_of(root: str, item_ids: Sequence[str]) -> Mapping[str, str]:
    """item_id -> title, or the id itself where there is none."""
    rows = rows_where(root, ITEM_FEATURES, "item_id", item_ids, ["item_id", "title"]).to_pylist()
    known = {row["item_id"]: row["title"] for row in rows if row["title"]}
    return {item_id: known.get(item_id, item_id) for item_id in item_ids}
