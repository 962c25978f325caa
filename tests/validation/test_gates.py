"""Each gate against the fault it exists for, through Great Expectations itself."""

import fnmatch
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import pytest

from conf.errors import BrokenGateError, GateError, TableError
from conf.settings import GateSettings, load_settings
from conf.tables import ITEM_NEIGHBORS, TABLES
from validation.drift import volume_band
from validation.gates import check_metrics, check_schema, run_gate
from validation.suites import GateContext, Rule, rules_for, stages

CLEAN: dict[str, dict[str, float]] = {
    "ingest": {
        "num_source_events": 5000,
        "num_rejected_events": 5,
        "rejected_events_share": 0.001,
        "num_engagements": 4995,
        "num_source_items": 300,
        "rejected_items_share": 0.0,
        "num_items": 300,
        "days_since_newest_event": 0,
        "num_duplicate_keys": 0,
    },
    "build_pairs": {
        "num_daily_rows": 9000,
        "num_pairs": 2000,
        "num_items_with_pairs": 280,
        "num_null_keys": 0,
        "num_duplicate_keys": 0,
        "num_self_pairs": 0,
        "min_weight": 1e-9,
        "num_nonfinite": 0,
    },
    "build_features": {
        "num_items": 310,
        "num_catalog_items": 300,
        "num_duplicate_keys": 0,
        "content_share": 0.98,
        "num_nonfinite": 0,
        "num_examples": 6000,
        "num_duplicate_examples": 0,
        "min_target": 0.0,
        "max_target": 1.0,
    },
    "train_model": {
        "engagement_mean_cosine": 0.1,
        "relevance_mean_cosine": 0.2,
        "engagement_zero_share": 0.0,
        "relevance_zero_share": 0.05,  # items without content
        "engagement_used_dimensions": 30.5,
        "relevance_used_dimensions": 12.0,
        "engagement_min_norm": 0.5,
        "relevance_min_norm": 1.0,
        "engagement_num_vectors": 310,
        "relevance_num_vectors": 310,
        "num_duplicate_keys": 0,
        "num_nonfinite": 0,
        "final_loss": 4.2,
    },
    "publish_neighbors": {
        "num_items": 300,
        "coverage": 1.0,
        "fullness": 0.99,
        "num_self_neighbors": 0,
        "num_duplicate_neighbors": 0,
        "num_ineligible_neighbors": 0,
        "num_refused_neighbors": 0,
        "num_lists_over_limit": 0,
        "num_unordered": 0,
        "num_duplicate_keys": 0,
        "num_nonfinite": 0,
        "counted_share": 0.95,
        "churn": 0.1,
    },
    "publish_online": {"num_items_written": 300, "num_items_expected": 300},
    "remerge": {
        "num_items": 300,
        "num_self_neighbors": 0,
        "num_duplicate_neighbors": 0,
        "num_ineligible_neighbors": 0,
        "num_refused_neighbors": 0,
        "churn": 0.4,
    },
    "evaluate": {"num_triggers": 250},
    **{
        key: {"num_triggers": 250, "num_rows_after_cut": 0, "num_withheld_values": 0, "content_rel_ndcg": 0.7}
        for key in ("backtest_validation", "backtest_final")
    },
}


def context(past: Sequence[Mapping[str, float]] = (), gates: GateSettings | None = None, **values: float) -> GateContext:
    settings = load_settings("demo")
    return GateContext(gates=gates or settings.gates, source=settings.source, past=past, values=values)


def test_clean_metrics_pass_every_gate() -> None:
    for stage in stages():
        past = [CLEAN[stage]] * 3  # so that the volume bands are among the rules
        report = run_gate(stage, CLEAN[stage], rules_for(stage, context(past, num_items=310)))
        assert report.results
        assert not report.warnings
        content = json.loads(report.to_json())
        assert content["stage"] == stage
        assert all(result["passed"] for result in content["results"])


