"""The merged list: how the heads' candidates of a trigger become one list, by rows of `merge_policy`.

    blend   score = p(j|i) + value * max(relevance, 0)
    quota   the engagement order, but for a share `value` of the positions that goes to the relevance order
    rrf     reciprocal rank fusion: by (1 - value) / (60 + rank by p) + value / (60 + rank by relevance), the latter if that head found it

where p(j|i) is the scorer's probability over the trigger's candidates, discounted for popular items and raised for pairs that nobody has
counted yet and for new items, as far as the policy says so, and renormalized:

    log p - popularity_exponent * log popularity_j + new_pair_bonus * [j not counted with i] + new_item_bonus * [j is new]

At the end of a list candidates are about as likely as each other: there a bonus exchanges what is known for what is not, and costs little
recall. Under a blend or a fusion `relevance_share` of the positions can go to relevant items, in the order of relevance + log p / 80: the
most relevant, and of those that are about as relevant the likeliest. With a tenth, every tenth position. A score lets the popular in first;
a place that they cannot take is what less popular items are found in. A policy is data: a changed row needs no training.

Shapes: `B` triggers, `M` candidates of all of them in one flat list (see models.ranking), `K` positions of a list.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from conf.errors import SettingsError
from conf.settings import MOST_BONUS
from models.data import Bools, Floats, Ints
from models.ranking import Longs, best_per_row, best_per_segment, pad, segments
from models.scorer import log_softmax

DEFAULT_SCOPE = "default"
_FIRST_PART = 4  # times what is missing, of a source that fills a list up: most of it is admitted usually
_NATS_OF_RELEVANCE = 80  # log p that full relevance outweighs in relevance's places: chosen on validation, see decision 11
_RANK_OFFSET = 60  # of the paper; it keeps the first ranks from ruling alone


@dataclass(frozen=True, kw_only=True)
class Policy:
    """One row of merge_policy without its scope."""

    kind: str
    value: float
    popularity_exponent: float
    relevance_share: float = 0.0
    new_pair_bonus: float = 0.0
    new_item_bonus: float = 0.0


def read_policies(rows: Iterable[Mapping[str, Any]]) -> dict[str, Policy]:
    """Policies by scope, from rows of merge_policy; a share or bonus that the table of an earlier release does not have is 0.

    Raises:
        SettingsError: naming every bad row: unknown kind, value or exponent out of range, a scope twice, or no default.
    """
    policies: dict[str, Policy] = {}
    faults = []
    for row in rows:
        policy = Policy(
            kind=row["kind"],
            value=row["value"],
            popularity_exponent=row["popularity_exponent"],
            relevance_share=row.get("relevance_share") or 0.0,
            new_pair_bonus=row.get("new_pair_bonus") or 0.0,
            new_item_bonus=row.get("new_item_bonus") or 0.0,
        )
        faults += [f"row scope={row['scope']!r}: {fault}" for fault in _faults(policy)]
        if row["scope"] in policies:
            faults.append(f"row scope={row['scope']!r}: found twice, wanted one row a scope; delete one")
        policies[row["scope"]] = policy
    if DEFAULT_SCOPE not in policies:
        faults.append(f"no row of scope {DEFAULT_SCOPE!r}, have scopes {sorted(policies)}; add one, it rules all other categories")
    if faults:
        raise SettingsError("merge_policy has faults; correct the table and merge again:\n  " + "\n  ".join(faults))
    return policies


def _faults(policy: Policy) -> list[str]:
    if policy.kind not in _KINDS:
        return [f"unknown kind {policy.kind!r}; wanted one of {sorted(_KINDS)}"]
    faults = []
    most = math.inf if policy.kind == "blend" else 1.0
    if not (0 <= policy.value <= most and math.isfinite(policy.value)):
        faults.append(f"value {policy.value} of kind {policy.kind}; wanted a number from 0{' to 1' if most == 1 else ''}")
    if not 0 <= policy.popularity_exponent <= 1:
        faults.append(f"popularity_exponent {policy.popularity_exponent}; wanted a number from 0 to 1")
    if not 0 <= policy.relevance_share <= 1:
        faults.append(f"relevance_share {policy.relevance_share}; wanted a number from 0 to 1")
    bonuses = {"new_pair_bonus": policy.new_pair_bonus, "new_item_bonus": policy.new_item_bonus}
    faults += [f"{name} {bonus}; wanted a number from 0 to {MOST_BONUS}" for name, bonus in bonuses.items() if not 0 <= bonus <= MOST_BONUS]
    if policy.kind == "quota" and policy.relevance_share:
        faults.append(f"relevance_share {policy.relevance_share} of kind quota, whose value is that share; set one of the two")
    return faults


@dataclass(frozen=True, kw_only=True)
class Policies:
    """The policy of each of B triggers: (B,) columns of merge_policy."""

    kind: npt.NDArray[np.str_]
    value: Floats
    popularity_exponent: Floats
    relevance_share: Floats
    new_pair_bonus: Floats
    new_item_bonus: Floats

    @classmethod
    def for_triggers(cls, policies: Mapping[str, Policy], coarsest: Sequence[str | None]) -> Self:
        """Choose by the (B,) triggers' coarsest categories; those without a row of their own, or without a category, take the default."""
        return cls._of([policies.get(name or DEFAULT_SCOPE, policies[DEFAULT_SCOPE]) for name in coarsest])

    @classmethod
    def same(cls, policy: Policy, num_triggers: int) -> Self:
        """One policy for everybody."""
        return cls._of([policy] * num_triggers)

    @classmethod
    def _of(cls, chosen: Sequence[Policy]) -> Self:
        names = [column.name for column in fields(cls) if column.name != "kind"]
        numbers = {name: np.array([getattr(policy, name) for policy in chosen], dtype=np.float32) for name in names}
        return cls(kind=np.array([policy.kind for policy in chosen], dtype=np.str_), **numbers)

    def part(self, start: int, stop: int) -> Self:
        """The policies of triggers start to stop."""
        return type(self)(**{name: column[start:stop] for name, column in vars(self).items()})

    def of(self, trigger: int) -> Policy:
        """The policy of one trigger, with 0.01 and not 0.009999999776: the numbers that were written into it."""
        numbers = {name: float(str(column[trigger])) for name, column in vars(self).items() if name != "kind"}
        return Policy(kind=str(self.kind[trigger]), **numbers)


