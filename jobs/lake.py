"""The lake: where a table lies, reading one version of it, replacing a part of it in one commit.

A write first selects and casts exactly the declared columns, so that a wrong frame fails here by name and not inside Delta.
"""

import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
from delta import exceptions
from delta.tables import DeltaTable
from deltalake import CommitProperties
from deltalake.exceptions import CommitFailedError
from deltalake.transaction import AddAction, RemoveAction
from pyspark.sql import Column, DataFrame, DataFrameWriter, Row, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import StructType

from conf.errors import MachineError, TableError
from conf.settings import LakeSettings
from conf.tables import Table
from features.pair_files import KnownFile
from jobs.publication import add_action, commit_properties
from jobs.reader import changes_since, check_columns, lake_root, open_table, retention_properties, same_rows, table_exists

_CONFLICTS = (exceptions.ConcurrentAppendException, exceptions.ConcurrentDeleteReadException, exceptions.ConcurrentDeleteDeleteException)
_FILE = ("path", "size_bytes")
_MOST_ATTEMPTS = 3  # of a write that meets compactions


@dataclass(frozen=True, kw_only=True)
class Lake:
    """Tables below one root, with some properties. Versions are Delta versions, from 0."""

    spark: SparkSession
    root: str
    properties: Mapping[str, str]

    def path(self, table: Table) -> str:
        """Path or URI of a table's folder."""
        return f"{self.root}/{table.name}"

    def exists(self, table: Table) -> bool:
        """Whether the table has been created."""
        return table_exists(self.root, table)

    def version(self, table: Table) -> int:
        """Latest version.

        Raises:
            TableError: the table does not exist yet.
        """
        return open_table(self.root, table).version()  # delta-rs reads the log in milliseconds, a Spark history takes half a second

    def read(self, table: Table, version: int | None = None) -> DataFrame:
        """The table at one version (None: latest).

        Raises:
            TableError: the table does not exist yet.
        """
        open_table(self.root, table)
        reader = self.spark.read.format("delta")
        if version is not None:
            reader = reader.option("versionAsOf", same_rows(self.root, table, version))
        return reader.load(self.path(table))

    def file_sizes(self, table: Table, version: int) -> dict[str, int]:
        """Bytes of each file that makes up a version, by path or URI: for tasks that read these files without Spark.

        Raises:
            TableError: the files hold deleted rows, which only a list beside them names.
        """
        found = open_table(self.root, table, same_rows(self.root, table, version))
        self._check_deletion_vectors(found, table)
        files = found.get_add_actions(flatten=True)
        return {f"{self.path(table)}/{path}": size for path, size in zip(*(files.column(name).to_pylist() for name in _FILE), strict=True)}

    def _check_deletion_vectors(self, found: Any, table: Table) -> None:
        if "deletionVectors" in (found.protocol().reader_features or []):
            raise TableError(
                f"{table.name} under {self.root} has deletion vectors, which mtmh does not read; run "
                f"ALTER TABLE delta.`{self.path(table)}` DROP FEATURE deletionVectors"
            )

    def create(self, table: Table) -> None:
        """Create an empty table with its comments, NOT NULL constraints and properties; one that is there gets the properties it lacks.

        Raises:
            TableError: it is there and lacks a declared column.
        """
        if self.exists(table):
            check_columns(self.root, table)
            found = open_table(self.root, table)
            if not self.properties.items() <= found.metadata().configuration.items():
                found.alter.set_table_properties(dict(self.properties))
            return
        builder = DeltaTable.createIfNotExists(self.spark).location(self.path(table)).comment(table.comment)
        for name, value in self.properties.items():
            builder.property(name, value)
        builder.addColumns(_schema(table)).execute()

    def replace(
        self,
        table: Table,
        frame: DataFrame,
        *,
        where: str | None = None,
        metadata: Mapping[str, object] | None = None,
    ) -> int:
        """Replace the rows that satisfy `where` (None: all) in one commit, and return its version.

        Rows are sorted by the table's layout inside each file.

        Raises:
            TableError: somebody else changed the table meanwhile; a compaction meanwhile is no change.
        """
        self.create(table)
        seen, token = self.version(table), uuid4().hex
        conformed = conform(frame, table)
        writer = _laid_out(conformed, table).write.format("delta").mode("overwrite")
        writer = writer.option("userMetadata", json.dumps(dict(metadata or {}) | {"commit": token}))
        if where is not None:
            writer = writer.option("replaceWhere", where)
        self._save(writer, table, seen)
        return self._committed(table, seen, token)

    def _committed(self, table: Table, seen: int, token: str) -> int:
        """The version of the commit with this token; without a row to replace or add there is none, and the version is as it was."""
        mine = [commit["version"] for commit in changes_since(self.root, table, seen) if token in commit.get("userMetadata", "")]
        return int(mine[0]) if mine else seen

    def _save(self, writer: DataFrameWriter, table: Table, seen: int) -> None:
        for attempt in range(_MOST_ATTEMPTS):
            try:
                writer.save(self.path(table))
                return
            except _CONFLICTS as error:
                if changes_since(self.root, table, seen) or attempt == _MOST_ATTEMPTS - 1:
                    raise _changed_meanwhile(table, self.root) from error

    def replace_by_files(self, table: Table, files: Sequence[Row], *, metadata: Mapping[str, object] | None = None) -> int:
        """Replace all rows by files that tasks have written into the table's folder, in one commit, and return its version.

        Args:
            table: exists; its files hold the declared columns.
            files: rows of `features.pair_files.FILE_SCHEMA`.
            metadata: of the commit.
        """
        target, token = open_table(self.root, table), uuid4().hex
        seen, properties = target.version(), commit_properties(dict(metadata or {}) | {"commit": token}, fenced=False)
        actions: list[AddAction | RemoveAction] = [_added(file) for file in files]
        target.create_write_transaction(actions, "overwrite", target.schema(), [], commit_properties=properties)
        return self._committed(table, seen, token)

    def exchange_files(
        self,
        table: Table,
        files: Sequence[Row],
        *,
        removed: Collection[str],
        version: int,
        metadata: Mapping[str, object] | None = None,
    ) -> int:
        """Replace some files of a version by others, in one commit, and return the version that it makes.

        The table then holds what is left of that version's files, and the new ones: a compaction meanwhile, which has put the same rows
        into other files, is undone rather than counted twice.

        Args:
            table: exists; its files hold the declared columns.
            files: rows of `features.pair_files.FILE_SCHEMA`, in the table's folder.
            removed: paths, relative to that folder, of files of the version.
            version: that the files were read at.
            metadata: of the commit.

        Raises:
            TableError: somebody else changed the table since that version, or a file is none of it.
        """
        listed = {action.path: action for action in _actions(open_table(self.root, table, version))}
        if unknown := set(removed) - set(listed):
            raise TableError(f"{table.name} version {version} under {self.root} has no files {sorted(unknown)[:3]}: a defect, report it")
        kept = {path: action for path, action in listed.items() if path not in set(removed)}
        for _ in range(_MOST_ATTEMPTS):
            target, moment, token = open_table(self.root, table), int(time.time() * 1000), uuid4().hex
            if changes_since(self.root, table, version):  # after it was opened: what comes later fails at the fence
                break
            active = {action.path: action.size for action in _actions(target)}
            actions: list[AddAction | RemoveAction] = [
                RemoveAction(path, True, moment, active[path]) for path in active.keys() - kept.keys()
            ]
            actions += [action for path, action in kept.items() if path not in active]
            actions += [_added(file) for file in files]
            if not actions:
                return target.version()
            properties = commit_properties(dict(metadata or {}) | {"commit": token}, fenced=True)
            try:
                target.create_write_transaction(actions, "append", target.schema(), [], commit_properties=properties)
            except CommitFailedError:  # somebody committed in between: look again what
                continue
            return self._committed(table, target.version(), token)
        raise _changed_meanwhile(table, self.root)

    def files(self, table: Table, version: int) -> dict[str, KnownFile]:
        """What is known of each file that makes up a version, by path or URI; its days are those of event_date.

        Raises:
            TableError: as `file_sizes`.
        """
        found = open_table(self.root, table, version)
        self._check_deletion_vectors(found, table)
        rows = pa.table(found.get_add_actions(flatten=True)).to_pylist()
        ends = ("min.event_date", "max.event_date")
        return {f"{self.path(table)}/{row['path']}": KnownFile(row["size_bytes"], *map(row.get, ends)) for row in rows}

    def restore(self, table: Table, version: int) -> None:
        """Make an earlier version the latest one, by a commit of its own; without Spark, whose session may be what has failed.

        No commit is made where only compaction came after it, which a restore would undo.
        """
        if changes_since(self.root, table, version):
            properties = CommitProperties(custom_metadata={"userMetadata": json.dumps({"stage": "restore"})})
            open_table(self.root, table).restore(version, commit_properties=properties)

    def append(self, table: Table, frame: DataFrame) -> int:
        """Add rows in one commit, and return the new version."""
        self.create(table)
        conform(frame, table).write.format("delta").mode("append").save(self.path(table))
        return self.version(table)

    def delete_where(self, table: Table, where: str) -> None:
        """Delete rows; no commit is made when none satisfies `where`."""
        DeltaTable.forPath(self.spark, self.path(table)).delete(where)