_OF_REMERGE = ["num_items", "num_self_neighbors", "num_ineligible_neighbors"]
# stage, what the fault does to the metrics, which metrics must be named
CRITICAL = [
    ("ingest", {"num_engagements": 99}, ["num_engagements"]),  # below gates.min_events
    ("ingest", {"rejected_events_share": 0.06, "rejected_items_share": 0.5}, ["rejected_events_share", "rejected_items_share"]),
    ("ingest", {"rejected_impressions_share": 0.2}, ["rejected_impressions_share"]),
    ("ingest", {"num_source_events": 0}, ["num_source_events"]),  # an empty source
    ("ingest", {"num_source_items": 0, "num_items": 0}, ["num_source_items", "num_items"]),  # an empty catalog
    ("ingest", {"num_duplicate_keys": 1}, ["num_duplicate_keys"]),
    ("ingest", {"days_since_newest_event": 15}, ["days_since_newest_event"]),  # nobody has filled the source for two weeks
    ("ingest", {"days_since_newest_event": 19_800}, ["days_since_newest_event"]),  # seconds read as milliseconds: all of January 1970
    ("build_pairs", {"num_daily_rows": 0}, ["num_daily_rows"]),
    ("build_pairs", {"num_pairs": 0, "num_items_with_pairs": 0, "min_weight": 0}, ["num_pairs", "num_items_with_pairs", "min_weight"]),
    ("build_pairs", {"num_null_keys": 2, "num_duplicate_keys": 1}, ["num_null_keys", "num_duplicate_keys"]),
    ("build_pairs", {"num_self_pairs": 1}, ["num_self_pairs"]),
    ("build_pairs", {"buy_num_null_keys": 1, "buy_num_self_pairs": 1}, ["buy_num_null_keys", "buy_num_self_pairs"]),  # a signal's pairs
    ("build_pairs", {"buy_num_duplicate_keys": 2, "buy_num_nonfinite": 3}, ["buy_num_duplicate_keys", "buy_num_nonfinite"]),
    ("build_pairs", {"min_weight": math.inf, "num_nonfinite": 7}, ["min_weight", "num_nonfinite"]),  # decay overflowed
    ("build_features", {"num_items": 1, "num_catalog_items": 1}, ["num_items", "num_catalog_items"]),
    ("build_features", {"num_duplicate_keys": 3}, ["num_duplicate_keys"]),
    ("build_features", {"num_duplicate_examples": 1}, ["num_duplicate_examples"]),
    ("build_features", {"num_nonfinite": 1}, ["num_nonfinite"]),
    ("build_features", {"min_target": -0.1, "max_target": 1.5}, ["min_target", "max_target"]),
    ("build_features", {"num_catalog_items": 0}, ["num_catalog_items"]),  # ids of events and items do not meet
    ("train_model", {"relevance_mean_cosine": 0.97}, ["relevance_mean_cosine"]),  # a collapsed head
    ("train_model", {"engagement_zero_share": 1.0}, ["engagement_zero_share"]),  # all lengths have shrunk to nothing
    ("train_model", {"engagement_num_vectors": 309}, ["engagement_num_vectors"]),  # an item without vectors
    ("train_model", {"num_duplicate_keys": 310}, ["num_duplicate_keys"]),  # what an earlier attempt wrote is there, too
    ("train_model", {"num_nonfinite": 1, "final_loss": math.nan}, ["num_nonfinite", "final_loss"]),  # diverged
    ("publish_neighbors", {"num_items": 0, "coverage": 0}, ["num_items", "coverage"]),
    ("publish_neighbors", {"coverage": 0.9, "fullness": 0.5}, ["coverage", "fullness"]),
    ("publish_neighbors", {"counted_share": 0.01}, ["counted_share"]),  # vectors that belong to other items
    ("publish_neighbors", {"num_duplicate_keys": 1, "num_nonfinite": 3}, ["num_duplicate_keys", "num_nonfinite"]),
    ("publish_neighbors", {"coverage": 1.2}, ["coverage"]),  # lists of items outside the catalog
    ("publish_neighbors", {"num_self_neighbors": 1, "num_duplicate_neighbors": 1}, ["num_self_neighbors", "num_duplicate_neighbors"]),
    ("publish_neighbors", {"num_ineligible_neighbors": 1, "num_unordered": 1}, ["num_ineligible_neighbors", "num_unordered"]),
    ("publish_neighbors", {"num_refused_neighbors": 1, "num_lists_over_limit": 2}, ["num_refused_neighbors", "num_lists_over_limit"]),
    ("remerge", {"num_refused_neighbors": 1, "num_duplicate_neighbors": 1}, ["num_refused_neighbors", "num_duplicate_neighbors"]),
    ("remerge", {"num_items": 0, "num_self_neighbors": 1, "num_ineligible_neighbors": 1}, _OF_REMERGE),
    ("publish_online", {"num_items_written": 0, "num_items_expected": 0}, ["num_items_expected"]),
    ("publish_online", {"num_items_written": 299}, ["num_items_written"]),
    ("publish_online", {"num_items_written": math.nan, "num_items_expected": math.nan}, ["num_items_written", "num_items_expected"]),
    ("backtest_validation", {"num_triggers": 0}, ["num_triggers"]),
    ("backtest_validation", {"num_rows_after_cut": 3}, ["num_rows_after_cut"]),  # training saw the future
    ("backtest_final", {"num_withheld_values": 1}, ["num_withheld_values"]),  # training saw what the judge reads
]


