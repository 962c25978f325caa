"""The rules of each stage: what the one row of metrics of a stage must satisfy before the night goes on.

A stage computes its metrics in one pass over what it has just written; counts are rows, shares are in [0,1]. A rule bounds one metric.
A critical rule that fails stops the night and last night's lists stay; a warning is noted in the ledger.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from conf.errors import BrokenGateError
from conf.settings import GateSettings, SourceSettings
from validation.drift import volume_band

Severity = Literal["critical", "warning"]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Bounds of one metric; NaN and infinity satisfy no rule.

    Attributes:
        metric: its name, or `*_suffix`: the rule then holds for every metric with that suffix, and there must be one.
        minimum: smallest accepted value; None: no lower bound.
        maximum: largest accepted value; None: no upper bound.
        exclusive: the minimum itself is refused too.
        equals: name of the metric that must have the same value.
        optional: the metric may be absent, e.g. churn on the first night.
        severity: critical stops the night, warning is noted.
        meaning: what the metric is, with its unit.
        remedy: what to look at or change when the rule fails.
    """

    metric: str
    minimum: float | None = None
    maximum: float | None = None
    exclusive: bool = False
    equals: str | None = None
    optional: bool = False
    severity: Severity = "critical"
    meaning: str
    remedy: str

    @property
    def wanted(self) -> str:
        """The accepted values in words."""
        low = None if self.minimum is None else format_number(self.minimum)
        high = None if self.maximum is None else format_number(self.maximum)
        if self.equals is not None:
            return f"as many as {self.equals}"
        if low is None:
            return "a finite number" if high is None else f"at most {high}"
        if high is None:
            return f"more than {low}" if self.exclusive else f"at least {low}"
        if low == high:
            return f"exactly {low}"
        return f"more than {low} and at most {high}" if self.exclusive else f"between {low} and {high}"


@dataclass(frozen=True, kw_only=True)
class GateContext:
    """What thresholds depend on beside the metrics.

    Attributes:
        gates: thresholds of the settings.
        source: where the refused share of rows is limited.
        past: metrics of the same stage in earlier good nights, oldest first.
        values: further numbers of the night. `num_items` is how many items `train_model` must give vectors for.
    """

    gates: GateSettings
    source: SourceSettings
    past: Sequence[Mapping[str, float]] = ()
    values: Mapping[str, float] = field(default_factory=dict)


def format_number(value: float) -> str:
    """Whole numbers with thousands separators, others with six digits."""
    if math.isfinite(value) and value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.6g}"


def rules_for(stage: str, context: GateContext) -> list[Rule]:
    """The rules of a stage.

    Raises:
        BrokenGateError: no rules are declared for the stage, so nothing would be checked.
    """
    if stage not in _SUITES:
        raise BrokenGateError(f"no gate is declared for stage {stage!r}; have {sorted(_SUITES)}; declare its rules in validation/suites.py")
    return _SUITES[stage](context)


def stages() -> list[str]:
    """The stages that have a gate: those of a night in its order, then those of a backtest."""
    return list(_SUITES)


def _none(metric: str, meaning: str, remedy: str) -> Rule:
    return Rule(metric=metric, minimum=0, maximum=0, meaning=meaning, remedy=remedy)


def _at_least(metric: str, minimum: float, meaning: str, remedy: str, severity: Severity = "critical") -> Rule:
    return Rule(metric=metric, minimum=minimum, severity=severity, meaning=meaning, remedy=remedy)


def _share(metric: str, minimum: float, maximum: float, meaning: str, remedy: str, severity: Severity = "critical") -> Rule:
    return Rule(metric=metric, minimum=minimum, maximum=maximum, severity=severity, meaning=meaning, remedy=remedy)


