"""What a backtest concludes: settings chosen on validation slices, and paired comparisons at exactly these settings.

A list can buy relevance with recall and the other way round, so lists are compared where one axis is held: `at recall kept` is the most
relevant mix whose validation recall is not below the best engagement-only baseline's, `at relevance kept` the mix of most recall whose
validation relevance is not below that baseline's. The popularity dial is turned as far as plain recall stays at least that of raw counts:
`at recall of counts` is the exponent of most debiased recall among these. The bonuses of new pairs and of new items are those that find
most of them with recall kept, once against the best engagement-only baseline, once against the baseline that itself finds most of them
(content finds new items, and little else). Not below means: not even at the lower end of the 95 % interval of the paired difference. The
largest mix whose mean is not below is one that luck has helped, and falls below on the next slice.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from jobs.backtest_results import DIAL, ENCODER, NEW_ITEM_BONUS, NEW_PAIR_BONUS, OURS, SWEPT, Comparison, Method, name_of
from models import metrics
from models.distillation import DISTILLED
from models.metrics import Estimate, Values
from models.scoreboard import Exam, Key, Scored

RECALL: Key = ("recall@100", "all")
DEBIASED: Key = ("debiased_recall@100", "all")
CONTENT: Method = ("content", "-")
COUNTS: Method = ("counts", "-")
_BONUSES: Mapping[str, Key] = {NEW_PAIR_BONUS: ("recall@100", "new_pairs"), NEW_ITEM_BONUS: ("recall@100", "cold_targets")}
_DIALS = (DIAL, *_BONUSES)
_BLEND = SWEPT[0]
_AT_FINDERS_RECALL = "at the recall of the baseline that finds most"
_TWO_SIDED_95 = 1.96  # standard errors


@dataclass(frozen=True, kw_only=True)
class Board:
    """All methods on one cut, and per swept family its mixes in order."""

    exam: Exam
    methods: Mapping[Method, Scored]
    families: Mapping[str, Mapping[str, Scored]]

    @property
    def engagement_only(self) -> list[Method]:
        """Baselines that know nothing of content."""
        return [method for method in self.methods if method[0] != OURS and method != CONTENT]

    def strongest(self, key: Key) -> Method:
        """The baseline, content among them, with the highest mean of a measure."""
        return strongest([self], [*self.engagement_only, CONTENT], key)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What validation chose: the baseline to beat, per family a mix for each held axis (None: no mix holds it), an exponent, and per family
    of bonuses one with recall kept against that baseline, the baseline that finds most, and a bonus with recall kept against that one.
    """

    baseline: Method
    at_recall: Mapping[str, str | None]
    at_relevance: Mapping[str, str | None]
    exponent: str | None
    bonuses: Mapping[str, str | None]
    finders: Mapping[str, Method]
    finders_bonuses: Mapping[str, str | None]

    def described(self) -> dict[str, str]:
        """For the report."""
        chosen = {"best engagement-only baseline": name_of(self.baseline)}
        for words, mixes in (("at recall kept", self.at_recall), ("at relevance kept", self.at_relevance)):
            chosen |= {f"{family} {words}": mix or "no mix holds it" for family, mix in mixes.items() if family not in _DIALS}
        chosen[f"{DIAL} at recall of counts"] = self.exponent or "no exponent holds it"
        for words, bonuses in (("at recall kept", self.bonuses), (_AT_FINDERS_RECALL, self.finders_bonuses)):
            chosen |= {f"{family} {words}": bonus or "no bonus holds it" for family, bonus in bonuses.items()}
        return chosen


def strongest(boards: Sequence[Board], methods: Sequence[Method], key: Key) -> Method:
    """The method with the highest mean of a measure over the slices."""
    return max(methods, key=lambda method: _mean([board.methods[method] for board in boards], key))


def choose(boards: Sequence[Board]) -> Choice:
    """Choose on one or several validation slices, by the mean over them; baselines that some slice lacks are not chosen."""
    relevance = boards[0].exam.relevance_metric
    engagement_only = [method for method in boards[0].engagement_only if all(method in board.methods for board in boards)]
    baseline = strongest(boards, engagement_only, RECALL)
    finders = {family: strongest(boards, [*engagement_only, CONTENT], found) for family, found in _BONUSES.items()}

    def best(family: str, kept: Key, wanted: Key, *, against: Method = baseline) -> str | None:
        points = {mix: [board.families[family][mix] for board in boards] for mix in boards[0].families.get(family, {})}
        measured = [mix for mix, scored in points.items() if _mean(scored, wanted) >= 0]
        holding = [mix for mix in measured if _holds(points[mix], [board.methods[against] for board in boards], kept)]
        return max(holding, key=lambda mix: _mean(points[mix], wanted), default=None)

    families = list(boards[0].families)
    return Choice(
        baseline=baseline,
        at_recall={family: best(family, RECALL, relevance) for family in families},
        at_relevance={family: best(family, relevance, RECALL) for family in families},
        exponent=best(DIAL, RECALL, DEBIASED, against=COUNTS),
        bonuses={family: best(family, RECALL, found) for family, found in _BONUSES.items()},
        finders=finders,
        finders_bonuses={family: best(family, RECALL, found, against=finders[family]) for family, found in _BONUSES.items()},
    )


