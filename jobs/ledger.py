"""The ledger of runs: which stage of which night succeeded, with which versions, so that a night can be resumed and reproduced."""

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, date, datetime
from importlib import resources
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable, write_deltalake
from deltalake.exceptions import DeltaError
from py4j.protocol import Py4JJavaError

from conf.errors import SourceError
from conf.settings import Settings, SourceTable
from conf.tables import RUNS
from jobs.lake import Lake
from jobs.reader import check_columns, open_table, table_exists

_CODE = ("conf", "features", "models", "validation", "jobs")


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """A row of `runs`."""

    run_id: str
    run_date: date
    stage: str
    attempt: int
    status: str
    started_at: datetime
    ended_at: datetime
    seconds: float
    input_versions: dict[str, int]
    output_versions: dict[str, int]
    fingerprint: str
    settings_fingerprint: str
    metrics: dict[str, float]
    gates: str | None = None
    notes: list[str] = field(default_factory=list)
    error: str | None = None
    report: str | None = None


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Reads and appends `runs`, without Spark: a failure is recorded even when the session has died."""

    root: str

    def append(self, record: StageRecord) -> None:
        """Write one row; the table must have been created."""
        table = open_table(self.root, RUNS)
        written = pc.max(table.to_pyarrow_table(columns=["sequence"])["sequence"]).as_py()
        row = asdict(record) | {"sequence": 1 + (written or 0)}
        write_deltalake(table, pa.Table.from_pylist([row], schema=pa.schema(table.schema().to_arrow())), mode="append")

    def records(self, **equal: object) -> list[StageRecord]:
        """Rows whose columns equal the arguments, in the order in which they were written, whatever the clock said."""
        if not table_exists(self.root, RUNS):
            return []
        check_columns(self.root, RUNS)
        rows = open_table(self.root, RUNS).to_pyarrow_table().sort_by([("sequence", "ascending"), ("ended_at", "ascending")]).to_pylist()
        return [_record(row) for row in rows if all(row[column] == value for column, value in equal.items())]

    def metrics_before(self, run_date: date, *, stage: str, settings_fingerprint: str) -> list[dict[str, float]]:
        """Metrics of the good nights before a date, oldest date first, whenever they ran; of one that was repeated, its last words.

        Nights of other settings do not count: a slice of the users, or another window, has volumes of its own.
        """
        alike = self.records(stage=stage, status="succeeded", settings_fingerprint=settings_fingerprint)
        nights = {record.run_date: record.metrics for record in alike if record.run_date < run_date}
        return [nights[day] for day in sorted(nights)]

    def last_success(self, **equal: object) -> StageRecord | None:
        """The newest succeeded row among `records`."""
        found = self.records(status="succeeded", **equal)
        return found[-1] if found else None


@dataclass(kw_only=True)
class Attempt:
    """What a job without Spark collects for its row."""

    inputs: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    gates: str | None = None
    notes: list[str] = field(default_factory=list)


@contextmanager
def recorded(ledger: Ledger, stage: str, *, run_id: str, run_date: date, like: StageRecord) -> Iterator[Attempt]:
    """Write a row of `runs` at the end of the block, also when it fails; fingerprints are those of the run that it builds on."""
    attempt, started, clock = Attempt(), datetime.now(UTC), time.monotonic()

    def write(error: BaseException | None) -> None:
        record = StageRecord(
            run_id=run_id,
            run_date=run_date,
            stage=stage,
            attempt=1 + len(ledger.records(run_id=run_id, stage=stage)),
            status="succeeded" if error is None else "failed",
            started_at=started,
            ended_at=datetime.now(UTC),
            seconds=time.monotonic() - clock,
            input_versions=attempt.inputs,
            output_versions=attempt.outputs,
            fingerprint=like.fingerprint,
            settings_fingerprint=like.settings_fingerprint,
            metrics=attempt.metrics,
            gates=attempt.gates,
            notes=attempt.notes,
            error=None if error is None else f"{type(error).__name__}: {error}"[:4000],
        )
        ledger.append(record)

    try:
        yield attempt
    except BaseException as error:
        try:
            write(error)
        except Exception as trouble:
            error.add_note(f"the failure could not be written to the table runs: {trouble}")  # it is what the user must see
        raise
    write(None)


def _record(row: dict[str, Any]) -> StageRecord:
    maps = {name: dict(row[name]) for name in ("input_versions", "output_versions", "metrics")}
    content = {name: value for name, value in row.items() if name != "sequence"}
    return StageRecord(**content | maps | {"notes": row["notes"] or []})


def code_fingerprint(packages: Sequence[str] = _CODE) -> str:
    """Hash of all modules and settings files of some packages (all), in a checkout or in a zip."""
    digest = hashlib.sha256()
    for package in packages:
        for entry in sorted(resources.files(package).iterdir(), key=lambda entry: entry.name):
            if entry.name.endswith((".py", ".yaml")):
                digest.update(entry.name.encode() + entry.read_bytes())
    return digest.hexdigest()[:16]


def source_state(lake: Lake, source: SourceTable) -> str:
    """What identifies a source's content: its Delta version, or name, size and time of every file below its path (or paths: a glob).

    Raises:
        SourceError: the path cannot be listed.
    """
    try:
        if source.format == "delta":
            return f"{source.path}@{DeltaTable(source.path).version()}" if DeltaTable.is_deltatable(source.path) else ""
        return "\n".join(sorted(_listing(lake, source.path)))
    except (Py4JJavaError, DeltaError, OSError) as error:
        reason = str(error.java_exception) if isinstance(error, Py4JJavaError) else str(error)
        advice = "check the path, its permissions, and that the jars of its scheme are there"
        raise SourceError(f"cannot list {source.path}: {reason.splitlines()[0]}; {advice}") from error


def _listing(lake: Lake, path: str) -> Iterable[str]:
    jvm: Any = lake.spark._jvm  # Hadoop's file system: the one listing that works for every URI Spark can read
    root = jvm.org.apache.hadoop.fs.Path(path)
    file_system = root.getFileSystem(lake.spark._jsparkSession.sessionState().newHadoopConf())
    for match in file_system.globStatus(root) or ():
        files = file_system.listFiles(match.getPath(), True)
        while files.hasNext():
            status = files.next()
            if not status.getPath().getName().startswith(("_", ".")):
                yield f"{status.getPath()} {status.getLen()} {status.getModificationTime()}"


def night_fingerprint(settings: Settings, states: Iterable[str], extra: Mapping[str, str]) -> str:
    """Hash of settings, code and sources: equal fingerprints mean equal tables."""
    parts = [settings.fingerprint(), code_fingerprint(), *states, json.dumps(dict(extra), sort_keys=True)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