def _volumes(context: GateContext, *metrics: str) -> list[Rule]:
    """A fall below the band stops the night, a rise above it is a warning."""
    limit = context.gates.max_volume_drop
    rules = []
    for metric in metrics:
        band = volume_band(metric, context.past, max_drop=limit)
        if band is None:
            continue
        meaning = f"rows, against a median of {format_number(band.center)} in the last {band.num_nights} good night(s)"
        remedy = f"look for lost rows in the stage's inputs; if the drop is real, raise gates.max_volume_drop (now {limit:g})"
        rules.append(_at_least(metric, band.low, meaning, remedy))
        if math.isfinite(band.high):
            growth = "look for rows that were loaded twice, or robots among the users; if the growth is real, nothing is to be done"
            rules.append(Rule(metric=metric, maximum=band.high, severity="warning", meaning=meaning, remedy=growth))
    return rules


def _ingest(context: GateContext) -> list[Rule]:
    gates, limit = context.gates, context.source.max_rejected_share
    refused = f"read the reasons in table rejected_rows; correct source.*.columns, or raise source.max_rejected_share (now {limit:g})"
    return [
        _at_least("num_source_events", 1, "rows of the events source", "check source.events.path"),
        _at_least("num_source_items", 1, "rows of the items source", "check source.items.path"),
        _share("rejected_events_share", 0, limit, "share of event rows that were refused", refused),
        _share("rejected_items_share", 0, limit, "share of item rows that were refused", refused),
        replace(_share("rejected_impressions_share", 0, limit, "share of impressions that were refused", refused), optional=True),
        _at_least(
            "num_engagements",
            gates.min_events,
            "engagements up to the run date",
            "check the run date, source.events.columns.engaged_at and action_weights, or lower gates.min_events",
        ),
        _at_least(
            "num_items",
            gates.min_items,
            "items in the catalog at the run date",
            "check the run date and source.items.columns.event_timestamp, or lower gates.min_items",
        ),
        Rule(
            metric="days_since_newest_event",
            minimum=0,
            maximum=gates.max_event_age_days,
            optional=True,  # without a single engagement, which num_engagements says
            meaning="days from the newest engagement to the run date",
            remedy="look whether the events source is still filled, and at source.events.time_format (seconds are not milliseconds); "
            f"if nothing has happened since, raise gates.max_event_age_days (now {gates.max_event_age_days})",
        ),
        _none("num_duplicate_keys", "rows beyond the first of a key in engagements and item_annotations", "a defect of ingest: report it"),
        *_volumes(context, "num_engagements", "num_items"),
    ]


def _build_pairs(context: GateContext) -> list[Rule]:
    window = "widen pairs.window, or check that the events have the user and session ids they should"
    privacy = f"{window}; pairs.min_users_per_pair hides pairs of fewer users; or lower gates.min_pairs"
    defect = "a defect of build_pairs: report it"
    sound = [
        _none("num_null_keys", "pairs without a trigger or target id", defect),
        _none("num_duplicate_keys", "rows beyond the first of a pair", defect),
        _none("num_self_pairs", "pairs of an item with itself", defect),
        _none("num_nonfinite", "pairs whose weight is NaN or infinite", "raise pairs.half_life_days: the decay left the range of a double"),
    ]
    few = _at_least(
        "*_num_pairs", 1, "pairs of a signal above the privacy minimum", "widen its window in pairs.signals", severity="warning"
    )
    ignored = Rule(
        metric="taken_exposures_share",
        minimum=1e-6,
        severity="warning",
        meaning="share of shown user-days on which the item was engaged in time",
        remedy="nothing that was shown was ever engaged: check that source.impressions.columns hold the ids of source.events",
    )
    return [
        _at_least("num_daily_rows", 1, "rows of co_engagement_daily up to the run date", window),
        _at_least("num_pairs", context.gates.min_pairs, "pairs above the privacy minimum", privacy),
        _at_least("num_items_with_pairs", 1, "trigger items with at least one pair", privacy),
        *sound,
        *(replace(rule, metric=f"*_{rule.metric}", optional=True) for rule in sound),
        replace(few, optional=True),
        replace(ignored, optional=True),
        Rule(
            metric="min_weight",
            minimum=0,
            exclusive=True,
            meaning="smallest landmark weight of a pair, in decayed user-days",
            remedy=defect,
        ),
        *_volumes(context, "num_daily_rows", "num_pairs"),
    ]


