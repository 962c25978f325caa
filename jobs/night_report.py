"""The report of a night: one HTML file that needs nothing else, written when `nightly` ends, also if it ends by a failure.

Everything is read from the ledger and from tables without Spark, whose session may be what has failed.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from conf.errors import TableError
from conf.faults import reach
from conf.settings import Settings
from conf.tables import EVALUATION, ITEM_NEIGHBORS, MERGE_POLICY
from jobs import pages
from jobs.backtest_page import CAPTION, table
from jobs.backtest_picture import frontier_svg
from jobs.backtest_report import REPORTS, read_json
from jobs.backtest_results import SAME_SOURCE, Report, Row
from jobs.backtest_tables import headline, measures
from jobs.explorer import catalog
from jobs.explorer.catalog import Catalog
from jobs.ledger import StageRecord, code_fingerprint
from jobs.night_lists import NightLists
from jobs.night_picture import curves_svg
from jobs.night_words import SLICE_COLUMNS, TALLY, first_line, listed, meaning_of
from jobs.reader import open_table, rows_where, table_exists
from jobs.stage import Night
from models.merge import DEFAULT_SCOPE
from validation.suites import format_number

_NOT_SWEPT = ("relevance_share", "new_pair_bonus", "new_item_bonus")  # a backtest's mixes have none of them
_SECRET = re.compile(r"secret|passw|token|credential|key", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One expectation of a gate and what it met."""

    stage: str
    metric: str
    found: str
    wanted: str
    meaning: str
    state: str  # held, failed, warning or broken


