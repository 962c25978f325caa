"""What the numbers of a night mean, in plain words: of a metric its gate says it, of the others this module."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from conf.errors import MtmhError
from jobs.backtest_measures import meaning_of as measure_meaning

METRICS: Mapping[str, str] = {
    "num_source_events": "rows of the events source that were read",
    "num_rejected_events": "events that were refused; table rejected_rows has them with the reason",
    "num_later_events": "events after the run date, which this night does not see",
    "num_other_action_events": "events of an action that has no weight in the settings, skipped",
    "num_taken_events": "events up to the run date that were accepted",
    "num_merged_events": "accepted events that repeat a user, item, action and instant, merged into one",
    "num_source_impressions": "rows of the impressions source on the days that count",
    "num_rejected_impressions": "impressions that were refused; table rejected_rows has them with the reason",
    "num_exposure_pairs": "pairs of trigger and shown item seen by enough users",
    "num_rejected_items": "catalog rows that were refused; table rejected_rows has them with the reason",
    "num_capped_groups": "sessions or user-days with more items than pairs.max_items_per_user_day",
    "num_cut_items": "items in them that took no part in pairs",
    "recounted_days_share": "share of all days whose pairs were counted again, as something within the window's reach had changed",
    "touched_pairs_share": "share of all pairs whose totals changed; 1 in a night that starts from nothing",
    "built_from_nothing": "1 where all days were counted anew: nothing to build on, or too few engagements for that to be worth it; else 0",
    "num_pruned_triggers": "triggers with more pairs than pairs.max_pairs_per_trigger",
    "num_pruned_pairs": "their weakest pairs, which were left out",
    "*_search_recall": "share of the exact search's nearest items that the IVF search finds, on a sample of triggers",
    "user_level_weight": "chosen weight of user-level co-engagement beside the counted pairs",
    "dimension": "length of the factorization that the encoder starts from",
    "target_norm_exponent": "chosen share of the factorization's target norms that is kept, as an exponent",
    "popularity_weight": "chosen starting weight of log popularity in the engagement score",
    "popularity_half_life_days": "chosen half-life of that popularity, in days; 0: that of the pairs' weights",
    "temperature": "chosen temperature of the engagement softmax",
    "prior_users": "chosen number of users that a count is smoothed by",
    "content_share": "chosen share of content cosine in a head without the engagement task",
    "num_holdout_triggers": "triggers of the last slice of engagements on which the above was chosen",
    "scorer_passes": "passes over these triggers until the merge scorer was best on those held out, mean over folds",
    "scorer_loss": "loss of the merge scorer on triggers held out, in nats: lower is better; mean over folds",
    "mixture_loss": "loss on the same triggers of the fixed mixture that the scorer replaces, in nats",
    "holdout_recall_at_100": "share of partners of the last slice found among 100, before fine-tuning",
    "first_loss": "mean loss of the first tenth of the training steps, in nats",
    "num_steps": "optimizer steps",
    "*_num_zero_vectors": "items about which the head knows nothing",
    "seconds_*": "wall time of a part of the stage, in seconds",
    "*_seconds": "wall time of a part of the stage, in seconds",
}
"""By name or pattern; the first that fits counts. What a gate checks is explained by its rule."""

SLICE_COLUMNS: Mapping[str, str] = {
    "triggers": "items of the catalog in this slice",
    "looked at": "triggers whose merged lists were read for this table, spread evenly over the slice",
    "counted": "share of the first 10 places that go to an item engaged together with the trigger by enough users to be shown",
    "relevance": "mean score of the relevance head over the first 10 places, from -1 to 1",
    "to the hottest": "share of the first 10 places that go to the most engaged hundredth of the catalog",
    "filled": "share of all places that only fill the list up",
}
TALLY: Mapping[str, str] = {
    "stages done": "stages of this night that have succeeded, of all that a night has",
    "checks held": "expectations of the gates that the data satisfies, of all that were checked",
    "warnings": "expectations that do not hold but do not stop a night",
    "items with a list": "items of the catalog with a merged list",
    "coverage": "share of catalog items with a merged list",
    "churn": "1 - mean Jaccard@10 of merged lists against the lists that were published before",
    "minutes": "wall time of all stages together, the latest attempt of each",
}


def meaning_of(metric: str, gates: Mapping[str, str]) -> str:
    """The definition of a stage's metric, from its gate's rule or from METRICS; empty if nobody has written one.

    A metric of a signal is that of all actions with the signal's name before it.
    """
    own = gates.get(metric) or next((words for name, words in METRICS.items() if fnmatchcase(metric, name)), "")
    if own:
        return own
    known = {**METRICS, **gates}
    parts = metric.split("_")  # method, head and measure; a head's name may have such a line in it too
    if words := next((words for start in range(len(parts)) if (words := measure_meaning("_".join(parts[start:])))), ""):
        return words
    same = max((name for name in known if metric.endswith(f"_{name}")), key=len, default=None)
    return "" if same is None else f"{known[same]}; of signal {metric.removesuffix(f'_{same}')}"


def first_line(error: str) -> str:
    """What failed, without a last period, and without the name of the error type where it is one of ours: those can be read alone."""
    head = error.splitlines()[0].rstrip(": .")
    name, _, rest = head.partition(": ")
    return rest if name in {kind.__name__ for kind in MtmhError.__subclasses__()} and rest else head


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