def open_lake(spark: SparkSession, settings: LakeSettings) -> Lake:
    """The lake of the settings; a local root is made absolute and must be writable.

    Raises:
        MachineError: the root cannot be created or written.
    """
    root, properties = lake_root(settings), retention_properties(settings)
    if "://" in root:
        return Lake(spark=spark, root=root, properties=properties)
    folder = Path(root)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)  # another job may have looked at the same time
    except OSError as error:
        raise MachineError(f"cannot write the lake at {folder}: {error.strerror}; set lake.root to a writable folder or URI") from error
    return Lake(spark=spark, root=str(folder), properties=properties)


@contextmanager
def in_memory(frame: DataFrame) -> Iterator[DataFrame]:
    """The frame, cached inside the block. Left so after a failure, a user's table would never change for later nights of the session."""
    cached = frame.cache()
    try:
        yield cached
    finally:
        cached.unpersist()


def _changed_meanwhile(table: Table, root: str) -> TableError:
    return TableError(
        f"somebody else changed {table.name} under {root} while this stage wrote it: is another night running on "
        "this lake? Nothing of this write was kept; run the same command again once the other one has ended"
    )


def _actions(table: Any) -> list[AddAction]:
    """What a commit would say to add each file of a table as it stands."""
    return [add_action(row) for row in pa.table(table.get_add_actions()).to_pylist()]


