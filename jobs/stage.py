"""A night and its stages: pinned inputs, one gate, one ledger row, and skipping what has already succeeded.

A stage is a function of a `StageRun`. It reads tables through it (each at the version this night pinned), writes through it, and
gates through it; the run notes versions and metrics on the way, so that the ledger cannot disagree with what happened.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from pathlib import Path

from pyspark.sql import DataFrame, Row, SparkSession
from rich.markup import escape

from conf.errors import TableError, machine_fault
from conf.faults import reach, while_writing
from conf.settings import Settings
from conf.tables import ITEM_NEIGHBORS, MERGE_POLICY, RUNS, Table, table_named
from jobs.arguments import Arguments, parse, report_errors
from jobs.lake import Lake, open_lake
from jobs.ledger import Ledger, StageRecord, night_fingerprint, source_state
from jobs.logs import about
from jobs.night_words import first_line
from jobs.progress import Display, spark_tasks
from jobs.reader import artifacts_of, changes_since
from jobs.session import start_session
from jobs.turns import turn
from validation.gates import GateReport, check_metrics, check_schema, raise_on_failure
from validation.suites import GateContext, rules_for

_SHARED = frozenset({MERGE_POLICY.name, ITEM_NEIGHBORS.name})
"""Tables that are not a night's own: always read at their latest version."""


@dataclass(frozen=True, kw_only=True)
class Night:
    """One run date under one fingerprint of settings, code and sources. The same inputs give the same run id.

    `now` only decides what counts as the future; `publish` lets a night older than the published one replace it; `accept` is the reason
    why critical expectations that fail do not stop it.
    """

    settings: Settings
    run_date: date
    run_id: str
    fingerprint: str
    lake: Lake
    ledger: Ledger
    display: Display
    now: datetime
    publish: bool = False
    accept: str | None = None

    @property
    def spark(self) -> SparkSession:
        """The session of the lake."""
        return self.lake.spark

    def pinned_version(self, table: Table) -> int:
        """The version this night reads: what it wrote itself, else what the newest good run wrote.

        Raises:
            TableError: no run has written the table.
        """
        if table.name in _SHARED:
            return self.lake.version(table)
        written = [record for record in self.ledger.records(status="succeeded", run_id=self.run_id) if table.name in record.output_versions]
        version = written[-1].output_versions[table.name] if written else self.last_good_version(table)
        if version is None:
            raise TableError(f"no run has written {table.name} yet; run the stage before, or `python -m jobs.nightly`")
        return version

    def last_good_version(self, table: Table) -> int | None:
        """The version that the newest good run wrote; None if there is none."""
        written = [record for record in self.ledger.records(status="succeeded") if table.name in record.output_versions]
        return written[-1].output_versions[table.name] if written else None

    def artifacts(self, name: str) -> Path:
        """A folder for files of this night that are not tables: checkpoints, indexes."""
        folder = artifacts_of(self.settings.lake, self.run_id) / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def report_path(self) -> Path:
        """Where the page about this night lies once `nightly` has ended."""
        return artifacts_of(self.settings.lake, self.run_id) / "report.html"


@dataclass(frozen=True)
class FileChanges:
    """Files written for tables, rows of `features.pair_files.FILE_SCHEMA`, and by kind the paths of those replaced, of the versions of the
    tables by name; None: all files are.
    """

    files: Sequence[Row]
    removed: Mapping[str, Collection[str]] | None = None
    versions: Mapping[str, int] = field(default_factory=dict)


