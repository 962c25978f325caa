"""The calibrated merge scorer: how likely is each candidate to be the trigger's next partner.

Fitted once a night on the last slice of engagements with features of everything before it, then frozen and applied to features of
everything. All features are logarithms, so that the scorer is a small log-linear model with tanh units:

    logit = w . z + v . tanh(W z + b),  z = (features - mean) / scale;   p(j given i) = softmax of the logits over i's candidates

It knows what was engaged with and when, and nothing of content or relevance: with their cosines among the features it fitted what the last
slice's few heavy users browsed, and lost a quarter of recall on the next slice of ifdb_games. Relevance enters by the merge policy alone.

Applied with numpy alone (Spark tasks have no torch); torch is imported where it is fitted.
Shapes: `N` items, `T` triggers, `M` candidates of all triggers together, `F` features, `V` vector length.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from conf.errors import TableError
from conf.settings import RetrievalSettings
from models.data import LOG_AGE, TRENDS, Floats, History, Ints, Sparse
from models.draws import Keys, uniform
from models.ranking import blocks
from models.user_level import UserLevel

if TYPE_CHECKING:
    import torch

_OF_PAIR = (
    *("head_log_p", "smooth_log_p", "log_popularity", "log_count", "user_level_log_p", "user_level_log_count"),
    *(*TRENDS, "log_days_apart"),
)
# the same for all candidates of a trigger: these order nothing by themselves, and say how far to trust the others
_OF_TRIGGER = ("trigger_log_count", "trigger_user_level_log_count", "trigger_log_age")
FEATURES = (*_OF_PAIR, *_OF_TRIGGER)
PRIOR_WEIGHT = 30.0  # mu of the smoothed count, in decayed user-days: against 3, +.005 recall@100 on ifdb_games, level on retail_gifts
USER_LEVEL_PRIOR_WEIGHT = 3.0  # the same of user-level co-engagement, whose weights are shares of a user
READS = {
    "features": list(FEATURES),
    "prior_weights": [PRIOR_WEIGHT, USER_LEVEL_PRIOR_WEIGHT],
}  # weights fitted on anything else mean nothing here
_HEAD_SHARE = 0.9  # of the fallback mixture: the counts' tenth adds what the factorization does not memorize
_PATIENCE = 8  # passes without a better held-out loss
_COLD = (0.02, 0.0)  # learning rate, and standard errors by which a held-out loss must be lower than at the start
_WARM = (0.005, 2.0)  # from last night's weights: what gains less is noise of the slice, and would change every list
_BATCH = 40  # triggers per step
_CACHED_ROWS = 8_192  # whose hidden units stay in cache: seven times as fast as all at once
_NOTHING = 1e-3  # standard deviation of a feature, nearly all of which are logarithms, below which it is a constant
MIN_TRIGGERS = 50  # fewer say nothing about (F + 2) * 12 + F weights


def candidate_features(
    *,
    head_log_p: Floats,
    count: Floats,
    count_row_sum: Floats,
    user_level: Floats,
    user_level_row_sum: Floats,
    popularity_p: Floats,
    trends: Floats,
    trigger_log_age: Floats,
) -> Floats:
    """Features of M (trigger, candidate) pairs, used when fitting and when listing.

    Args:
        head_log_p: (M,) log softmax of the engagement head over the trigger's candidates.
        count: (M,) decayed co-engagement weight, 0 where nothing is counted.
        count_row_sum: (M,) the trigger's weight over all partners.
        user_level: (M,) user-level co-engagement, 0 where too few users know both.
        user_level_row_sum: (M,) the trigger's over all partners.
        popularity_p: (M,) the candidate's share of decayed user-days, > 0 (floored).
        trends: (M, S) the candidate's `models.data.TRENDS`.
        trigger_log_age: (M,) column LOG_AGE of the trigger's trends.

    Returns:
        (M, F) float32 in the order of FEATURES. smooth_log_p is log((count + mu p) / (row sum + mu)), likewise user_level_log_p;
        log_days_apart is log(1 + days between the first user-days of trigger and candidate).
    """
    of_pair = (
        head_log_p,
        _smoothed(count, count_row_sum, popularity_p, PRIOR_WEIGHT),
        np.log(popularity_p),
        np.log1p(count),
        _smoothed(user_level, user_level_row_sum, popularity_p, USER_LEVEL_PRIOR_WEIGHT),
        np.log1p(user_level),
    )
    days_apart = np.abs(np.expm1(trends[:, LOG_AGE]) - np.expm1(trigger_log_age))
    others = (np.log1p(days_apart), np.log1p(count_row_sum), np.log1p(user_level_row_sum), trigger_log_age)
    return np.concatenate([np.stack(of_pair, axis=1), trends, np.stack(others, axis=1)], axis=1).astype(np.float32)


def _smoothed(weight: Floats, row_sum: Floats, popularity_p: Floats, prior_weight: float) -> Floats:
    return np.asarray(np.log((weight + prior_weight * popularity_p) / (row_sum + prior_weight)), dtype=np.float32)


def log_softmax(logits: Floats, segment: Ints) -> Floats:
    """(M,) log softmax inside each segment; `segment` (M,) ascends."""
    starts = np.flatnonzero(np.diff(segment, prepend=-1))
    lengths = np.diff(starts, append=len(segment))
    top = np.repeat(np.maximum.reduceat(logits, starts), lengths)
    total = np.repeat(np.add.reduceat(np.exp(logits - top), starts), lengths)
    return np.asarray(logits - top - np.log(total), dtype=np.float32)


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """Frozen weights; with `hidden` None the fixed mixture log(0.9 p_head + 0.1 p_smooth), for want of anything to fit on.

    Attributes:
        mean: (F,) and scale: (F,) of the standardization.
        linear: (F,) weights.
        hidden: (F, H) weights into the tanh units.
        hidden_bias: (H,).
        output: (H,) weights out of them.
    """

    mean: Floats
    scale: Floats
    linear: Floats
    hidden: Floats | None
    hidden_bias: Floats
    output: Floats

    @classmethod
    def mixture(cls) -> Self:
        """The scorer without a fit."""
        zero, one = np.zeros(len(FEATURES), dtype=np.float32), np.ones(len(FEATURES), dtype=np.float32)
        return cls(mean=zero, scale=one, linear=zero, hidden=None, hidden_bias=zero[:0], output=zero[:0])

    def logits(self, features: Floats) -> Floats:
        """(M, F) -> (M,); a constant per trigger is left open."""
        if self.hidden is None:
            by_head, by_count = np.log(_HEAD_SHARE) + features[:, 0], np.log(1 - _HEAD_SHARE) + features[:, 1]
            return np.asarray(np.logaddexp(by_head, by_count), dtype=np.float32)
        logits = np.empty(len(features), dtype=np.float32)
        for start in range(0, len(features), _CACHED_ROWS):
            z = (features[start : start + _CACHED_ROWS] - self.mean) / self.scale
            units = z @ self.hidden
            units += self.hidden_bias
            logits[start : start + len(z)] = z @ self.linear + np.tanh(units, out=units) @ self.output
        return logits

    def log_probability(self, features: Floats, segment: Ints) -> Floats:
        """(M,) log p(j given i) over each trigger's candidates; `segment` ascends."""
        return log_softmax(self.logits(features), segment)

    def to_content(self) -> dict[str, Any]:
        """As JSON, floats as they are."""
        weights = {name: None if value is None else value.tolist() for name, value in self.__dict__.items()}
        return {**READS, **weights}

    @classmethod
    def from_content(cls, content: Mapping[str, Any], *, where: str) -> Self:
        """What `to_content` gave.

        Raises:
            TableError: it was not fitted on what this code computes (READS); `where` it was read is said.
        """
        found = {name: content.get(name) for name in READS}
        if found != READS:
            raise TableError(
                f"{where} is of other code: it was fitted on {found}, this code computes {READS}; run the night again with "
                "--force, or wait for the next one"
            )
        names = ("mean", "scale", "linear", "hidden", "hidden_bias", "output")
        arrays: dict[str, Any] = {name: None if content[name] is None else np.asarray(content[name], dtype=np.float32) for name in names}
        return cls(**arrays)

    def save(self, path: Path) -> None:
        """Write `to_content` as a file."""
        path.write_text(json.dumps(self.to_content()))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            TableError: it was not fitted on what this code computes.
        """
        return cls.from_content(json.loads(Path(path).read_text()), where=str(path))


@dataclass(frozen=True, kw_only=True)
class HeadVectors:
    """(N, V) vectors of a head; score = trigger . target."""

    trigger: Floats
    target: Floats


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Candidates of T triggers, one flat list.

    Attributes:
        segment: (M,) ascending row of `triggers`.
        target: (M,) item indices.
        features: (M, F).
        gain: (M,) share of the trigger's future partners that this candidate is; sums to at most 1 per trigger.
    """

    segment: Ints
    target: Ints
    features: Floats
    gain: Floats