@dataclass(frozen=True, kw_only=True)
class CandidateSet:
    """What merging reads about M candidates.

    Attributes:
        offsets: (B + 1,).
        log_p: (M,) log p(j|i), normalized over the trigger's candidates.
        relevance: (M,) score of the relevance head.
        log_popularity: (M,) log of the candidate's floored popularity.
        found_by_relevance: (M,) the relevance head proposed it.
        counted: (M,) it has a counted pair with the trigger, of any weight.
        new: (M,) hardly anybody has engaged with it yet.
    """

    offsets: Longs
    log_p: Floats
    relevance: Floats
    log_popularity: Floats
    found_by_relevance: Bools
    counted: Bools
    new: Bools


@dataclass(frozen=True, kw_only=True)
class Merged:
    """R positions of merged lists: which of the M candidates, with what score, offered only to fill up; (B + 1,) offsets."""

    position: Longs
    offsets: Longs
    score: Floats
    filled: Bools

    def only(self, kept: Longs, offsets: Longs) -> Self:
        """Some of the R positions, with their offsets."""
        return type(self)(position=self.position[kept], offsets=offsets, score=self.score[kept], filled=self.filled[kept])


@dataclass(frozen=True, kw_only=True)
class _Order:
    """(M,) order key (highest first) and whether a candidate would only fill up."""

    key: Floats
    filled: Bools


def merge_candidates(candidates: CandidateSet, policies: Policies, *, k: int) -> Merged:
    """Merged lists of B triggers, each by its own policy.

    A blend's score is its order, but where a share goes to relevance; the others' is the probability, discounted and raised, which need
    not descend along the list. So scores are probabilities under every policy but for a blend's relevance, and can be
    compared across triggers.
    """
    segment = segments(candidates.offsets)
    log_p = _log_probability(candidates, policies, segment)
    p = np.exp(log_p)
    key, score, filled = p, p, np.zeros(len(p), dtype=np.bool_)
    for kind in np.unique(policies.kind):
        mine = (policies.kind == kind)[segment]
        key = np.where(mine, _KINDS[str(kind)](candidates, p, policies.value), key)
        if kind == "blend":
            score = np.where(mine, key, score)
    is_quota = policies.kind == "quota"
    share = np.where(is_quota, policies.value, policies.relevance_share)
    if (shared := is_quota | (share > 0)).any():
        likelier = np.where(is_quota, np.float32(0), np.float32(1 / _NATS_OF_RELEVANCE))  # a quota is what it is elsewhere, to compare with
        relevance = np.where(candidates.found_by_relevance, candidates.relevance + likelier[segment] * log_p, -np.inf)
        order = _interleaved(candidates.offsets, key, relevance.astype(np.float32), share, k)
        key = np.where(shared[segment], order.key, key)
        filled = is_quota[segment] & order.filled  # a blend or a fusion is for all positions: what it has there is no filling
    position, offsets = best_per_segment(key, candidates.offsets, k)
    return Merged(position=position, offsets=offsets, score=score[position], filled=filled[position])