@dataclass(kw_only=True)
class StageRun:
    """One attempt at one stage; collects what the ledger row will say. `force` asks for a run that builds on no earlier one."""

    night: Night
    stage: str
    force: bool = False
    inputs: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    report: GateReport | None = None
    _before: dict[str, int | None] = field(default_factory=dict)

    @property
    def settings(self) -> Settings:
        """The night's settings."""
        return self.night.settings

    @property
    def run_date(self) -> date:
        """The night's date."""
        return self.night.run_date

    def version(self, table: Table) -> int:
        """Pin a table and note it as an input."""
        self.inputs[table.name] = self.night.pinned_version(table)
        return self.inputs[table.name]

    def read(self, table: Table) -> DataFrame:
        """A table at the version this night pinned."""
        return self.night.lake.read(table, self.version(table))

    def read_output(self, table: Table) -> DataFrame:
        """What this stage has just written."""
        return self.night.lake.read(table, self.outputs[table.name])

    def replace(self, table: Table, frame: DataFrame, *, where: str | None = None) -> None:
        """Replace rows of a table in one commit, after a check of the frame's columns and types; see `Lake.replace`."""
        check_schema(frame.dtypes, table)
        if where is not None and not table.kept_on_failure:
            self._put_back(table)
        lake, metadata = self.night.lake, self.metadata
        self.write(table, lambda: lake.replace(table, frame, where=where, metadata=metadata))

    def write(self, table: Table, write: Callable[[], int]) -> None:
        """Write a table by a function that commits, and returns the version of its commit."""
        lake, point = self.night.lake, f"{self.stage}.{table.name}"
        self._before.setdefault(table.name, lake.version(table) if lake.exists(table) else None)
        with while_writing(f"{point}.writing", lake.path(table)):
            self.outputs[table.name] = write()
        reach(f"{point}.written")

    @property
    def metadata(self) -> dict[str, object]:
        """What every commit of this stage says of itself."""
        return {"run_id": self.night.run_id, "stage": self.stage}

    def _put_back(self, table: Table) -> None:
        """Undo what a night that was killed left in a table of which this one keeps a part; what others changed, stays."""
        lake = self.night.lake
        if lake.exists(table):
            good = self.night.last_good_version(table) or 0
            try:
                changes = changes_since(lake.root, table, good)
            except TableError as error:
                self.note(f"what a killed night may have left in {table.name} is not looked for: {error}")
                return
            if all('"stage"' in commit.get("userMetadata", "") for commit in changes):
                lake.restore(table, good)

    def replace_by_files(self, tables: Mapping[str, Table], write: "Callable[[dict[str, str]], FileChanges]") -> None:
        """Replace files of tables by files that `write` puts there; see `Lake.replace_by_files` and `Lake.exchange_files`.

        Args:
            tables: by the kind that a file's row names.
            write: given the folder of each kind; says what it has written.
        """
        lake, metadata = self.night.lake, self.metadata
        for table in tables.values():
            self._before.setdefault(table.name, lake.version(table) if lake.exists(table) else None)
            lake.create(table)
        with ExitStack() as writing:
            for table in tables.values():
                writing.enter_context(while_writing(f"{self.stage}.{table.name}.writing", lake.path(table)))
            changes = write({kind: lake.path(table) for kind, table in tables.items()})
        for kind, table in tables.items():
            found = [file for file in changes.files if file["kind"] == kind]
            if changes.removed is None:
                self.outputs[table.name] = lake.replace_by_files(table, found, metadata=metadata)
            else:
                gone, version = changes.removed[kind], changes.versions[table.name]
                written = lake.exchange_files(table, found, removed=gone, version=version, metadata=metadata)
                self.outputs[table.name] = written
            reach(f"{self.stage}.{table.name}.written")

    def take_back(self) -> None:
        """Restore what this stage has written, after it failed: readers of the latest version then see the last good one.

        No night ever reads what a failed stage wrote, so that a restore that fails, too, does no harm to later ones.
        """
        for name, version in self._before.items():
            table = table_named(name)
            if not table.kept_on_failure and self.night.lake.exists(table):
                self.night.lake.restore(table, version or 0)  # version 0 is the table as created, without a row

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Keep the seconds that a part of the stage takes, as metric `seconds_<part>`."""
        begin = time.monotonic()
        yield
        self.metrics[f"seconds_{part}"] = time.monotonic() - begin

    def note(self, text: str) -> None:
        """Tell the reader of `runs`, and of the terminal, something worth knowing."""
        self.notes.append(text)
        level = "warning" if text.startswith(("warning", "accepted")) else "info"
        self.night.display.say(f"  [dim]note: {escape(text)}[/dim]", level=level)

    def gate(self, metrics: Mapping[str, float], **context: float) -> None:
        """Check the stage's numbers against its rules.

        Raises:
            GateError: a critical rule failed.
            BrokenGateError: a rule could not be checked.
        """
        self.metrics.update({name: float(value) for name, value in metrics.items()})
        past = self.night.ledger.metrics_before(self.run_date, stage=self.stage, settings_fingerprint=self.settings.fingerprint())
        rules = rules_for(self.stage, GateContext(gates=self.settings.gates, source=self.settings.source, past=past, values=dict(context)))
        self.report = check_metrics(self.stage, self.metrics, rules)
        for warning in self.report.warnings:
            self.note(f"warning: {warning}")
        if self.night.accept is not None and self.report.failures:
            self.accept(self.report, self.night.accept)
        else:
            raise_on_failure(self.report)

    def accept(self, report: GateReport, reason: str) -> None:
        """Go on although expectations failed, and keep in `runs` which and why; a check that is broken still stops the stage."""
        for failure in report.failures:
            self.note(f"accepted ({reason}): {failure}")
        raise_on_failure(GateReport(stage=report.stage, results=tuple(report.broken)))


Stage = Callable[[StageRun], None]
Stands = Callable[["Night"], bool]
"""Whether what a stage has left beside the tables is still there, as far as it left anything."""


def open_night(arguments: Arguments, *, stage: str) -> Night:
    """Start the session, open the lake and identify the night."""
    settings = arguments.settings
    spark = start_session(settings.spark, app_name=f"mtmh {settings.name} {stage} {arguments.run_date}")
    night = make_night(settings, arguments.run_date, spark=spark, display=Display(), publish=arguments.publish)
    return replace(night, accept=arguments.accept)


def make_night(
    settings: Settings, run_date: date, *, spark: SparkSession, display: Display, now: datetime | None = None, publish: bool = False
) -> Night:
    """Identify a night on a running session; `now` defaults to the clock."""
    lake = open_lake(spark, settings.lake)
    states = [source_state(lake, source) for source in settings.source.tables.values()]
    fingerprint = night_fingerprint(settings, states, {"run_date": run_date.isoformat()})
    return Night(
        settings=settings,
        run_date=run_date,
        run_id=f"{run_date}-{fingerprint[:8]}",
        fingerprint=fingerprint,
        lake=lake,
        ledger=Ledger(root=lake.root),
        display=display,
        now=now or datetime.now(UTC),
        publish=publish,
    )


def finished(night: Night, stage: str, *, stands: Stands | None = None) -> StageRecord | None:
    """The record of this stage's success in this night, if every table it read is still pinned at the version it read, and what it has
    left elsewhere stands.
    """
    record = night.ledger.last_success(run_id=night.run_id, stage=stage)
    if record is None:
        return None
    reread = {name: version for name, version in record.input_versions.items() if name != ITEM_NEIGHBORS.name}
    unchanged = all(night.pinned_version(table_named(name)) == version for name, version in reread.items())
    return record if unchanged and (stands is None or stands(night)) else None


def run_stage(night: Night, stage: str, function: Stage, *, stands: Stands | None = None, force: bool = False) -> StageRecord:
    """Run a stage unless it has succeeded with the same inputs; write its ledger row, also when it fails."""
    if not force and (done := finished(night, stage, stands=stands)) is not None:
        night.display.say(f"[green]✓[/green] {stage}: done before, {done.seconds:.0f} s, attempt {done.attempt}")
        return done
    with about(run_id=night.run_id, stage=stage):
        return _attempt(night, stage, function, force=force)


def _attempt(night: Night, stage: str, function: Stage, *, force: bool) -> StageRecord:
    night.display.say(f"[bold]▶ {stage}[/bold]")
    night.lake.create(RUNS)
    run = StageRun(night=night, stage=stage, force=force)
    started, clock = datetime.now(UTC), time.monotonic()
    try:
        reach(f"{stage}.started")
        with night.display.watch(stage, spark_tasks(night.spark)):
            function(run)
    except BaseException as error:
        try:
            run.take_back()
        except Exception as trouble:
            run.note(f"could not take back what the stage wrote; later nights do not read it: {str(trouble).splitlines()[0]}")
        seconds = time.monotonic() - clock
        _append_failure(run, started, seconds, error)
        why = escape(first_line(f"{type(error).__name__}: {error}"))
        night.display.say(f"[red]✗[/red] {stage}: failed after {seconds:.0f} s: {why}", level="error")
        if (explained := machine_fault(error, night.lake.root)) is not None:
            raise explained from error
        raise
    record = _record(run, started, time.monotonic() - clock, None)
    reach(f"{stage}.done")
    night.ledger.append(record)
    reach(f"{stage}.recorded")
    night.display.say(f"[green]✓[/green] {stage}: {record.seconds:.0f} s")
    return record


def _append_failure(run: StageRun, started: datetime, seconds: float, error: BaseException) -> None:
    """Write the row of a failure; where that fails, too, the failure itself is what the user must see."""
    try:
        run.night.ledger.append(_record(run, started, seconds, error))
    except Exception as trouble:
        run.note(f"the failure could not be written to the table runs: {str(trouble).splitlines()[0]}")


def _record(run: StageRun, started: datetime, seconds: float, error: BaseException | None) -> StageRecord:
    night = run.night
    attempt = 1 + len(night.ledger.records(run_id=night.run_id, stage=run.stage))
    return StageRecord(
        run_id=night.run_id,
        run_date=night.run_date,
        stage=run.stage,
        attempt=attempt,
        status="succeeded" if error is None else "failed",
        started_at=started,
        ended_at=datetime.now(UTC),
        seconds=seconds,
        input_versions=run.inputs,
        output_versions=run.outputs,
        fingerprint=night.fingerprint,
        settings_fingerprint=night.settings.fingerprint(),
        metrics=run.metrics,
        gates=run.report.to_json() if run.report is not None else None,
        notes=run.notes,
        error=f"{type(error).__name__}: {error}"[:4000] if error is not None else None,
        report=str(night.report_path),
    )


def stage_main(stage: str, function: Stage, *, description: str, stands: Stands | None = None, argv: Sequence[str] | None = None) -> None:
    """The main of a job file that holds one stage."""

    def main() -> None:
        arguments = parse(argv, description=description)
        night = open_night(arguments, stage=stage)
        if arguments.plan:
            done = finished(night, stage, stands=stands)
            print(f"{night.run_id} {stage}: {'done' if done else 'to do'}")
            return
        with turn(arguments.settings.lake, f"{stage} of {night.run_id}"):
            run_stage(night, stage, function, stands=stands, force=arguments.force)

    report_errors(main)