@dataclass(frozen=True, kw_only=True)
class Widths:
    """How many candidates each source proposes per trigger: as at list time, whose scores are fitted here."""

    counts: int
    users: int
    head: int
    content: int
    popular: int

    @classmethod
    def of(cls, settings: RetrievalSettings) -> Self:
        """Those of a night."""
        return cls(
            counts=settings.num_candidates_counts,
            users=settings.num_candidates_users,
            head=settings.num_candidates_near,
            content=settings.num_candidates_content,
            popular=settings.num_candidates_popular,
        )


@dataclass(frozen=True, kw_only=True)
class CandidateSource:
    """Everything candidates and their features are made from, as of one time.

    Attributes:
        history: pairs, popularity and trends.
        user_level: of the same time.
        content: (N, C).
        engagement: vectors of the engagement head.
        relevance: vectors of the relevance head.
        popularity_p: (N,) floored share of decayed user-days.
        eligible: (N,) may be a candidate.
    """

    history: History
    user_level: UserLevel
    content: Floats
    engagement: HeadVectors
    relevance: HeadVectors
    popularity_p: Floats
    eligible: npt.NDArray[np.bool_]

    def propose(self, triggers: Ints, truth: Sparse, *, widths: Widths) -> Candidates:
        """Candidates of some triggers.

        Args:
            triggers: (T,) item indices.
            truth: (T, N) future weight per trigger.
            widths: candidates per source.
        """
        parts = [self._propose(triggers[rows], truth[rows], widths, rows.start) for rows in blocks(len(triggers), len(self.eligible))]
        return Candidates(
            **{name: np.concatenate([getattr(part, name) for part in parts]) for name in ("segment", "target", "features", "gain")}
        )

    @cached_property
    def _said(self) -> npt.NDArray[np.bool_]:
        """(N,) something is said of the item; others are near nothing by content."""
        said: npt.NDArray[np.bool_] = (self.content != 0).any(axis=1)
        return said

    def _popular(self, width: int) -> npt.NDArray[np.bool_]:
        """(1, N) the most popular ones, the same for every trigger."""
        chosen = np.zeros((1, len(self.eligible)), dtype=np.bool_)
        _choose(chosen, np.where(self.eligible, self.popularity_p, -np.inf)[None], width, above=-np.inf)
        return chosen

    def _propose(self, triggers: Ints, truth: Sparse, widths: Widths, offset: int) -> Candidates:
        engagement = self.engagement.trigger[triggers] @ self.engagement.target.T  # (T, N)
        relevance = self.relevance.trigger[triggers] @ self.relevance.target.T
        content = np.where(self._said[triggers][:, None] & self._said, self.content[triggers] @ self.content.T, -np.inf)
        counts: Floats = self.history.pairs[triggers].toarray()
        users: Floats = self.user_level.rows(triggers).toarray()
        chosen = np.broadcast_to(self._popular(widths.popular), counts.shape).copy()
        for scores, width in ((engagement, widths.head), (relevance, widths.head), (content, widths.content)):
            _choose(chosen, np.where(self.eligible, scores, -np.inf), width, above=-np.inf)
        for scores, width in ((counts, widths.counts), (users, widths.users)):
            _choose(chosen, np.where(self.eligible, scores, 0), width, above=0.0)
        chosen[np.arange(len(triggers)), triggers] = False
        row, target = np.nonzero(chosen)
        future = truth.toarray()
        return Candidates(
            segment=(row + offset).astype(np.int32),
            target=target.astype(np.int32),
            features=candidate_features(
                head_log_p=log_softmax(engagement[row, target], row.astype(np.int32)),
                count=counts[row, target],
                count_row_sum=counts.sum(axis=1)[row],
                user_level=users[row, target],
                user_level_row_sum=users.sum(axis=1)[row],
                popularity_p=self.popularity_p[target],
                trends=self.history.trends[target],
                trigger_log_age=self.history.trends[triggers[row], LOG_AGE],
            ),
            gain=(future / np.maximum(future.sum(axis=1, keepdims=True), 1e-12))[row, target].astype(np.float32),
        )