def _mean(scored: Sequence[Scored], key: Key) -> float:
    """Over slices, of the means over triggers; -1 where a slice has no trigger with that measure."""
    means = [float(np.nanmean(one.values[key])) if not np.isnan(one.values[key]).all() else -1.0 for one in scored]
    return min(means) if min(means) < 0 else float(np.mean(means))


def _holds(ours: Sequence[Scored], theirs: Sequence[Scored], key: Key) -> bool:
    """Whether the mean over slices of the paired differences is above 0 or 0 at the lower end of its 95 % interval (normal)."""
    differences = [mine.values[key] - other.values[key] for mine, other in zip(ours, theirs, strict=True)]
    known = [difference[~np.isnan(difference)] for difference in differences]
    error = np.sqrt(sum(part.var() / len(part) for part in known)) / len(known)
    return bool(np.mean([part.mean() for part in known]) - _TWO_SIDED_95 * error >= 0)


def compare(board: Board, choice: Choice, *, num_resamples: int, seed: int) -> list[Comparison]:
    """Every comparison that the summary speaks of, ours against theirs over the same triggers.

    A baseline that was chosen and that this slice lacks, as EASE where the catalog has outgrown it, gives way to the best one here.
    """
    pairs = _Pairs(board=board, num_resamples=num_resamples, seed=seed)
    if choice.baseline not in board.methods:
        choice = replace(choice, baseline=strongest([board], board.engagement_only, RECALL))
    finders = {
        family: method if method in board.methods else board.strongest(_BONUSES[family]) for family, method in choice.finders.items()
    }
    choice = replace(choice, finders=finders)
    held = (_against_baseline, _with_one_axis_held, _with_popularity_discounted, _with_the_new_raised, _against_blends)
    return [comparison for compared in held for comparison in compared(pairs, choice)]


@dataclass(frozen=True, kw_only=True)
class _Pairs:
    board: Board
    num_resamples: int
    seed: int

    @property
    def blends(self) -> list[str]:
        """Families that are not ours."""
        return [family for family in self.board.families if not family.startswith(OURS)]

    def scored(self, method: Method) -> Scored:
        found = self.board.methods.get(method)
        return found if found is not None else self.board.families[method[0]][method[1]]

    def difference(self, name: str, key: Key, ours: Method, theirs: Method) -> Iterator[Comparison]:
        """Nothing where one of the two was not measured so."""
        mine, other = self.scored(ours).values.get(key), self.scored(theirs).values.get(key)
        if mine is None or other is None:
            return
        found = metrics.paired_difference(mine, other, num_resamples=self.num_resamples, seed=self.seed)
        both = ~np.isnan(mine) & ~np.isnan(other)
        alone = float(other[both].mean()) if both.any() else float("nan")
        yield self._comparison(name, key[0], name_of(ours), name_of(theirs), found, alone)

    def areas(self, name: str, ours: str, theirs: str, *, against: Key) -> Iterator[Comparison]:
        """Of recall and another measure, by the settings alone and with mixtures of them."""
        mine, other = _axes(self.board, ours, against), _axes(self.board, theirs, against)
        for what, mixtures in (("hypervolume", False), ("hypervolume with mixtures", True)):
            found = metrics.paired_hypervolume(*mine, *other, num_resamples=self.num_resamples, seed=self.seed, mixtures=mixtures)
            alone = metrics.bootstrap_hypervolume(*other, num_resamples=1, seed=self.seed, mixtures=mixtures)
            yield self._comparison(name, what, ours, theirs, found, alone.value)

    def _comparison(self, name: str, what: str, ours: str, theirs: str, found: Estimate, alone: float) -> Comparison:
        return Comparison(
            name=name, what=what, ours=ours, theirs=theirs, value=found.value, low=found.low, high=found.high, baseline_value=alone
        )


