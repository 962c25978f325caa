"""Gates: Great Expectations validates a stage's metrics row, and a critical failure stops the night.

"The data is bad" (GateError) and "the check itself broke" (BrokenGateError) are told apart, since Great Expectations reports both as an
unsuccessful expectation. Running a gate raises; there is no list of problems for a caller to forget.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from conf.errors import BrokenGateError, GateError, TableError
from conf.tables import Table
from validation.suites import Rule, format_number


@dataclass(frozen=True, kw_only=True)
class RuleResult:
    """What a rule met. `broke` says why it could not be checked, and is None when it could."""

    rule: Rule
    found: float | None
    passed: bool
    broke: str | None = None

    @property
    def wanted(self) -> str:
        """The accepted values in words."""
        return self.rule.wanted

    @property
    def severity(self) -> str:
        """Of the rule: critical or warning."""
        return self.rule.severity

    def __str__(self) -> str:
        if self.broke is not None:
            return f"{self.rule.metric}: could not be checked: {self.broke}"
        found = "no number" if self.found is None else format_number(self.found)
        return f"{self.rule.metric}: found {found}, wanted {self.wanted} ({self.rule.meaning}); {self.rule.remedy}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON; values that JSON does not know become text."""
        found = str(self.found) if self.found is not None and not math.isfinite(self.found) else self.found
        named = {"metric": self.rule.metric, "found": found, "wanted": self.wanted, "meaning": self.rule.meaning}
        return named | {"severity": self.severity, "passed": self.passed, "broke": self.broke}


@dataclass(frozen=True, kw_only=True)
class GateReport:
    """All results of one gate."""

    stage: str
    results: tuple[RuleResult, ...]

    @property
    def broken(self) -> list[RuleResult]:
        """Rules that could not be checked, whatever their severity."""
        return [result for result in self.results if result.broke is not None]

    @property
    def failures(self) -> list[RuleResult]:
        """Critical rules that the data does not satisfy."""
        return [result for result in self._bad if result.severity == "critical"]

    @property
    def warnings(self) -> list[RuleResult]:
        """Other rules that the data does not satisfy; `str` of one is a sentence."""
        return [result for result in self._bad if result.severity == "warning"]

    @property
    def _bad(self) -> list[RuleResult]:
        return [result for result in self.results if not result.passed and result.broke is None]

    def to_json(self) -> str:
        """One object with the stage and a list of results, for the ledger."""
        content = {"stage": self.stage, "results": [result.to_dict() for result in self.results]}
        return json.dumps(content, allow_nan=False)


def run_gate(stage: str, metrics: Mapping[str, float], rules: Sequence[Rule]) -> GateReport:
    """Check a stage's metrics row against its rules.

    Returns:
        The report; its warnings are left to the caller.

    Raises:
        GateError: a critical rule failed.
        BrokenGateError: a rule could not be checked.
    """
    report = check_metrics(stage, metrics, rules)
    raise_on_failure(report)
    return report


def raise_on_failure(report: GateReport) -> None:
    """Raise what `run_gate` raises. Bad data outranks a broken check: it is the finding that a user can act on."""
    failures, broken = report.failures, report.broken
    if failures:
        head = f"the gate of stage {report.stage} failed {len(failures)} of {len(report.results)} expectations; nothing of it is published"
        raise GateError("\n  ".join([head, *map(str, failures), *map(str, broken)]))
    if broken:
        share = f"{len(broken)} of {len(report.results)} expectations"
        head = f"the gate of stage {report.stage} could not run {share}; this says nothing about the data"
        raise BrokenGateError("\n  ".join([head, *map(str, broken)]))


def check_metrics(stage: str, metrics: Mapping[str, float], rules: Sequence[Rule]) -> GateReport:
    """The report alone, for those who show it; `run_gate` is what a stage calls.

    Raises:
        BrokenGateError: there are no rules, so nothing would be checked.
    """
    if not rules:
        raise BrokenGateError(f"the gate of stage {stage} has no rules, so nothing would be checked; wanted those of validation/suites.py")
    named = [rule for given in rules for rule in _expand(given, metrics)]
    absent = {index: _absence(rule, metrics) for index, rule in enumerate(named)}
    checked = {index: rule for index, rule in enumerate(named) if absent[index] is None}
    results = dict(_validate(metrics, checked)) if checked else {}
    for index, reason in absent.items():
        if reason is not None:
            results[index] = RuleResult(rule=named[index], found=None, passed=False, broke=reason)
    return GateReport(stage=stage, results=tuple(results[index] for index in sorted(results)))