@pytest.mark.parametrize(("stage", "fault", "named"), CRITICAL, ids=[f"{stage}-{'-'.join(named)}" for stage, _, named in CRITICAL])
def test_a_critical_fault_stops_the_night(stage: str, fault: dict[str, float], named: list[str]) -> None:
    metrics = CLEAN[stage] | fault
    rules = rules_for(stage, context(num_items=310))
    assert sorted(result.rule.metric for result in check_metrics(stage, metrics, rules).failures) == sorted(named)
    with pytest.raises(GateError, match=rf"stage {stage} failed {len(named)} of"):
        run_gate(stage, metrics, rules)


WARNINGS: list[tuple[str, dict[str, float]]] = [
    ("build_features", {"content_share": 0.2, "num_examples": 0}),
    ("build_pairs", {"buy_num_pairs": 0, "taken_exposures_share": 0.0}),  # ids of impressions and events do not meet
    ("train_model", {"relevance_used_dimensions": 1.1, "engagement_min_norm": 0.0}),  # all items on a line; an item of no length
    ("publish_neighbors", {"churn": 0.95}),
    ("remerge", {"churn": 1.01}),
    ("evaluate", {"num_triggers": 0}),
    ("backtest_final", {"content_rel_ndcg": 1.0}),  # a copy of the judge's column among the features
]


def test_every_rule_has_its_fault() -> None:
    """Volume bands, whose rules come with past nights, have tests of their own."""
    for stage in stages():
        alike = ("backtest_validation", "backtest_final") if stage.startswith("backtest") else (stage,)
        tried = {name for known, _, named in CRITICAL if known in alike for name in named}
        tried |= {name for known, fault in WARNINGS if known in alike for name in fault}
        for rule in rules_for(stage, context(num_items=310)):
            assert fnmatch.filter(tried, rule.metric), f"{stage}: no fault for {rule.metric}"
            assert rule.meaning, rule.metric
            assert rule.remedy, rule.metric


def test_warnings_come_back_in_the_report() -> None:
    for stage, fault in WARNINGS:
        report = run_gate(stage, CLEAN[stage] | fault, rules_for(stage, context(num_items=310)))
        assert [result.rule.metric for result in report.warnings] == list(fault)


def test_a_failure_says_found_wanted_and_what_to_change() -> None:
    with pytest.raises(GateError) as caught:
        run_gate("ingest", CLEAN["ingest"] | {"num_engagements": 12}, rules_for("ingest", context()))
    message = str(caught.value)
    assert "num_engagements: found 12, wanted at least 100" in message
    assert "gates.min_events" in message
    assert "num_items" not in message  # what passed is not listed


