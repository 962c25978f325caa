"""The calibrated merge scorer: how likely is each candidate to be the trigger's next partner.

Fitted once a night on the last slice of engagements with features of everything before it, then frozen and applied to features of
everything. All features are logarithms or cosines, so that the scorer is a small log-linear model with 16 tanh units:

    logit = w . z + v . tanh(W z + b),  z = (features - mean) / scale;   p(j given i) = softmax of the logits over i's candidates

Applied with numpy alone (Spark tasks have no torch); torch is imported where it is fitted.
Shapes: `N` items, `T` triggers, `M` candidates of all triggers together, `F` features, `V` vector length.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from models.data import Floats, History, Ints, Sparse

if TYPE_CHECKING:
    import torch

FEATURES = ("head_log_p", "smooth_log_p", "content_cosine", "relevance_cosine", "log_popularity", "log_count")
PRIOR_WEIGHT = 30.0  # mu of the smoothed count, in decayed user-days: against 3, +.005 recall@100 on ifdb_games, level on retail_gifts
_HEAD_SHARE = 0.9  # of the fallback mixture: the counts' tenth adds what the factorization does not memorize
_PATIENCE = 8  # passes without a better held-out loss
_BATCH = 40  # triggers per step
MIN_TRIGGERS = 50  # fewer cannot be told from noise with F * 17 weights


def candidate_features(
    *,
    head_log_p: Floats,
    count: Floats,
    count_row_sum: Floats,
    popularity_p: Floats,
    content_cosine: Floats,
    relevance_cosine: Floats,
) -> Floats:
    """Features of M (trigger, candidate) pairs, used when fitting and when listing.

    Args:
        head_log_p: (M,) log softmax of the engagement head over the trigger's candidates.
        count: (M,) decayed co-engagement weight, 0 where nothing is counted.
        count_row_sum: (M,) the trigger's weight over all partners.
        popularity_p: (M,) the candidate's share of decayed user-days, > 0 (floored).
        content_cosine: (M,) of the content vectors.
        relevance_cosine: (M,) score of the relevance head.

    Returns:
        (M, F) float32 in the order of FEATURES. smooth_log_p is log((count + mu p) / (row sum + mu)).
    """
    smooth = np.log((count + PRIOR_WEIGHT * popularity_p) / (count_row_sum + PRIOR_WEIGHT))
    columns = (head_log_p, smooth, content_cosine, relevance_cosine, np.log(popularity_p), np.log1p(count))
    return np.stack(columns, axis=1).astype(np.float32)


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
        z: Floats = (features - self.mean) / self.scale
        return np.asarray(z @ self.linear + np.tanh(z @ self.hidden + self.hidden_bias) @ self.output, dtype=np.float32)

    def log_probability(self, features: Floats, segment: Ints) -> Floats:
        """(M,) log p(j given i) over each trigger's candidates; `segment` ascends."""
        return log_softmax(self.logits(features), segment)

    def save(self, path: Path) -> None:
        """Write as JSON, floats as they are."""
        content = {name: None if value is None else value.tolist() for name, value in self.__dict__.items()}
        path.write_text(json.dumps({"features": FEATURES, "prior_weight": PRIOR_WEIGHT, **content}))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            ValueError: the file's features are not this code's.
        """
        content = json.loads(Path(path).read_text())
        if tuple(content["features"]) != FEATURES or content["prior_weight"] != PRIOR_WEIGHT:
            raise ValueError(f"{path} was fitted on features {content['features']}; this code computes {FEATURES}: train again")
        names = ("mean", "scale", "linear", "hidden", "hidden_bias", "output")
        arrays: dict[str, Any] = {name: None if content[name] is None else np.asarray(content[name], dtype=np.float32) for name in names}
        return cls(**arrays)


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
    """How many candidates each source proposes per trigger; as at list time."""

    counts: int = 400
    head: int = 300
    content: int = 100
    popular: int = 100


@dataclass(frozen=True, kw_only=True)
class CandidateSource:
    """Everything candidates and their features are made from, as of one time.

    Attributes:
        history: pairs and popularity.
        content: (N, C).
        engagement: vectors of the engagement head.
        relevance: vectors of the relevance head.
        popularity_p: (N,) floored share of decayed user-days.
        eligible: (N,) may be a candidate.
    """

    history: History
    content: Floats
    engagement: HeadVectors
    relevance: HeadVectors
    popularity_p: Floats
    eligible: npt.NDArray[np.bool_]

    def propose(self, triggers: Ints, truth: Sparse, *, widths: Widths, block: int = 200) -> Candidates:
        """Candidates of some triggers.

        Args:
            triggers: (T,) item indices.
            truth: (T, N) future weight per trigger.
            widths: candidates per source.
            block: triggers scored against the whole catalog at once.
        """
        parts = [
            self._propose(triggers[start : start + block], truth[start : start + block], widths, start)
            for start in range(0, len(triggers), block)
        ]
        return Candidates(
            **{name: np.concatenate([getattr(part, name) for part in parts]) for name in ("segment", "target", "features", "gain")}
        )

    def _propose(self, triggers: Ints, truth: Sparse, widths: Widths, offset: int) -> Candidates:
        engagement = self.engagement.trigger[triggers] @ self.engagement.target.T  # (T, N)
        relevance = self.relevance.trigger[triggers] @ self.relevance.target.T
        content = self.content[triggers] @ self.content.T
        counts: Floats = self.history.pairs[triggers].toarray()
        popular = np.broadcast_to(self.popularity_p, counts.shape)
        chosen = np.zeros(counts.shape, dtype=np.bool_)
        sources = ((engagement, widths.head), (relevance, widths.head), (content, widths.content), (popular, widths.popular))
        for scores, width in (*sources, (counts, widths.counts)):
            _choose(chosen, np.where(self.eligible, scores, -np.inf), width, above=0.0 if scores is counts else -np.inf)
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
                popularity_p=self.popularity_p[target],
                content_cosine=content[row, target],
                relevance_cosine=relevance[row, target],
            ),
            gain=(future / np.maximum(future.sum(axis=1, keepdims=True), 1e-12))[row, target].astype(np.float32),
        )


def _choose(chosen: npt.NDArray[np.bool_], scores: Floats, width: int, *, above: float) -> None:
    """Mark the `width` best of each row that score more than `above`."""
    width = min(width, scores.shape[1])
    if width == 0:
        return
    best = np.argpartition(-scores, width - 1, axis=1)[:, :width]
    keep = np.take_along_axis(scores, best, axis=1) > above
    rows = np.broadcast_to(np.arange(len(scores))[:, None], best.shape)
    chosen[rows[keep], best[keep]] = True


def fit_scorer(candidates: Candidates, *, num_units: int = 16, num_passes: int = 60, seed: int) -> tuple[Scorer, dict[str, float]]:
    """Fit listwise: softmax over each trigger's candidates against its future partners, early stop on a fifth of the triggers.

    Args:
        candidates: with features of the past and gains of the future.
        num_units: tanh units.
        num_passes: most passes over the triggers.
        seed: of initialization, split and order.

    Returns:
        The scorer and what was reached: passes, loss on the held-out fifth, loss of the fixed mixture there.
    """
    import torch

    mean, scale = candidates.features.mean(axis=0), candidates.features.std(axis=0) + np.float32(1e-6)
    generator = torch.Generator().manual_seed(seed)
    linear = torch.zeros(len(FEATURES))
    linear[0], linear[1] = float(_HEAD_SHARE * scale[0]), float((1 - _HEAD_SHARE) * scale[1])  # starts as a geometric mixture
    hidden = torch.randn(len(FEATURES), num_units, generator=generator) * 0.3
    weights = [linear, hidden, torch.zeros(num_units), torch.zeros(num_units)]
    lists = _Lists(candidates, mean, scale)
    fifth = max(1, lists.num_triggers // 5)
    order = torch.randperm(lists.num_triggers, generator=generator)
    held_out, fitted = order[:fifth], order[fifth:]
    loss, passes = _descend(weights, lists, fitted, held_out, num_passes, generator)
    arrays = (weight.detach().numpy().copy() for weight in weights)
    scorer = Scorer(mean=mean, scale=scale, **dict(zip(("linear", "hidden", "hidden_bias", "output"), arrays, strict=True)))
    mixture = lists.loss(held_out, lambda z: torch.from_numpy(Scorer.mixture().logits(z.numpy() * scale + mean)))
    return scorer, {"scorer_passes": float(passes), "scorer_loss": loss, "mixture_loss": float(mixture)}


class _Lists:
    """Candidates as lists by trigger: standardized features and gains."""

    def __init__(self, candidates: Candidates, mean: Floats, scale: Floats) -> None:
        import torch

        lengths = np.unique(candidates.segment, return_counts=True)[1].tolist()
        self.features = torch.split(torch.from_numpy((candidates.features - mean) / scale), lengths)
        self.gains = torch.split(torch.from_numpy(candidates.gain), lengths)
        self.num_triggers = len(lengths)

    def loss(self, triggers: "torch.Tensor", logits: "Callable[[torch.Tensor], torch.Tensor]") -> "torch.Tensor":
        """Mean over triggers of the gain-weighted negative log softmax."""
        import torch

        chosen = triggers.tolist()
        z, gain = torch.cat([self.features[t] for t in chosen]), [self.gains[t] for t in chosen]
        parts = torch.split(logits(z), [len(g) for g in gain])
        rows = torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True, padding_value=-1e9)  # (T, longest)
        weight = torch.nn.utils.rnn.pad_sequence(gain, batch_first=True)
        return -(weight * rows.log_softmax(dim=1)).sum(dim=1).mean()


def _descend(
    weights: "list[torch.Tensor]",
    lists: _Lists,
    fitted: "torch.Tensor",
    held_out: "torch.Tensor",
    num_passes: int,
    generator: "torch.Generator",
) -> tuple[float, int]:
    """Adam over small groups of triggers; leaves the weights of the best held-out loss, returns that loss and its pass."""
    import torch

    def logits(z: torch.Tensor) -> torch.Tensor:
        return z @ weights[0] + torch.tanh(z @ weights[1] + weights[2]) @ weights[3]

    optimizer = torch.optim.Adam([weight.requires_grad_() for weight in weights], lr=0.02)
    best, lowest, at = [weight.detach().clone() for weight in weights], float("inf"), 0
    for number in range(num_passes):
        with torch.no_grad():
            checked = float(lists.loss(held_out, logits))
        if checked < lowest - 1e-5:
            best, lowest, at = [weight.detach().clone() for weight in weights], checked, number
        if number - at > _PATIENCE:
            break
        for triggers in torch.split(fitted[torch.randperm(len(fitted), generator=generator)], _BATCH):
            optimizer.zero_grad()
            torch.autograd.backward(lists.loss(triggers, logits))
            optimizer.step()
    for weight, value in zip(weights, best, strict=True):
        weight.detach().copy_(value)
    return lowest, at