def _build_features(context: GateContext) -> list[Rule]:
    gates = context.gates
    defect = "a defect of build_features: report it"
    mapped = "map titles, texts, categories or tags in source.items.columns"
    return [
        _at_least("num_items", gates.min_items, "items with features", "run ingest for this run date, or lower gates.min_items"),
        _at_least(
            "num_catalog_items", gates.min_items, "items that the catalog holds at the run date", "check that events and items share ids"
        ),
        _none("num_duplicate_keys", "rows beyond the first of an item", defect),
        _share("content_share", gates.min_content_share, 1, "share of items with text or labels", mapped, severity="warning"),
        _none(
            "num_nonfinite",
            "items with a NaN, infinite or missing content value",
            "look for such values in the embeddings of the items source",
        ),
        _at_least("num_examples", 1, "graded item pairs the relevance head learns from", mapped, severity="warning"),
        _none("num_duplicate_examples", "rows beyond the first of a pair in relevance_examples", defect),
        Rule(metric="min_target", minimum=0, meaning="smallest relevance target, in [0,1]", remedy=defect),
        Rule(metric="max_target", maximum=1, meaning="largest relevance target, in [0,1]", remedy=defect),
        *_volumes(context, "num_items", "num_catalog_items"),
    ]


def _train_model(context: GateContext) -> list[Rule]:
    gates = context.gates
    mapped = "map titles, texts, categories or tags in source.items.columns"
    collapsed = (
        "the head has collapsed: lower training.learning_rate or training.num_steps, or check the head's task weights in model.heads"
    )
    num_items = context.values.get("num_items")
    return [
        _share("*_mean_cosine", -1, gates.max_mean_cosine, "mean cosine of pairs of the head's vectors", collapsed),
        _share(
            "*_zero_share",
            0,
            gates.max_zero_share,
            "share of items with a zero vector in the head: nothing is known about them",
            f"{mapped}; or drop the head from model.heads, or raise gates.max_zero_share",
        ),
        _at_least(
            "*_used_dimensions",
            gates.min_used_dimensions,
            "dimensions over which the head's vectors spread (participation ratio of their covariance)",
            "its items differ in hardly more than one way: look at its tasks' weights, and at what its items have to tell them apart",
            severity="warning",
        ),
        Rule(
            metric="*_min_norm",
            minimum=0,
            exclusive=True,
            severity="warning",
            meaning="smallest length of the head's vectors",
            remedy="an item has neither engagements nor content, so that nothing is known about it; its lists are arbitrary",
        ),
        Rule(
            metric="*_num_vectors",
            minimum=gates.min_items if num_items is None else num_items,
            maximum=num_items,
            meaning="items with vectors in the head",
            remedy="a defect of train_model: report it",
        ),
        _none("num_duplicate_keys", "rows beyond the first of an item and head", "a defect of train_model: report it"),
        _none("num_nonfinite", "vectors with a NaN, infinite or missing value", "lower training.learning_rate"),
        Rule(
            metric="final_loss",
            optional=True,  # training.num_steps = 0 takes no step and has no loss
            meaning="loss of the last step, in nats",
            remedy="training diverged: lower training.learning_rate",
        ),
    ]


