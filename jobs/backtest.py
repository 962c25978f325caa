"""`make backtest CONFIG=demo`: trains as of past days with the judges' fields withheld, and judges the lists by what happened since.

The last share of engagements is the last slice, the one before it the validation slice, and so on. Settings (of the baselines, and which
mix) are chosen on validation slices; the last one is read by `--final` only, and every report says how often that has been done.
Everything lies in the lake's variant `backtest`, and nothing is published.

In time, on the demo data: the last tenth of 2017's engagements is about the last five weeks, which makes the final cut; settings are
chosen at the cut a tenth of the rest before it.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from functools import partial
from pathlib import Path

from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from rich.console import Console

from conf.errors import SettingsError, SourceError
from conf.settings import Settings
from conf.tables import ENGAGEMENTS
from features.engagements import accepted_events
from features.pairs import engagements_per_day, holdout_start
from jobs.arguments import add_config, report_errors, settings_of
from jobs.backtest_lists import backtest_lake
from jobs.backtest_report import REPORTS, summary_words, terminal_tables, write_html, write_json
from jobs.backtest_results import FINAL, VALIDATION, Report
from jobs.backtest_verdict import Verdict, make_report
from jobs.demo_source import lay_source
from jobs.ingest import checked_events, ingest
from jobs.judge_cut import judge_cut
from jobs.leaks import TRAINING, check_leaks
from jobs.progress import Display
from jobs.session import start_session
from jobs.stage import Night, StageRun, make_night, run_stage
from jobs.turns import turn
from jobs.verdicts import choose
from models.contest import Tuned

_FILE_COLUMNS = 150


def backtest_settings(settings: Settings) -> Settings:
    """The settings of a backtest: a lake variant of its own, and the judges' fields withheld from the model."""
    withheld = sorted({*settings.features.judge_fields, *settings.backtest.judge_fields})
    changes = {
        "lake": backtest_lake(settings.lake),
        "features": settings.features.model_copy(update={"judge_fields": withheld}),
    }
    return settings.model_copy(update=changes)


@dataclass(frozen=True, kw_only=True)
class Backtest:
    """One backtest on a running session."""

    settings: Settings
    spark: SparkSession
    display: Display
    now: datetime

    def night(self, run_date: date) -> Night:
        """The night of a cut."""
        return make_night(self.settings, run_date, spark=self.spark, display=self.display, now=self.now)

    def run(self, *, final: bool) -> Report:
        """Judge the validation slices, and the last one if `final`.

        Raises:
            SourceError: there is nothing to split.
        """
        started = time.monotonic()
        *validation, last = self.cuts()
        verdicts: list[Verdict] = []
        tuned: Tuned | None = None
        for cut, until in validation:
            verdicts.append(self._judge(cut, until, stage=VALIDATION, last_cut=last[0], tuned=None))
            tuned = verdicts[-1].tuned
        choice = choose([verdict.board for verdict in verdicts])
        if final:
            verdicts.append(self._judge(*last, stage=FINAL, last_cut=last[0], tuned=tuned))
        reports = [make_report(verdict, choice, self.settings, minutes=(time.monotonic() - started) / 60) for verdict in verdicts]
        for report in reports:
            write_html(report, self.night(report.cut).report_path)  # where `runs.report` says it is
        return reports[-1]

    def check_leaks(self) -> Mapping[str, int]:
        """Train the first cut twice, the second time with the judges' fields permuted.

        Raises:
            GateError: something of them reaches the model.
            SettingsError: no judge withholds anything, so there is nothing to leak.
        """
        fields = self.settings.features.judge_fields
        if not fields:
            raise SettingsError(f"no judge of {self.settings.name} withholds anything: there is nothing to leak; see backtest.judges")
        return check_leaks(self.trained_cold(self.cuts()[0][0]), fields)

    def trained_cold(self, cut: date) -> Night:
        """The night of a cut, trained from nothing, as one must be with which another such training is compared."""
        training = self.settings.training.model_copy(update={"warm_start_days": 0})
        return self.with_settings(self.settings.model_copy(update={"training": training}))._trained(cut)

    def with_settings(self, settings: Settings) -> "Backtest":
        """The same, in the same lake, under other settings."""
        return replace(self, settings=settings)

    def cuts(self) -> list[tuple[date, date]]:
        """(cut, last day of its slice), the last slice last."""
        until = self._last_day()
        whole = self.night(until)
        run_stage(whole, "ingest", ingest)
        engagements = engagements_per_day(StageRun(night=whole, stage="backtest").read(ENGAGEMENTS))
        cuts: list[tuple[date, date]] = []
        for _ in range(1 + self.settings.backtest.num_validation_cuts):
            cut = self._cut(engagements, until)
            cuts.insert(0, (cut, until))
            until = cut
        for cut, end in cuts:
            self.display.say(f"slice {cut + timedelta(days=1)} to {end}, cut {cut}")
        return cuts

    def _cut(self, engagements: Mapping[date, int], until: date) -> date:
        share = self.settings.backtest.slice_share
        cut = holdout_start(engagements, holdout_share=share, run_date=until) - timedelta(days=1)
        if min(engagements) > cut:
            raise SourceError(f"no engagements up to {cut}, so that nothing can be learned before the slice that ends on {until}; "
                              "bring more days of history, or lower backtest.slice_share or backtest.num_validation_cuts")  # fmt: skip
        return cut

    def _last_day(self) -> date:
        """The last day with an accepted engagement."""
        today = self.now.date()
        probe = StageRun(night=self.night(today), stage="backtest")
        accepted = accepted_events(checked_events(probe), source=self.settings.source.events)
        row = accepted.agg(F.max("event_date").alias("day")).first()
        if row is None or row["day"] is None:
            raise SourceError("no usable engagement in the events table; check source.events.columns and rejected rows")
        day: date = row["day"]
        return day

    def _judge(self, cut: date, until: date, *, stage: str, last_cut: date, tuned: Tuned | None) -> Verdict:
        before = self._trained(cut - timedelta(days=1)) if self.settings.backtest.churn else None
        night = self._trained(cut)
        found: list[Verdict] = []
        judge = partial(judge_cut, until=until, last_cut=last_cut, tuned=tuned, before=before, found=found)
        run_stage(night, stage, judge, force=True)
        return found[0]

    def _trained(self, cut: date) -> Night:
        night = self.night(cut)
        self.display.say(f"[bold]as of {cut}[/bold], run {night.run_id}, lake {night.lake.root}")
        for name, function in TRAINING.items():
            run_stage(night, name, function)
        return night