def _choose(chosen: npt.NDArray[np.bool_], scores: Floats, width: int, *, above: float) -> None:
    """Mark the `width` best of each row that score more than `above`."""
    import torch

    some = scores > above
    full = some.sum(axis=1) > width
    chosen[~full] |= some[~full]
    if not full.any():
        return
    rows = np.flatnonzero(full)
    best = torch.topk(torch.from_numpy(scores[rows]), width, sorted=False).indices.numpy()  # five times as fast as argpartition
    chosen[rows[:, None], best] = True


def _scale(features: Floats) -> Floats:
    """(F,) standard deviations; of a feature that says nothing here 1, so that it says little where it does."""
    deviation = features.std(axis=0)
    return np.where(deviation > _NOTHING, deviation + np.float32(1e-6), np.float32(1))


def fit_scorer(
    candidates: Candidates,
    *,
    keys: Keys,
    num_units: int = 12,
    num_folds: int = 4,
    num_passes: int = 60,
    seed: int,
    previous: Scorer | None = None,
) -> tuple[Scorer, dict[str, float]]:
    """Fit listwise: softmax over each trigger's candidates against its future partners.

    The triggers are dealt into folds; each fold stops a scorer early that is fitted on the others, and the mean of their logits, one
    scorer of `num_folds * num_units` units, is kept: a single split of some hundred triggers is decided by chance. From the scorer of the
    night before every fold starts with all of it, leaves it only for a loss that is clearly lower, and the mean of their weights is kept.

    Args:
        candidates: with features of the past and gains of the future.
        keys: (T,) of the triggers that have candidates, by which they are dealt out.
        num_units: tanh units per fold.
        num_folds: at least 2, and no more than there are triggers.
        num_passes: most passes over the triggers.
        seed: of initialization, folds and order.
        previous: to go on from, on its own scale of features; a mixture has nothing to go on from.

    Returns:
        The scorer and what was reached, means over the folds: passes, held-out loss, loss of the fixed mixture there.
    """
    if previous is None or previous.hidden is None:
        mean, scale = candidates.features.mean(axis=0), _scale(candidates.features)
        starts = [_cold_start(scale, num_units, seed + number) for number in range(num_folds)]
        options, together = _COLD, _side_by_side
    else:
        mean, scale = previous.mean, previous.scale
        starts = [[previous.linear, previous.hidden, previous.hidden_bias, previous.output]] * num_folds
        options, together = _WARM, _mean
    lists = _Lists(candidates, mean, scale, keys)
    folds = np.array_split(np.argsort(uniform(keys, seed), kind="stable"), num_folds)
    fits = [_fit_fold(lists, folds, number, start, num_passes, options, seed) for number, start in enumerate(starts)]
    linear, hidden, hidden_bias, output = together([fit.weights for fit in fits])
    scorer = Scorer(mean=mean, scale=scale, linear=linear, hidden=hidden, hidden_bias=hidden_bias, output=output)
    names = ("scorer_passes", "scorer_loss", "mixture_loss")
    return scorer, {name: float(np.mean([fit.reached[name] for fit in fits])) for name in names}