def _added(file: Row) -> AddAction:
    moment = int(time.time() * 1000)
    return AddAction(file["name"], file["size"], {}, modification_time=moment, data_change=True, stats=file["stats"])


def only_row(frame: DataFrame) -> dict[str, Any]:
    """The one row of an aggregate without groups."""
    row = frame.first()
    assert row is not None  # an aggregate without groups always has a row
    return dict(row.asDict())


def conform(frame: DataFrame, table: Table) -> DataFrame:
    """Exactly the declared columns with the declared types.

    Raises:
        TableError: a declared column is missing.
    """
    if missing := set(table.column_names) - set(frame.columns):
        raise TableError(f"missing columns {sorted(missing)} for table {table.name}; have {frame.columns}")
    return frame.select([_typed(column.name, column.type) for column in table.columns])


def _schema(table: Table) -> StructType:
    schema = StructType.fromDDL(table.ddl)
    assert isinstance(schema, StructType)
    return schema


def _typed(name: str, type_: str) -> Column:
    return F.col(name).cast(type_).alias(name)


def _laid_out(frame: DataFrame, table: Table) -> DataFrame:
    """Sorted inside each file; rows stay in the partition that made them, so that it costs no exchange."""
    return frame.sortWithinPartitions(*table.order_by) if table.order_by else frame
