"""The whole night for one run date: every stage in order, resumed after the last good one; nothing is published if a gate fails."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from jobs.alerts import alert
from jobs.arguments import parse, report_errors
from jobs.build_features import build_features
from jobs.build_pairs import build_pairs
from jobs.evaluate import evaluate
from jobs.ingest import checked_sources, ingest
from jobs.ledger import StageRecord
from jobs.logs import about
from jobs.night_report import write_report
from jobs.publish_neighbors import publish_neighbors
from jobs.publish_online import online_stands, publish_online
from jobs.stage import Night, Stage, StageRun, Stands, finished, open_night, run_stage
from jobs.train_model import model_stands, train_model
from jobs.turns import turn
from validation.suites import format_number

STAGES: Mapping[str, Stage] = {
    "ingest": ingest,
    "build_pairs": build_pairs,
    "build_features": build_features,
    "train_model": train_model,
    "publish_neighbors": publish_neighbors,
    "publish_online": publish_online,
    "evaluate": evaluate,
}
_STANDS: Mapping[str, Stands] = {"train_model": model_stands, "publish_online": online_stands}


def run_night(night: Night, *, force: bool = False) -> list[StageRecord]:
    """Run every stage that has not succeeded yet in this night, and report on it however it ends."""
    records = list[StageRecord]()
    with about(run_id=night.run_id), turn(night.settings.lake, night.run_id):
        night.display.say(f"[bold]night {night.run_date}[/bold], run {night.run_id}, lake {night.lake.root}")
        try:
            _run_stages(night, records, force=force)
        except Exception as error:
            what = {"run_id": night.run_id, "run_date": night.run_date.isoformat(), "stage": list(STAGES)[len(records)]}
            text = {"error": f"{type(error).__name__}: {error}"[:4000], "report": str(night.report_path)}
            alert(night.settings.alerts, what | text, say=night.display.say)
            raise
    return records


def _run_stages(night: Night, records: list[StageRecord], *, force: bool) -> None:
    try:
        for name, stage in STAGES.items():
            records.append(run_stage(night, name, stage, stands=_STANDS.get(name), force=force))
    finally:
        _report(night)


def _report(night: Night) -> None:
    """Write the night's page. A night is what it is without it: trouble here must hide neither its success nor why it failed."""
    try:
        night.display.say(f"report: {write_report(night, list(STAGES))}")
    except Exception as trouble:
        night.display.say(f"[red]no report was written[/red]: {type(trouble).__name__}: {escape(str(trouble))}")


def plan_sources(night: Night) -> RichTable:
    """The tables that `run_night` would read, and their columns; no row is looked at.

    Raises:
        SourceError: a source or a mapped column is missing, or of an unusable type.
    """
    checked = checked_sources(StageRun(night=night, stage="ingest"))
    table = RichTable("source", "path", "files", "columns", title="your tables", title_justify="left")
    for name, source in night.settings.source.tables.items():
        mapped = {ours: theirs for ours, theirs in source.model_dump()["columns"].items() if theirs}
        columns = ", ".join(f"{ours}: {', '.join(theirs) if isinstance(theirs, list) else theirs}" for ours, theirs in mapped.items())
        table.add_row(name, f"{source.path} ({source.format})", f"{len(checked[name].inputFiles()):,}", columns)
    return table


def plan(night: Night, *, force: bool = False) -> RichTable:
    """What `run_night` would do: stages with their state, versions and last duration."""
    table = RichTable("stage", "state", "last took", "read last", title=f"plan of {night.run_id}", title_justify="left")
    waiting = force
    for name in STAGES:
        done = None if waiting else finished(night, name, stands=_STANDS.get(name))
        waiting = waiting or done is None
        last = night.ledger.last_success(stage=name)
        reads = ", ".join(f"{table}@{version}" for table, version in sorted(last.input_versions.items())) if last else ""
        table.add_row(name, "done" if done else "to do", f"{last.seconds:.0f} s" if last else "", reads)
    return table


_SHOWN = {
    "ingest": ("num_engagements", "num_items", "num_rejected_events", "num_rejected_items"),
    "build_pairs": ("num_daily_rows", "num_pairs"),
    "build_features": ("num_items", "num_examples"),
    "train_model": ("final_loss",),
    "publish_neighbors": ("num_items", "coverage", "fullness", "churn"),
    "publish_online": ("num_items_written",),
    "evaluate": ("num_triggers",),
}


def summary(records: Sequence[StageRecord]) -> RichTable:
    """A table of a night's stages: time and main volumes."""
    table = RichTable("stage", "seconds", "volumes", title="the night", title_justify="left")
    for record in records:
        shown = [f"{name} {format_number(record.metrics[name])}" for name in _SHOWN[record.stage] if name in record.metrics]
        table.add_row(record.stage, f"{record.seconds:,.0f}", ", ".join(shown))
    table.add_row("total", f"{sum(record.seconds for record in records):,.0f}", "")
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Run or plan a night, or each night of a range: finished ones are passed over, and the first that fails ends it."""

    def run() -> None:
        arguments = parse(argv, description="one whole night", ranged=True)
        for number in range((arguments.last_date - arguments.run_date).days + 1):
            night = open_night(replace(arguments, run_date=arguments.run_date + timedelta(days=number)), stage="nightly")
            if arguments.plan:
                Console().print(plan_sources(night), plan(night, force=arguments.force))
                continue
            records = run_night(night, force=arguments.force)
            Console().print(summary(records))

    report_errors(run)


if __name__ == "__main__":
    main()