def _side_by_side(fits: Sequence[Sequence[Floats]]) -> list[Floats]:
    """The mean of the folds' logits as one scorer: their units beside each other."""
    linear, hidden, hidden_bias, output = zip(*fits, strict=True)
    outputs = (np.concatenate(output) / len(fits)).astype(np.float32)
    return [np.mean(linear, axis=0), np.concatenate(hidden, axis=1), np.concatenate(hidden_bias), outputs]


def _mean(fits: Sequence[Sequence[Floats]]) -> list[Floats]:
    """The mean of the folds' weights, which all went a small way from the same ones."""
    return [np.mean(weights, axis=0) for weights in zip(*fits, strict=True)]


@dataclass(frozen=True)
class _Fit:
    """Linear, hidden, hidden bias and output weights of one fold, and what they reached there."""

    weights: list[Floats]
    reached: dict[str, float]


def _cold_start(scale: Floats, num_units: int, seed: int) -> list[Floats]:
    """A geometric mixture of head and smoothed count."""
    linear = np.zeros(len(scale), dtype=np.float32)
    linear[0], linear[1] = _HEAD_SHARE * scale[0], (1 - _HEAD_SHARE) * scale[1]
    hidden = np.random.default_rng(seed).standard_normal((len(scale), num_units), dtype=np.float32) * np.float32(0.3)
    return [linear, hidden, np.zeros(num_units, dtype=np.float32), np.zeros(num_units, dtype=np.float32)]


