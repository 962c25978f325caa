"""The protocol of the backtest: everything that is measured about one method's lists, against one future and its judges.

Values stay per trigger until the end, so that an interval resamples triggers and a difference between two methods is paired. Recall is
plain (a partner weighs its user-days) and debiased (divided by the root of its popularity), over all partners and over slices:

    new_pairs            partners never engaged together with the trigger before the cut, in either direction
    cold_targets         partners with fewer than 5 user-days before the cut
    cold_triggers        triggers with fewer than 5 user-days before the cut
    trigger_decile_1..10 tenths of the judged triggers by popularity, 1 the least popular
    target_decile_1..10  tenths of the future weight by popularity of the partner, 1 the least popular

Relevance is reported under `relevance@K` and `rel_ndcg@K` for a judge that is independent of the model, under `same_source_relevance@K` and
`same_source_rel_ndcg@K` for one that is not. The first judge of either kind has the slice `all`; where there are several judges, of
whatever kind, each one of them has `judge:<name>` too, so that all can be read side by side.

Shapes: `T` triggers, `K` positions, `N` items known at the cut, `M` >= `N` with those that came later, `P` settings of a family.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from models import metrics
from models.data import Bools, Floats, Ints
from models.judges import Judge, judged_lists
from models.metrics import Estimate, Values

Key = tuple[str, str]
"""A metric and a slice."""

COLD_USER_DAYS = 5
"""An item with fewer user-days before the cut is cold."""
_LONG, _SHORT = 100, 10
_CUTOFFS = (10, 50, 100)
_DECILES = 10
_SAME_SOURCE = "same_source_"


@dataclass(frozen=True, kw_only=True)
class Exam:
    """What lists are measured on.

    Attributes:
        triggers: (T,) item indices.
        future: (T, M) weight of each future partner.
        popularity: (M,) user-days before the cut.
        known_pairs: (T, M) above 0 where trigger and target were engaged together before the cut, in either direction.
        eligible: (N,) may be a neighbor.
        content: (N, C) content vectors, for diversity.
        judges: by name.
        independent: which of them know something that the model was not shown.
    """

    triggers: Ints
    future: csr_array
    popularity: Values
    known_pairs: csr_array
    eligible: Bools
    content: Floats
    judges: Mapping[str, Judge]
    independent: Mapping[str, bool]

    @cached_property
    def futures(self) -> dict[str, csr_array]:
        """The future by slice of targets."""
        cold = self.popularity < COLD_USER_DAYS
        slices = {
            "all": self.future,
            "new_pairs": metrics.new_pairs(self.future, self.known_pairs),
            "cold_targets": metrics.targets_in(self.future, cold),
        }
        decile = self._target_decile
        return slices | {f"target_decile_{d + 1}": metrics.targets_in(self.future, decile == d) for d in range(_DECILES)}

    @cached_property
    def trigger_slices(self) -> dict[str, Bools]:
        """(T,) which triggers a slice of triggers holds."""
        popularity = self.popularity[self.triggers]
        order = np.argsort(popularity, kind="stable")
        decile = np.empty(len(order), np.int64)
        decile[order] = np.arange(len(order)) * _DECILES // max(1, len(order))
        slices: dict[str, Bools] = {"cold_triggers": popularity < COLD_USER_DAYS}
        return slices | {f"trigger_decile_{d + 1}": decile == d for d in range(_DECILES)}

    @cached_property
    def _target_decile(self) -> npt.NDArray[np.int64]:
        """(M,) tenth of the future weight that the item's popularity falls into."""
        weight = np.asarray(self.future.sum(axis=0), np.float64).ravel()
        order = np.argsort(self.popularity, kind="stable")
        before = np.cumsum(weight[order]) - weight[order]
        total = max(float(weight.sum()), 1e-12)
        decile = np.empty(len(order), np.int64)
        decile[order] = np.minimum((before * _DECILES / total).astype(np.int64), _DECILES - 1)
        return decile

    @cached_property
    def tail(self) -> Bools:
        """(N,) items outside the most popular ones that hold 80 % of engagement."""
        return metrics.tail_items(self.popularity[: len(self.eligible)])

    @cached_property
    def judge_keys(self) -> dict[str, tuple[str, tuple[str, ...]]]:
        """Per judge the prefix of its metrics and the slices that they stand under."""
        keys: dict[str, tuple[str, tuple[str, ...]]] = {}
        taken = set()
        for name in self.judges:
            prefix = "" if self.independent[name] else _SAME_SOURCE
            first = () if prefix in taken else ("all",)
            keys[name] = (prefix, (*first, f"judge:{name}") if len(self.judges) > 1 else first)
            taken.add(prefix)
        return keys

    @cached_property
    def ideals(self) -> dict[str, Values]:
        """Per judge the (T, 10) best grades that any list could show."""
        return {name: metrics.ideal_grades(judge, self.triggers, self.eligible, k=_SHORT) for name, judge in self.judges.items()}

    @property
    def unreachable_share(self) -> float:
        """Share of the future weight whose target did not exist at the cut."""
        weight = np.asarray(self.future.sum(axis=0), np.float64).ravel()
        return float(weight[len(self.eligible) :].sum() / max(float(weight.sum()), 1e-12))

    @property
    def relevance_metric(self) -> Key:
        """The metric that a frontier's second axis shows: of the first independent judge, else of the first."""
        prefix = "" if any(self.independent[name] for name in self.judges) else _SAME_SOURCE
        return (f"{prefix}relevance@{_LONG}", "all")


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What was measured of one method.

    Attributes:
        values: (T,) per metric and slice, NaN where a trigger has none; the mean counts.
        ratios: (T,) found and (T,) total weight; their sums' ratio counts.
        whole: numbers of all lists together; resampling triggers would change what they mean, so they have no interval.
    """

    values: dict[Key, Values]
    ratios: dict[Key, tuple[Values, Values]] = field(default_factory=dict)
    whole: dict[Key, float] = field(default_factory=dict)

    def estimates(self, *, num_resamples: int, seed: int) -> Iterator[tuple[Key, Estimate]]:
        """Every metric with its interval."""
        for key, values in self.values.items():
            yield key, metrics.bootstrap(values, num_resamples=num_resamples, seed=seed)
        for key, (found, total) in self.ratios.items():
            yield key, metrics.bootstrap_ratio(found, total, num_resamples=num_resamples, seed=seed)
        nothing = float("nan")
        for key, value in self.whole.items():
            yield key, Estimate(value=value, low=nothing, high=nothing, num_triggers=0)


def measure(lists: Ints, exam: Exam) -> Scored:
    """Everything about one method.

    Args:
        lists: (T, K) item indices, K at least 100 or the catalog; -1 for none.
        exam: what to measure on.
    """
    values = _recalls(lists, exam) | _shape_of_lists(lists, exam)
    for name in exam.judges:
        values |= _relevances(lists, exam, name, cutoffs=(_SHORT, _LONG))
        judged = judged_lists(exam.judges[name], exam.triggers, lists[:, :_SHORT])
        values |= _under_keys(exam, name, f"rel_ndcg@{_SHORT}", metrics.rel_ndcg_at_k(judged, exam.ideals[name]))
    ratios = {(f"micro_recall@{k}", "all"): metrics.micro_recall_at_k(lists, exam.future, k=k) for k in _CUTOFFS}
    whole = {}
    for k in (_SHORT, _LONG):
        whole[f"coverage@{k}", "all"] = metrics.coverage_at_k(lists, exam.eligible, k=k)
        whole[f"gini@{k}", "all"] = metrics.gini_at_k(lists, exam.eligible, k=k)
    return Scored(values=values, ratios=ratios, whole=whole)


def measure_axes(lists: Ints, exam: Exam) -> Scored:
    """Recall@100, plain, debiased, of new pairs and of cold targets, and relevance@100 alone: what a point of a swept family needs."""
    values: dict[Key, Values] = {
        (f"recall@{_LONG}", "all"): metrics.recall_at_k(lists, exam.future, k=_LONG),
        (f"debiased_recall@{_LONG}", "all"): metrics.debiased_recall_at_k(lists, exam.future, exam.popularity, k=_LONG),
        **{(f"recall@{_LONG}", part): metrics.recall_at_k(lists, exam.futures[part], k=_LONG) for part in ("new_pairs", "cold_targets")},
    }
    for name in exam.judges:
        values |= _relevances(lists, exam, name, cutoffs=(_LONG,))
    return Scored(values=values, whole={(f"coverage@{_SHORT}", "all"): metrics.coverage_at_k(lists, exam.eligible, k=_SHORT),
                                        (f"gini@{_SHORT}", "all"): metrics.gini_at_k(lists, exam.eligible, k=_SHORT)})  # fmt: skip


def _recalls(lists: Ints, exam: Exam) -> dict[Key, Values]:
    values: dict[Key, Values] = {}
    for k in _CUTOFFS:
        values[f"recall@{k}", "all"] = metrics.recall_at_k(lists, exam.future, k=k)
        values[f"debiased_recall@{k}", "all"] = metrics.debiased_recall_at_k(lists, exam.future, exam.popularity, k=k)
    for name, future in exam.futures.items():
        values[f"recall@{_LONG}", name] = metrics.recall_at_k(lists, future, k=_LONG)
    plain = values[f"recall@{_LONG}", "all"]
    for name, inside in exam.trigger_slices.items():
        values[f"recall@{_LONG}", name] = np.where(inside, plain, np.nan)
    return values


def _relevances(lists: Ints, exam: Exam, name: str, *, cutoffs: tuple[int, ...]) -> dict[Key, Values]:
    judged = judged_lists(exam.judges[name], exam.triggers, lists)
    values: dict[Key, Values] = {}
    for k in cutoffs:
        values |= _under_keys(exam, name, f"relevance@{k}", metrics.relevance_at_k(lists, judged, k=k))
    return values


def _under_keys(exam: Exam, name: str, measure: str, values: Values) -> dict[Key, Values]:
    """(T,) values of one judge, under every key that they are reported by."""
    prefix, slices = exam.judge_keys[name]
    return {(f"{prefix}{measure}", slice_): values for slice_ in slices}


def _shape_of_lists(lists: Ints, exam: Exam) -> dict[Key, Values]:
    return {
        (f"tail_share@{_SHORT}", "all"): metrics.tail_share_at_k(lists, exam.tail, k=_SHORT),
        (f"diversity@{_SHORT}", "all"): metrics.intra_list_diversity_at_k(lists, exam.content, k=_SHORT),
    }