def _axes(board: Board, family: str, against: Key) -> tuple[Values, Values]:
    """(T, P) recall and (T, P) of another measure of a family's mixes."""
    points = board.families[family].values()
    recall, other = ([scored.values[key] for scored in points] for key in (RECALL, against))
    return np.stack(recall, axis=1), np.stack(other, axis=1)


def hypervolumes(board: Board, *, num_resamples: int, seed: int) -> dict[str, Estimate]:
    """Area under each family's frontier of recall and relevance."""
    axes = {family: _axes(board, family, board.exam.relevance_metric) for family in board.families}
    return {family: metrics.bootstrap_hypervolume(*both, num_resamples=num_resamples, seed=seed) for family, both in axes.items()}


def _against_baseline(pairs: _Pairs, choice: Choice) -> Iterator[Comparison]:
    relevance = pairs.board.exam.relevance_metric
    short = (relevance[0].replace("@100", "@10"), relevance[1])
    for head in ("engagement", "merged"):
        for key in (RECALL, DEBIASED, ("recall@10", "all"), relevance, short):
            yield from pairs.difference(f"{head} list against the best baseline", key, (OURS, head), choice.baseline)
    for vectors, words in {ENCODER: "engagement vectors", DISTILLED: "distilled vectors"}.items():
        if (OURS, vectors) in pairs.board.methods:
            for key in (RECALL, DEBIASED, relevance):
                yield from pairs.difference(f"{words} alone against the best baseline", key, (OURS, vectors), choice.baseline)
    for part in ("new_pairs", "cold_triggers", "cold_targets"):
        strongest = pairs.board.strongest((RECALL[0], part))
        for head in ("engagement", "merged"):
            name = f"{head} list on {part.replace('_', ' ')} against the baseline that is best there"
            yield from pairs.difference(name, (RECALL[0], part), (OURS, head), strongest)


def _with_one_axis_held(pairs: _Pairs, choice: Choice) -> Iterator[Comparison]:
    """The headline of the method: relevance at no recall loss, recall at no relevance loss."""
    relevance = pairs.board.exam.relevance_metric
    held = (("relevance at recall kept", choice.at_recall, (relevance, RECALL)),
            ("recall at relevance kept", choice.at_relevance, (RECALL, relevance)))  # fmt: skip
    for name, mixes, keys in held:
        if (mix := mixes[_BLEND]) is not None:
            for key in keys:
                yield from pairs.difference(name, key, (_BLEND, mix), choice.baseline)


def _with_popularity_discounted(pairs: _Pairs, choice: Choice) -> Iterator[Comparison]:
    """Debiased recall against the baseline that has most of it, and what plain recall that costs against raw counts."""
    if choice.exponent is None:
        return
    for key, theirs in ((DEBIASED, pairs.board.strongest(DEBIASED)), (RECALL, COUNTS)):
        yield from pairs.difference("popularity discounted at recall of counts", key, (DIAL, choice.exponent), theirs)


def _with_the_new_raised(pairs: _Pairs, choice: Choice) -> Iterator[Comparison]:
    """Recall of new pairs and of new items against the baseline that has most of it, and what recall of all that costs; then their whole
    frontiers against those of the blends.
    """
    for family, found in _BONUSES.items():
        words, finder = family.removeprefix(f"{OURS}_").replace("_", " "), pairs.board.strongest(found)
        if (bonus := choice.bonuses[family]) is not None:
            yield from pairs.difference(f"{words} found at recall kept", found, (family, bonus), finder)
            yield from pairs.difference(f"recall kept with {words} raised", RECALL, (family, bonus), choice.baseline)
        if (bonus := choice.finders_bonuses[family]) is not None:
            yield from pairs.difference(f"{words} found {_AT_FINDERS_RECALL}", found, (family, bonus), finder)
            yield from pairs.difference(f"{words} found {_AT_FINDERS_RECALL}", RECALL, (family, bonus), choice.finders[family])
        if family in pairs.board.families:
            for blend in pairs.blends:
                yield from pairs.areas(f"whole frontier of recall and {words}", family, blend, against=found)


def _against_blends(pairs: _Pairs, choice: Choice) -> Iterator[Comparison]:
    for family in pairs.blends:
        yield from pairs.areas("whole frontier", _BLEND, family, against=pairs.board.exam.relevance_metric)
        ours, theirs = choice.at_recall[_BLEND], choice.at_recall[family]
        if ours is not None and theirs is not None:
            for key in (pairs.board.exam.relevance_metric, RECALL):
                yield from pairs.difference("at recall kept against a blend", key, (_BLEND, ours), (family, theirs))