def _console() -> Console:
    """The terminal; a file has no width, and these tables need some."""
    console = Console()
    return console if console.is_terminal else Console(width=_FILE_COLUMNS)


def show(report: Report, console: Console) -> None:
    """Print tables and summary; write numbers and page below `var/backtest`."""
    for table in terminal_tables(report):
        console.print(table)
    for paragraph in summary_words(report):
        console.print(paragraph, markup=False, highlight=False)
    REPORTS.mkdir(parents=True, exist_ok=True)
    names = [report.config, *([f"{report.config}-final"] if report.final else [])]  # which a later validation report leaves alone
    for name in names:
        write_json(report, REPORTS / f"{name}.json")
        write_html(report, REPORTS / f"{name}.html")
    page, numbers = (REPORTS / f"{names[-1]}.{suffix}" for suffix in ("html", "json"))
    console.print(f"report: {page}, numbers: {numbers}", highlight=False, soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a backtest and write its report."""
    parser = argparse.ArgumentParser(description="lists of past days, judged by what happened since")
    add_config(parser, default="demo")
    parser.add_argument("--check-leaks", action="store_true", help="train twice, judges' fields permuted: the model must not change")
    parser.add_argument("--final", action="store_true", help="read the last slice too; every report says how often it was read")

    def run() -> None:
        values = parser.parse_args(argv)
        settings = backtest_settings(settings_of(values))
        console, display = _console(), Display()
        if settings.name == "demo":
            lay_source(Path(settings.source.events.path).parent)
        spark = start_session(settings.spark, app_name=f"mtmh backtest {settings.name}")
        backtest = Backtest(settings=settings, spark=spark, display=display, now=datetime.now(UTC))
        with turn(settings.lake, "a backtest"):
            if values.check_leaks:
                compared = ", ".join(f"{count:,} rows of {name}" for name, count in backtest.check_leaks().items())
                fields = ", ".join(settings.features.judge_fields)
                console.print(f"no leak: with {fields} permuted, {compared} are the same", highlight=False, markup=False, soft_wrap=True)
                return
            show(backtest.run(final=values.final), console)

    report_errors(run)


if __name__ == "__main__":
    main()