def test_a_broken_check_is_not_bad_data() -> None:
    clean = CLEAN["publish_neighbors"]
    rules = rules_for("publish_neighbors", context())
    absent = {name: value for name, value in clean.items() if name != "coverage"}
    with pytest.raises(BrokenGateError, match="coverage: could not be checked: no metric coverage among"):
        run_gate("publish_neighbors", absent, rules)
    text = clean | {"coverage": cast(Any, "all of them")}  # Great Expectations itself raises on it
    with pytest.raises(BrokenGateError, match="coverage: could not be checked: '>='"):
        run_gate("publish_neighbors", text, rules)
    with pytest.raises(GateError, match=r"(?s)fullness: found 0.1.*coverage: could not be checked"):  # both: the data's fault leads
        run_gate("publish_neighbors", absent | {"fullness": 0.1}, rules)
    with pytest.raises(BrokenGateError, match="_mean_cosine"):  # no head at all was measured
        run_gate("train_model", {"num_nonfinite": 0}, rules_for("train_model", context()))
    with pytest.raises(BrokenGateError, match="no gate is declared for stage 'compact'"):
        rules_for("compact", context())
    with pytest.raises(BrokenGateError, match="no rules"):
        run_gate("ingest", CLEAN["ingest"], [])


def test_no_number_satisfies_no_rule() -> None:
    for bad in (math.nan, math.inf, -math.inf, cast(Any, None)):
        for bounds in ({}, {"minimum": 0.0}, {"maximum": 1.0}, {"minimum": 0.0, "maximum": 1.0}):
            rule = Rule(metric="share", meaning="a share", remedy="nothing", **cast(Any, bounds))
            report = check_metrics("ingest", {"share": bad}, [rule])
            assert [result.rule for result in report.failures] == [rule], (bad, bounds)
            json.loads(report.to_json(), parse_constant=pytest.fail)  # NaN is no JSON


def test_churn_and_loss_may_be_absent() -> None:
    for stage, metric in (("publish_neighbors", "churn"), ("train_model", "final_loss")):
        metrics = {name: value for name, value in CLEAN[stage].items() if name != metric}
        report = run_gate(stage, metrics, rules_for(stage, context(num_items=310)))
        assert metric not in [result.rule.metric for result in report.results]


def test_lost_rows_stop_the_night_and_doubled_rows_warn() -> None:
    past = [CLEAN["build_pairs"] | {"num_pairs": num} for num in (1900, 2000, 9, 2100)]  # one odd night
    rules = rules_for("build_pairs", context(past))
    with pytest.raises(GateError, match=r"num_pairs: found 974, wanted at least 975 \(rows, against a median of 1,950 in the last 4"):
        run_gate("build_pairs", CLEAN["build_pairs"] | {"num_pairs": 974}, rules)
    assert not run_gate("build_pairs", CLEAN["build_pairs"] | {"num_pairs": 975}, rules).warnings
    warnings = run_gate("build_pairs", CLEAN["build_pairs"] | {"num_pairs": 3901}, rules).warnings
    assert [result.rule.metric for result in warnings] == ["num_pairs"]


def test_volume_band_reads_the_last_seven_good_nights() -> None:
    past: list[dict[str, float]] = [{"rows": 1e6}] * 9 + [{"rows": 100}] * 7
    band = volume_band("rows", past, max_drop=0.2)
    assert band is not None
    assert (band.center, band.low, band.high, band.num_nights) == (100, 80, 125, 7)
    assert volume_band("rows", [], max_drop=0.2) is None
    assert volume_band("rows", [{"other": 1}, {"rows": math.nan}], max_drop=0.2) is None
    anything = volume_band("rows", past, max_drop=1)
    assert anything is not None
    assert (anything.low, anything.high) == (0, math.inf)


def test_schema_gate_names_every_difference() -> None:
    for table in TABLES.values():
        check_schema([(column.name, column.type) for column in reversed(table.columns)], table)
    dtypes = {column.name: column.type for column in ITEM_NEIGHBORS.columns}
    del dtypes["head"]
    dtypes |= {"run_date": "timestamp", "neighbors": "array<string>", "rank": "int"}
    with pytest.raises(TableError) as caught:
        check_schema(list(dtypes.items()), ITEM_NEIGHBORS)
    message = str(caught.value)
    for part in (
        "missing column head string",
        "run_date is timestamp, wanted date",
        "neighbors is array<string>",
        "column rank int is not declared",
    ):
        assert part in message
    with pytest.raises(TableError, match="repeat"):
        check_schema([*((column.name, column.type) for column in ITEM_NEIGHBORS.columns), ("head", "string")], ITEM_NEIGHBORS)