def _fit_fold(
    lists: "_Lists",
    folds: Sequence[npt.NDArray[np.int64]],
    number: int,
    start: Sequence[Floats],
    num_passes: int,
    options: tuple[float, float],
    seed: int,
) -> _Fit:
    """Fitted on the other folds, stopped early by this one."""
    import torch

    weights = [torch.tensor(weight) for weight in start]
    fitted = np.sort(np.concatenate([fold for other, fold in enumerate(folds) if other != number]))
    loss, passes = _descend(weights, lists, fitted, folds[number], num_passes, options, (seed, number))
    mixture = lists.losses(folds[number], lambda z: torch.from_numpy(Scorer.mixture().logits(z.numpy() * lists.scale + lists.mean)))
    reached = {"scorer_passes": float(passes), "scorer_loss": loss, "mixture_loss": float(mixture.mean())}
    return _Fit([weight.detach().numpy().copy() for weight in weights], reached)


class _Lists:
    """Candidates as lists by trigger: standardized features and gains."""

    def __init__(self, candidates: Candidates, mean: Floats, scale: Floats, keys: Keys) -> None:
        import torch

        self.mean, self.scale, self.keys = mean, scale, keys
        lengths = np.unique(candidates.segment, return_counts=True)[1].tolist()
        self.features = torch.split(torch.from_numpy((candidates.features - mean) / scale), lengths)
        self.gains = torch.split(torch.from_numpy(candidates.gain), lengths)

    def losses(self, triggers: npt.NDArray[np.int64], logits: "Callable[[torch.Tensor], torch.Tensor]") -> "torch.Tensor":
        """(T,) gain-weighted negative log softmax of each trigger."""
        import torch

        chosen = triggers.tolist()
        z, gain = torch.cat([self.features[t] for t in chosen]), [self.gains[t] for t in chosen]
        parts = torch.split(logits(z), [len(g) for g in gain])
        rows = torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True, padding_value=-1e9)  # (T, longest)
        weight = torch.nn.utils.rnn.pad_sequence(gain, batch_first=True)
        return -(weight * rows.log_softmax(dim=1)).sum(dim=1)


def _descend(
    weights: "list[torch.Tensor]",
    lists: _Lists,
    fitted: npt.NDArray[np.int64],
    held_out: npt.NDArray[np.int64],
    num_passes: int,
    options: tuple[float, float],
    purpose: tuple[int, int],
) -> tuple[float, int]:
    """Adam over small groups of triggers; leaves the weights of the best held-out loss, returns that loss and its pass.

    Where it began stands unless the gain exceeds so many standard errors as `options` says.
    """
    import torch

    def logits(z: torch.Tensor) -> torch.Tensor:
        return z @ weights[0] + torch.tanh(z @ weights[1] + weights[2]) @ weights[3]

    learning_rate, stay = options
    optimizer = torch.optim.Adam([weight.requires_grad_() for weight in weights], lr=learning_rate)
    # a linear weight of what is the trigger's alone adds a constant: its gradient is rounding, which Adam would make steps of
    orders = torch.tensor([1.0] * len(_OF_PAIR) + [0.0] * len(_OF_TRIGGER))
    weights[0].register_hook(lambda gradient: gradient * orders)  # type: ignore[no-untyped-call]  # torch does not type it
    first = lists.losses(held_out, logits).detach()
    best, lowest, at, gain = [weight.detach().clone() for weight in weights], float(first.mean()), 0, torch.zeros_like(first)
    start = best
    for number in range(num_passes):
        with torch.no_grad():
            losses = lists.losses(held_out, logits)
        checked = float(losses.mean())
        if checked < lowest - 1e-5:
            best, lowest, at, gain = [weight.detach().clone() for weight in weights], checked, number, first - losses
        if number - at > _PATIENCE:
            break
        order = fitted[np.argsort(uniform(lists.keys[fitted], *purpose, number), kind="stable")]
        for begin in range(0, len(order), _BATCH):
            optimizer.zero_grad()
            torch.autograd.backward(lists.losses(order[begin : begin + _BATCH], logits).mean())
            optimizer.step()
    if at and float(gain.mean()) <= stay * float(gain.std()) / len(gain) ** 0.5:
        best, lowest, at = start, float(first.mean()), 0
    for weight, value in zip(weights, best, strict=True):
        weight.detach().copy_(value)
    return lowest, at