@dataclass(frozen=True, kw_only=True)
class NightReport:
    """What the page says, gathered; see pages/night.html."""

    night: Night
    stages: Sequence[str]
    records: Sequence[StageRecord]

    @classmethod
    def of(cls, night: Night, stages: Sequence[str]) -> "NightReport":
        """The latest attempt of each stage of a night."""
        latest = {record.stage: record for record in night.ledger.records(run_id=night.run_id)}
        return cls(night=night, stages=stages, records=[latest[stage] for stage in stages if stage in latest])

    @property
    def failed(self) -> StageRecord | None:
        """The stage that ended the night, if one did."""
        return next((record for record in self.records if record.status == "failed"), None)

    @property
    def published(self) -> bool:
        """Whether this night's lists became the current ones."""
        return any(ITEM_NEIGHBORS.name in record.output_versions for record in self.records if record.status == "succeeded")

    @property
    def verdict(self) -> str:
        """The outcome in a few words, for the title."""
        failed = self.failed
        if self.published:
            return f"published, then failed at {failed.stage}" if failed else "published"
        return f"not published: {failed.stage} failed" if failed else "not published"

    @property
    def why(self) -> list[str]:
        """The outcome in sentences, the decisive one first."""
        failed, warnings = self.failed, [check for check in self.checks if check.state == "warning"]
        said = []
        if failed and failed.error:
            said.append(f"{failed.stage}: {first_line(failed.error)}.")
        elif self.published:
            said.append(f"All {len(self.checks) - len(warnings)} critical expectations of the gates held.")
        elif "publish_neighbors" not in {record.stage for record in self.records}:
            said.append("The stage publish_neighbors was not run.")
        if not self.published:
            before = self.published_before
            said.append(f"The lists of {before.run_date} stay the current ones." if before else "No lists were published before either.")
        if warnings:
            said.append(f"Warnings: {listed([f'{check.stage} {check.metric}' for check in warnings])}.")
        return said

    @property
    def notes(self) -> list[tuple[str, str]]:
        """What stages had to say, warnings of gates apart."""
        return [(record.stage, note) for record in self.records for note in record.notes if not note.startswith("warning: ")]

    @property
    def published_before(self) -> StageRecord | None:
        """The publication that this night's lists are compared with."""
        rows = self.night.ledger.records(stage="publish_neighbors")
        mine = [place for place, record in enumerate(rows) if record.run_id == self.night.run_id]
        earlier = [
            record
            for record in rows[: mine[-1] if mine else None]
            if record.run_id != self.night.run_id and record.status == "succeeded" and ITEM_NEIGHBORS.name in record.output_versions
        ]
        return earlier[-1] if earlier else None

    @property
    def checks(self) -> list[Check]:
        """Every expectation, those that do not hold first."""
        found = [_check(record.stage, result) for record in self.records if record.gates for result in json.loads(record.gates)["results"]]
        return sorted(found, key=lambda check: ("failed", "broken", "warning", "held").index(check.state))

    def metrics(self, record: StageRecord) -> list[tuple[str, str, str]]:
        """Name, number and meaning of every metric of a stage."""
        results = json.loads(record.gates)["results"] if record.gates else []
        meanings = {result["metric"]: result["meaning"] for result in results}
        return [(name, format_number(value), meaning_of(name, meanings)) for name, value in sorted(record.metrics.items())]

    @property
    def tally(self) -> list[tuple[str, str, str]]:
        """Name, number and meaning of what is seen first."""
        published = next((record.metrics for record in self.records if record.stage == "publish_neighbors"), {})
        states = [check.state for check in self.checks]
        done = sum(record.status == "succeeded" for record in self.records)
        numbers = {
            "stages done": f"{done} of {len(self.stages)}",
            "checks held": f"{states.count('held')} of {len(states)}",
            "warnings": str(states.count("warning")),
            "items with a list": format_number(published["num_items"]) if "num_items" in published else "",
            "coverage": f"{published['coverage']:.1%}" if "coverage" in published else "",
            "churn": f"{published['churn']:.3f}" if "churn" in published else "",
            "minutes": f"{sum(record.seconds for record in self.records) / 60:.1f}",
        }
        return [(name, number, TALLY[name]) for name, number in numbers.items() if number]

    @property
    def lists(self) -> NightLists | None:
        """The night's lists, if it came so far."""
        path = self.night.artifacts("explorer") / catalog.FILE
        made = any(record.stage == "publish_neighbors" and record.metrics for record in self.records) and path.is_file()
        return NightLists(root=self.night.lake.root, run_id=self.night.run_id, catalog=Catalog.open(path)) if made else None

    @property
    def curves(self) -> str:
        """Learning curves as SVG; empty if nothing was trained."""
        path = self.night.artifacts("model") / "history.json"
        trained = any(record.stage == "train_model" for record in self.records) and path.is_file()
        return curves_svg(json.loads(path.read_text())["steps"]) if trained else ""

    @property
    def judged(self) -> Report | None:
        """How the lists of some days ago met what followed, if this night judged them: recall and relevance, from `evaluation`."""
        night = self.night
        if not table_exists(night.lake.root, EVALUATION) or "evaluate" not in {record.stage for record in self.records}:
            return None
        date = night.run_date - timedelta(days=night.settings.evaluation.horizon_days)
        judged = night.ledger.last_success(stage="publish_neighbors", run_date=date)
        rows = rows_where(night.lake.root, EVALUATION, "run_id", [judged.run_id]).to_pylist() if judged else []
        return judged_report(night, [row for row in rows if row["slice"] == "all"])

    @property
    def _policies(self) -> list[dict[str, Any]]:
        root = self.night.lake.root
        table = open_table(root, MERGE_POLICY).to_pyarrow_table().to_pylist() if table_exists(root, MERGE_POLICY) else []
        return table or [policy.model_dump() for policy in self.night.settings.merge]

    @property
    def _swept_exponent(self) -> float:
        """The popularity discount that backtests of these settings sweep mixes with."""
        return next(policy.popularity_exponent for policy in self.night.settings.merge if policy.scope == DEFAULT_SCOPE)

    @property
    def backtest(self) -> Report | str:
        """The latest backtest of this configuration, its published mix marked; a sentence where there is none."""
        name, path = self.night.settings.name, REPORTS / f"{self.night.settings.name}.json"
        if not path.is_file():
            return f"No backtest of {name} at {path}: `make backtest CONFIG={name}` ranks every baseline beside these lists."
        try:
            report = read_json(path)
        except TableError as error:
            return str(error)
        mix = published_mix(self._policies, exponent=self._swept_exponent)
        return replace(report, marks={**report.marks, mix: " and ".join(filter(None, [report.marks.get(mix), "the mix of merge_policy"]))})