def _publish_neighbors(context: GateContext) -> list[Rule]:
    gates = context.gates
    defect = "a defect of publish_neighbors: report it"
    few = "raise the retrieval.num_candidates_* settings, or lower"
    churned = (
        "compare the lists with `python -m jobs.show`; if they got worse, go back with `python -m jobs.rollback --to-run ...`, a run that "
        "`python -m jobs.status` names; if the change is wanted, raise gates.max_churn"
    )
    return [
        _at_least("num_items", 1, "items with a merged list", "look at the eligibility of the items"),
        _share("coverage", gates.min_list_coverage, 1, "share of catalog items with a merged list", f"{few} gates.min_list_coverage"),
        _share(
            "fullness", gates.min_fullness, 1, "mean length of merged lists as a share of the possible length", f"{few} gates.min_fullness"
        ),
        _none("num_self_neighbors", "lists that hold their own trigger item", defect),
        _none("num_duplicate_neighbors", "lists that hold an item twice", defect),
        _none("num_ineligible_neighbors", "neighbors that may not be offered", defect),
        replace(_none("num_refused_neighbors", "neighbors that a filter of their list refuses", defect), optional=True),
        replace(_none("num_lists_over_limit", "lists and kinds with more neighbors than a limit allows", defect), optional=True),
        _none("num_unordered", "lists whose scores do not descend", defect),
        _none("num_duplicate_keys", "rows beyond the first of an item and head", defect),
        _none("num_nonfinite", "neighbors whose score is NaN, infinite or missing", "lower training.learning_rate, or report it"),
        Rule(
            metric="counted_share",
            minimum=gates.min_counted_share,
            maximum=1,
            optional=True,  # where no counted partner may be offered
            meaning="mean share of a trigger's 10 strongest counted partners that its lists hold, of those that may be offered",
            remedy="lists that miss what was counted may be those of other items: look at some with `python -m jobs.show`; "
            f"if no head is to hold them, lower gates.min_counted_share (now {gates.min_counted_share:g})",
        ),
        Rule(
            metric="churn",
            minimum=0,
            maximum=gates.max_churn,
            optional=True,  # the first night has nothing to compare with
            severity="warning",
            meaning="1 - mean Jaccard@10 of merged lists against the published night",
            remedy=churned,
        ),
        *_volumes(context, "num_items"),
    ]


def _remerge(context: GateContext) -> list[Rule]:
    defect = "a defect of remerge: report it"
    return [
        _at_least("num_items", 1, "items with a merged list", "look at the eligibility of the items"),
        _none("num_self_neighbors", "lists that hold their own trigger item", defect),
        _none("num_duplicate_neighbors", "neighbors that a list holds twice", defect),
        _none("num_ineligible_neighbors", "neighbors that may not be offered", defect),
        _none("num_refused_neighbors", "neighbors that a filter or limit of their list refuses", defect),
        Rule(
            metric="churn",
            minimum=0,
            maximum=1,
            severity="warning",
            meaning="1 - mean Jaccard@10 of merged lists against those before",
            remedy="the policy changes what is shown; if that is not wanted, `python -m jobs.rollback`",
        ),
    ]


def _publish_online(context: GateContext) -> list[Rule]:
    again = "run `python -m jobs.publish_online` again: it goes on at the shard where it stopped"
    return [
        _at_least("num_items_expected", 1, "items of the current night", "publish a night first"),
        Rule(metric="num_items_written", equals="num_items_expected", meaning="items written to the online store", remedy=again),
    ]


def _evaluate(context: GateContext) -> list[Rule]:
    young = "no list was published early enough, or nothing was engaged with since; wait, or lower evaluation.horizon_days"
    return [_at_least("num_triggers", 1, "trigger items that were judged", young, severity="warning")]


def _backtest(context: GateContext) -> list[Rule]:
    leak = "training saw what it must not: report it, and trust no number of this backtest"
    return [
        _at_least("num_triggers", 1, "trigger items that were judged", "widen evaluation.window or backtest.slice_share"),
        _none("num_rows_after_cut", "rows of training tables that know days after the cut", leak),
        _none("num_withheld_values", "values in item_features that a judge withholds", leak),
        Rule(
            metric="content_rel_ndcg",
            maximum=0.98,
            severity="warning",
            meaning="RelNDCG@10 of the content list under the first judge",
            remedy="the features nearly reproduce the judge: look for a copy of its column in a field that is not withheld",
        ),
    ]


_SUITES: dict[str, Callable[[GateContext], list[Rule]]] = {
    "ingest": _ingest,
    "build_pairs": _build_pairs,
    "build_features": _build_features,
    "train_model": _train_model,
    "publish_neighbors": _publish_neighbors,
    "publish_online": _publish_online,
    "remerge": _remerge,
    "evaluate": _evaluate,
    "backtest_validation": _backtest,
    "backtest_final": _backtest,
}