def _log_probability(candidates: CandidateSet, policies: Policies, segment: Longs) -> Floats:
    """(M,) log p(j|i) after the popularity discount and the bonuses."""
    moving = (policies.popularity_exponent, policies.new_pair_bonus, policies.new_item_bonus)
    if not len(segment) or not any(column.any() for column in moving):
        return candidates.log_p
    exponent, pair_bonus, item_bonus = (column[segment] for column in moving)
    moved = candidates.log_p - exponent * candidates.log_popularity + pair_bonus * ~candidates.counted + item_bonus * candidates.new
    return log_softmax(moved, segment.astype(np.int32))


def _blend(candidates: CandidateSet, p: Floats, value: Floats) -> Floats:
    return p + value[segments(candidates.offsets)] * np.maximum(candidates.relevance, 0)


def _quota(candidates: CandidateSet, p: Floats, value: Floats) -> Floats:
    return p


def _interleaved(offsets: Longs, key: Floats, relevance: Floats, shares: Floats, k: int) -> _Order:
    """A share of the positions goes to the order of (M,) relevance, in which -inf is not, the rest to that of the key.

    Every candidate takes the earliest slot its ranks give it; a repeat's later slot falls away and what follows moves up.
    What lies behind position K plus the row's repeats is there only because the other order ran out: it fills up.
    """
    by_key, by_relevance = best_per_row(pad(key, offsets), k), best_per_row(pad(relevance, offsets), k)
    width = int(np.diff(offsets).max(initial=0))
    slots = np.full((2, len(shares), width + 1), np.inf, dtype=np.float32)  # one column more takes the -1 of short rows
    for share in np.unique(shares):
        rows = np.flatnonzero(shares == share)[:, None]
        for side, columns, own in zip(slots, (by_key, by_relevance), slots_of_share(float(share), by_key.shape[1]), strict=True):
            side[rows, columns[rows[:, 0]]] = own
    slots = slots[:, :, :-1]
    repeats = np.isfinite(slots).all(axis=0).sum(axis=1, keepdims=True)
    slot = slots.min(axis=0, initial=np.inf)
    inside = np.arange(width) < np.diff(offsets)[:, None]
    return _Order(key=-slot[inside], filled=(slot > k + repeats)[inside])


def slots_of_share(share: float, k: int) -> tuple[Floats, Floats]:
    """(k,) positions from 1 of the engagement order's ranks and of the relevance order's: floor(t * share) of the first t."""
    positions = np.arange(1, 2 * k + 1)
    taken = np.floor(positions * share + 1e-6)  # 0.3 of 10 is 3, whatever the last bit of 0.3 says
    is_relevance = np.diff(taken, prepend=0) > 0
    beyond = 2 * k + positions  # ranks that the share leaves no room for come last, in order
    engagement, relevance = (np.concatenate([positions[mine], beyond])[:k] for mine in (~is_relevance, is_relevance))
    return engagement.astype(np.float32), relevance.astype(np.float32)


def _rrf(candidates: CandidateSet, p: Floats, value: Floats) -> Floats:
    """Cormack, Clarke and Buettcher (2009), weighted; an order without a candidate gives it nothing."""
    segment = segments(candidates.offsets)
    relevance = np.where(candidates.found_by_relevance, candidates.relevance, -np.inf).astype(np.float32)
    by_p, by_relevance = _reciprocal_ranks(p, candidates.offsets), _reciprocal_ranks(relevance, candidates.offsets)
    return ((1 - value[segment]) * by_p + value[segment] * by_relevance).astype(np.float32)