def _check(stage: str, result: Mapping[str, Any]) -> Check:
    if result["broke"]:
        state = "broken"
    elif result["passed"]:
        state = "held"
    else:
        state = "failed" if result["severity"] == "critical" else "warning"
    found = result["found"]
    number = "no number" if found is None else found if isinstance(found, str) else format_number(found)
    return Check(stage=stage, metric=result["metric"], found=number, wanted=result["wanted"], meaning=result["meaning"], state=state)


def judged_report(night: Night, rows: Sequence[Mapping[str, Any]]) -> Report | None:
    """Rows of `evaluation` of one night as a report, whose judge of relevance is the content vector; None without any row."""
    if not rows:
        return None
    names = [field.name for field in fields(Row)]
    cut = rows[0]["run_date"]
    return Report(
        config=night.settings.name,
        title=f"Lists of {cut}",
        cut=cut,
        until=cut + timedelta(days=rows[0]["horizon_days"]),
        final=False,
        num_reads=0,
        judges={"content cosine": SAME_SOURCE},
        unreachable_share=math.nan,
        num_triggers=rows[0]["num_triggers"],
        rows=[Row(**{name: row[name] for name in names}) for row in rows],
        comparisons=(),
        chosen={},
        notes=(),
        families={},
        minutes=math.nan,
        depth=max(int(row["metric"].partition("@")[2]) for row in rows),
    )


def published_mix(policies: Sequence[Mapping[str, Any]], *, exponent: float) -> str:
    """Lambda of the default row of merge_policy, as a backtest names its mixes; empty if it is no blend, or one that leaves places to
    relevance, raises new pairs or new items, or discounts popularity by another exponent than the sweep.
    """
    default = next((policy for policy in policies if policy["scope"] == DEFAULT_SCOPE), None)
    if default is None or default["kind"] != "blend" or any(default.get(name) for name in _NOT_SWEPT):
        return ""
    if default["popularity_exponent"] != exponent:
        return ""
    return f"{default['value']:g}"


def _frontier(report: Report | None) -> dict[str, Any] | None:
    """Picture and table of both axes, drawn as a backtest draws them."""
    grid = (headline(report) if report.families else measures(report)) if report else None
    return {"report": report, "picture": Markup(frontier_svg(report)), "table": Markup(table(grid))} if report and grid else None  # noqa: S704


def settings_text(settings: Settings) -> str:
    """All settings as YAML; options of a source that look like secrets are not shown."""
    content = settings.model_dump(mode="json")
    for source in content["source"].values():
        if isinstance(source, dict) and source.get("options"):
            source["options"] = {name: "(hidden)" if _SECRET.search(name) else value for name, value in source["options"].items()}
    hidden = {name: "(hidden)" if _SECRET.search(name) else value for name, value in content["spark"]["settings"].items()}
    content["spark"]["settings"] = hidden
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def write_report(night: Night, stages: Sequence[str]) -> Path:
    """Write the page of a night in place of an earlier one, and return its path."""
    report = NightReport.of(night, stages)
    lists, before = report.lists, report.published_before
    content = {
        "report": report,
        "style": Markup(pages.text("page.css") + pages.text("night.css")),  # noqa: S704 - files of this project
        "script": Markup(pages.text("definitions.js")),  # noqa: S704 - likewise
        "changes": lists.changes(before.run_id) if lists and before else None,
        "before": before,
        "slices": lists.slices() if lists else [],
        "slice_columns": SLICE_COLUMNS,
        "curves": Markup(report.curves),  # noqa: S704 - drawn here, of names in the settings, which are escaped as XML
        "judged": _frontier(report.judged),
        "backtest": _frontier(backtest) if isinstance(backtest := report.backtest, Report) else None,
        "no_backtest": backtest if isinstance(backtest, str) else "",
        "caption": CAPTION,
        "settings": settings_text(night.settings),
        "code": code_fingerprint(),
        "longest": max((record.seconds for record in report.records), default=0.0) or 1.0,
    }
    night.report_path.parent.mkdir(parents=True, exist_ok=True)
    partial = night.report_path.with_suffix(".partial")
    partial.write_text(pages.environment().get_template("night.html").render(**content), encoding="utf-8")
    reach("report.written")
    partial.replace(night.report_path)
    return night.report_path