def check_schema(dtypes: Sequence[tuple[str, str]], table: Table) -> None:
    """Compare a frame's columns, as `DataFrame.dtypes` gives them, with a declared table. The order of columns is free.

    Raises:
        TableError: columns are missing, of another type, or not declared; names all of them.
    """
    found = {name: _plain(type_) for name, type_ in dtypes}
    wanted = {column.name: _plain(column.type) for column in table.columns}
    faults = [f"missing column {name} {wanted[name]}" for name in wanted if name not in found]
    faults += [f"column {name} is {found[name]}, wanted {wanted[name]}" for name in wanted if name in found and found[name] != wanted[name]]
    faults += [f"column {name} {found[name]} is not declared" for name in found if name not in wanted]
    if len(found) != len(dtypes):
        faults.append(f"column names repeat in {[name for name, _ in dtypes]}")
    if faults:
        raise TableError(
            f"rows for table {table.name} do not fit conf/tables.py: {'; '.join(faults)}; change the transform that makes them"
        )


def _plain(type_: str) -> str:
    return type_.lower().replace(" ", "")


def _expand(rule: Rule, metrics: Mapping[str, float]) -> list[Rule]:
    """A rule for a suffix becomes one rule per metric that has it; an optional rule without its metric goes."""
    names = [name for name in metrics if fnmatchcase(name, rule.metric)]
    if not names:
        return [] if rule.optional else [rule]
    return [replace(rule, metric=name) for name in names]


def _absence(rule: Rule, metrics: Mapping[str, float]) -> str | None:
    missing = [name for name in (rule.metric, rule.equals) if name is not None and name not in metrics]
    return f"no metric {' or '.join(missing)} among {sorted(metrics)}; the stage must compute it" if missing else None


def _validate(metrics: Mapping[str, float], rules: Mapping[int, Rule]) -> list[tuple[int, RuleResult]]:
    """Let Great Expectations validate the row; results carry the rule's index, since GX reorders them."""
    import great_expectations as gx  # 5 s to import, and not every command has a gate
    import pandas as pd
    from great_expectations.data_context.types.base import ProgressBarsConfig

    context = gx.get_context(mode="ephemeral")
    context.enable_analytics(False)
    context.variables.progress_bars = ProgressBarsConfig(globally=False, metric_calculations=False)
    used = {name for rule in rules.values() for name in (rule.metric, rule.equals) if name is not None}
    row = pd.DataFrame([{name: math.nan if metrics[name] is None else metrics[name] for name in sorted(used)}])
    asset = context.data_sources.add_pandas("metrics").add_dataframe_asset("row")
    batch = asset.add_batch_definition_whole_dataframe("whole").get_batch({"dataframe": row})
    suite = gx.ExpectationSuite(name="gate", expectations=[_expectation(rule, index) for index, rule in rules.items()])
    results: list[Any] = list(batch.validate(suite).results)
    indexed = [(result.expectation_config.meta["index"], result) for result in results]
    return [(index, _result(rules[index], metrics[rules[index].metric], result)) for index, result in indexed]


def _expectation(rule: Rule, index: int) -> Any:
    """The rule as a GX expectation.

    On one row the maximum of a column is its value; unlike ExpectColumnValuesToBeBetween it fails on NaN. Largest doubles stand for
    absent bounds, so that infinity fails. Pairs of columns need `ignore_row_if="neither"`, else two NaN count as equal.
    """
    from great_expectations.expectations.core.expect_column_max_to_be_between import ExpectColumnMaxToBeBetween
    from great_expectations.expectations.core.expect_column_pair_values_to_be_equal import ExpectColumnPairValuesToBeEqual

    common: dict[str, Any] = {"severity": rule.severity, "meta": {"index": index}}
    if rule.equals is not None:
        return ExpectColumnPairValuesToBeEqual(column_A=rule.metric, column_B=rule.equals, ignore_row_if="neither", **common)
    return ExpectColumnMaxToBeBetween(
        column=rule.metric,
        min_value=-sys.float_info.max if rule.minimum is None else rule.minimum,
        max_value=sys.float_info.max if rule.maximum is None else rule.maximum,
        strict_min=rule.exclusive,
        **common,
    )


def _result(rule: Rule, value: Any, result: Any) -> RuleResult:
    broke = _exception(result.exception_info)
    found = float(value) if broke is None and value is not None else None
    return RuleResult(rule=rule, found=found, passed=bool(result.success) and broke is None, broke=broke)


def _exception(info: Mapping[str, Any]) -> str | None:
    """Why an expectation could not be evaluated: GX gives one record, or one per metric it failed to compute."""
    records = [info] if "raised_exception" in info else list(info.values())
    messages = [str(record["exception_message"]) for record in records if record.get("raised_exception")]
    return "; ".join(messages) or None