def _reciprocal_ranks(score: Floats, offsets: Longs) -> Floats:
    """(M,) 1 / (60 + rank from 1), 0 for -inf."""
    position, starts = best_per_segment(score, offsets, max(1, int(np.diff(offsets).max(initial=0))))
    out = np.zeros(len(score), dtype=np.float32)
    out[position] = 1 / (_RANK_OFFSET + 1 + np.arange(len(position)) - starts[segments(starts)])
    return out


_KINDS: dict[str, Callable[[CandidateSet, Floats, Floats], Floats]] = {"blend": _blend, "quota": _quota, "rrf": _rrf}


@dataclass(frozen=True, kw_only=True)
class FillOrder:
    """What fills a merged list up when there are fewer candidates than positions.

    Attributes:
        popular: (E,) eligible items, most popular first.
        by_category: (G,) eligible items with a category, by coarsest category, most popular first within.
        category: (G,) their coarsest category codes, ascending.
    """

    popular: Ints
    by_category: Ints
    category: Ints

    @classmethod
    def build(cls, popularity: Floats, eligible: Bools, coarsest: Ints) -> Self:
        """From (N,) popularity, eligibility and coarsest category codes (-1: none)."""
        items = np.flatnonzero(eligible).astype(np.int32)
        popular = items[np.argsort(-popularity[items], kind="stable")]
        some = popular[coarsest[popular] >= 0]
        by_category = some[np.argsort(coarsest[some], kind="stable")]
        return cls(popular=popular, by_category=by_category, category=coarsest[by_category].astype(np.int32))

    @cached_property
    def _ranks(self) -> Ints:
        """Place of each item in `popular`, -1 of one that is not eligible."""
        ranks = np.full(int(self.popular.max(initial=-1)) + 1, -1, np.int32)
        ranks[self.popular] = np.arange(len(self.popular), dtype=np.int32)
        return ranks

    @cached_property
    def _categories(self) -> Ints:
        categories = np.full(len(self._ranks), -1, np.int32)
        categories[self.by_category] = self.category
        return categories

    def category_of(self, items: Ints) -> Ints:
        """Coarsest category codes of some eligible items, -1 for none."""
        return self._categories[items]

    def narrowed(self, items: Ints) -> Self:
        """The same order of some items alone, each once."""
        known = items[items < len(self._ranks)]
        popular = self.popular[np.sort(self._ranks[known][self._ranks[known] >= 0])]
        some = popular[self._categories[popular] >= 0]
        by_category = some[np.argsort(self._categories[some], kind="stable")]
        return type(self)(popular=popular, by_category=by_category, category=self._categories[by_category])

    def fill(
        self, listed: Ints, *, trigger: int, coarsest: int, k: int, admit: Callable[[Ints, Ints], Ints] | None = None
    ) -> tuple[Ints, int]:
        """Items to append to one list of fewer than k: first of the trigger's category, then of all, most popular first.

        Args:
            listed: what the list holds.
            trigger: its item.
            coarsest: the trigger's coarsest category code, -1 for none.
            k: most items of the list.
            admit: items listed and items in order -> those of the latter that the list may hold; None: all.

        Returns:
            The items, and how many of them come from the category.
        """
        start, stop = np.searchsorted(self.category, (coarsest, coarsest + 1)) if coarsest >= 0 else (0, 0)
        taken = np.append(listed, np.int32(trigger))
        first = _admitted(self.by_category[start:stop], listed, taken, k - len(listed), admit)
        listed, taken = np.concatenate([listed, first]), np.concatenate([taken, first])
        then = _admitted(self.popular, listed, taken, k - len(listed), admit)
        return np.concatenate([first, then]), len(first)


def _admitted(source: Ints, listed: Ints, taken: Ints, missing: int, admit: Callable[[Ints, Ints], Ints] | None) -> Ints:
    """The first items of a source that a list may hold, `missing` at most; looks at ever larger parts of the source."""
    found, start, size = listed[:0], 0, _FIRST_PART * (len(taken) + missing)
    while len(found) < missing and start < len(source):
        some = _without(source[start : start + size], taken)
        more = some if admit is None else admit(np.concatenate([listed, found]), some)
        found, start, size = np.concatenate([found, more])[:missing], start + size, _FIRST_PART * size
    return found


def _without(items: Ints, taken: Ints) -> Ints:
    return items[~np.isin(items, taken)]
