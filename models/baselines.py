"""What a list must beat: popularity, associations of pairs, content, EASE, and the best list that engagement alone gives.

Each takes T triggers and gives (T, k) item indices, best first, ties by index, -1 where there are fewer. The trigger itself and
ineligible items are never listed. A trigger at or beyond N (an item that was not known yet) has no counts and no content. All work in
blocks of triggers: memory does not grow with T.

    smooth(i, j)      = (C_ij + b C_user_ij + mu p_j) / p_j^alpha,  C decayed pair weights, C_user user-level co-engagement, p popularity
    smooth + SVD      = share * softmax of the factorization + (1 - share) * smooth, normalized: the best engagement-only list

Shapes: `T` triggers, `B` triggers of one block, `N` items, `C` content dimensions, `U` users.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Protocol, Self

import numpy as np
from scipy.linalg import cho_factor, lapack
from scipy.sparse import csr_array

from conf.errors import MachineError
from models.data import Bools, Floats, History, Ints, Sparse
from models.factorization import CoEngagement, Factorization, log_popularity, recall
from models.metrics import recall_at_k
from models.ranking import Longs, best_per_row, best_per_segment, blocks, ends, pad, segments

_TINY = np.float32(1e-30)  # a row without any mass is divided by this and stays zero
_TUNED_AT = 100  # recall cutoff of everything tuned here
_NUM_SWEEPS = 2
_MAX_TUNING_TRIGGERS = 1000


class CatalogTooLargeError(MachineError):
    """A dense (N, N) method was asked for more items than it may hold."""


# --- lists of training-free methods ---


def popularity_lists(triggers: Ints, *, popularity: Floats, eligible: Bools, k: int) -> Ints:
    """The most popular items for everybody.

    Args:
        triggers: (T,) item indices.
        popularity: (N,) any measure.
        eligible: (N,) may be listed.
        k: list length.
    """
    order = _popular(popularity, eligible, k + 1)
    rows = np.broadcast_to(order, (len(triggers), len(order)))
    return _first(np.where(rows == triggers[:, None], np.int32(-1), rows), k)


def count_lists(triggers: Ints, *, counts: csr_array, popularity: Floats, eligible: Bools, k: int) -> Ints:
    """The most co-engaged items, then the most popular ones.

    Args:
        triggers: (T,) item indices.
        counts: (N, N) co-engagement, row = trigger; only positive cells count.
        popularity: (N,) any measure.
        eligible: (N,) may be listed.
        k: list length.
    """
    return pair_score_lists(triggers, scores=counts, popularity=popularity, eligible=eligible, k=k, backfill=True)


def pair_score_lists(triggers: Ints, *, scores: csr_array, popularity: Floats, eligible: Bools, k: int, backfill: bool) -> Ints:
    """The best partners by a column of the pair table (count, cosine, Jaccard, BM25, Swing, lift, ...).

    Args:
        triggers: (T,) item indices.
        scores: (N, N) association, row = trigger; only positive cells count.
        popularity: (N,) any measure; ranks what follows the scored items.
        eligible: (N,) may be listed.
        k: list length.
        backfill: fill up with the most popular items.
    """
    some = np.minimum(triggers, scores.shape[0] - 1)
    longest = int((scores.indptr[some + 1] - scores.indptr[some]).max(initial=0))
    parts = [_scored(triggers[rows], scores, eligible, k) for rows in blocks(len(triggers), longest)]
    lists = np.concatenate([_missing(0, k), *parts])
    return fill_with_popular(lists, triggers, popularity=popularity, eligible=eligible) if backfill else lists


def content_lists(triggers: Ints, *, content: Floats, eligible: Bools, k: int) -> Ints:
    """The nearest items by cosine; an item without content is neither a neighbor nor has any.

    Args:
        triggers: (T,) item indices.
        content: (N, C) unit rows or zeros.
        eligible: (N,) may be listed.
        k: list length.
    """
    described = np.any(content, axis=1)
    items = np.flatnonzero(eligible & described).astype(np.int32)
    lists = _missing(len(triggers), k)
    known = np.flatnonzero((triggers < len(content)) & described[np.minimum(triggers, len(content) - 1)])
    for rows in (known[block] for block in blocks(len(known), len(items))):
        scores = content[triggers[rows]] @ content[items].T
        scores[items == triggers[rows][:, None]] = -np.inf
        columns = top_columns(scores, k)
        lists[rows, : columns.shape[1]] = np.where(columns >= 0, items[columns], -1)
    return lists


def fill_with_popular(lists: Ints, triggers: Ints, *, popularity: Floats, eligible: Bools) -> Ints:
    """(T, k) lists, their missing positions filled with the most popular items that are not listed yet."""
    k = lists.shape[1]
    popular = popularity_lists(triggers, popularity=popularity, eligible=eligible, k=2 * k)  # at most k of them are listed already
    return _first(np.concatenate([lists, _unless_listed(popular, lists)], axis=1), k)


# --- lists of dense scores ---


class EngagementScores(Protocol):
    """What likely follows a trigger: the engagement side of a blend, and lists by itself."""

    def scores(self, triggers: Ints) -> Floats:
        """(B,) triggers -> (B, N) float32 p(j given i); 0 at the trigger itself. A new array each time."""
        ...


def engagement_lists(triggers: Ints, *, engagement: EngagementScores, eligible: Bools, k: int) -> Ints:
    """The most probable items over the full catalog.

    Args:
        triggers: (T,) item indices.
        engagement: gives p(j given i).
        eligible: (N,) may be listed.
        k: list length.
    """
    return score_lists(triggers, engagement.scores, eligible=eligible, k=k)


def score_lists(triggers: Ints, scores: Callable[[Ints], Floats], *, eligible: Bools, k: int) -> Ints:
    """The best items by dense scores, computed block by block.

    Args:
        triggers: (T,) item indices.
        scores: (B,) triggers -> (B, N), a new array, -inf for what must not be listed.
        eligible: (N,) may be listed.
        k: list length.
    """
    lists = _missing(len(triggers), k)
    for rows in blocks(len(triggers), len(eligible)):
        columns = top_columns(hide(scores(triggers[rows]), triggers[rows], eligible), k)
        lists[rows, : columns.shape[1]] = columns
    return lists


def hide(scores: Floats, triggers: Ints, eligible: Bools) -> Floats:
    """(B, N) scores, in place -inf at ineligible items and at the trigger itself."""
    scores[:, np.flatnonzero(~eligible)] = -np.inf
    return _hide_own(scores, triggers, -np.inf)


def top_columns(scores: Floats, k: int) -> Longs:
    """`best_per_row`, five times faster for k much smaller than W: only what reaches the k-th value is sorted.

    Args:
        scores: (B, W) float32 without NaN; -inf marks what must not be chosen.
        k: most columns per row.

    Returns:
        (B, min(k, W)) columns, best first, ties by column; -1 where a row has no more.
    """
    width = scores.shape[1]
    if not 0 < k < width:
        return best_per_row(scores, k)
    last = np.partition(scores, width - k, axis=1)[:, width - k]  # plain values: vectorized, unlike argpartition
    row, column = np.nonzero((scores >= last[:, None]) & (scores > -np.inf))
    position, offsets = best_per_segment(scores[row, column], ends(np.bincount(row, minlength=len(scores))), k)
    return _rows(column[position], offsets, k).astype(np.int64)


# --- smoothed counts ---


@dataclass(frozen=True, kw_only=True)
class SmoothWeights:
    """Weights of the smoothed count.

    Attributes:
        user_level_weight: b, mass of user-level co-engagement against the pairs' mass.
        prior_weight: mu, decayed user-days that popularity counts for.
        popularity_exponent: alpha, 0 gives likely partners, 1 lift.
    """

    user_level_weight: float = 0.3
    prior_weight: float = 30.0
    popularity_exponent: float = 0.0


_SMOOTH_GRID: dict[str, Sequence[float]] = {
    "user_level_weight": (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0),
    "prior_weight": (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10_000.0),
    "popularity_exponent": (0.0, 0.05, 0.1, 0.2, 0.3, 0.5),
}


def smooth_scores(triggers: Ints, *, matrix: CoEngagement, popularity: Floats, weights: SmoothWeights) -> Floats:
    """(B, N) smoothed counts over the full catalog.

    Args:
        triggers: (B,) item indices; an unknown one has the popularity term alone.
        matrix: gives rows of C + b C_user, for the b of `weights`.
        popularity: (N,) decayed user-days.
        weights: mu and alpha are used.
    """
    return _smoothed(_of_known(triggers, len(popularity), matrix.rows), popularity, weights)


def _smoothed(counts: Floats, popularity: Floats, weights: SmoothWeights) -> Floats:
    """(counts + mu p) / p^alpha in place; p is floored where it divides, or the rarest items would lead every list."""
    share = popularity / np.maximum(popularity.sum(), _TINY)
    counts += np.float32(weights.prior_weight) * share
    if weights.popularity_exponent:
        counts *= np.exp(np.float32(-weights.popularity_exponent) * log_popularity(popularity))
    return counts


@dataclass(frozen=True, kw_only=True)
class Smooth:
    """Smoothed counts of one history; as EngagementScores, normalized to sum to 1.

    Attributes:
        matrix: rows of C + b C_user.
        popularity: (N,) decayed user-days.
        weights: b, mu and alpha.
    """

    matrix: CoEngagement
    popularity: Floats
    weights: SmoothWeights

    @classmethod
    def of(cls, history: History, weights: SmoothWeights) -> Self:
        """Of one history."""
        b = weights.user_level_weight
        matrix = CoEngagement(pairs=history.pairs, user_items=history.user_items, user_level_weight=b)
        return cls(matrix=matrix, popularity=history.popularity, weights=weights)

    def raw(self, triggers: Ints) -> Floats:
        """(B, N) smoothed counts."""
        return smooth_scores(triggers, matrix=self.matrix, popularity=self.popularity, weights=self.weights)

    def scores(self, triggers: Ints) -> Floats:
        """(B, N) p(j given i)."""
        return _normalized(_hide_own(self.raw(triggers), triggers, 0))


def smooth_lists(triggers: Ints, *, history: History, weights: SmoothWeights, eligible: Bools, k: int) -> Ints:
    """The best items by smoothed counts.

    Args:
        triggers: (T,) item indices.
        history: pairs, user_items and popularity.
        weights: b, mu and alpha.
        eligible: (N,) may be listed.
        k: list length.
    """
    return score_lists(triggers, Smooth.of(history, weights).raw, eligible=eligible, k=k)


def tune_smooth(
    history: History, truth: Sparse, triggers: Ints, *, eligible: Bools, start: SmoothWeights | None = None, seed: int = 0
) -> SmoothWeights:
    """Weights by coordinate descent on recall@100; a coordinate moves only where recall gains.

    Args:
        history: before the holdout.
        truth: (T, N) what followed each trigger.
        triggers: (T,) item indices; at most 1000 with a history and a future are looked at, drawn by seed.
        eligible: (N,) may be listed.
        start: b=.3, mu=30, alpha=0 unless given, and what stands without any usable trigger.
        seed: of the draw.
    """
    best = start or SmoothWeights()
    some = _tuning_rows(triggers, truth, history.num_items, seed)
    if not len(some):
        return best
    search = _SmoothSearch(history, truth[some], triggers[some], eligible)
    for _ in range(_NUM_SWEEPS):
        before = best
        for name, values in _SMOOTH_GRID.items():
            trials = [dataclasses.replace(best, **{name: value}) for value in values]
            best = max([best, *trials], key=search.recalls([best, *trials]).__getitem__)  # the first of equals stands
        if best == before:
            break
    return best


class _SmoothSearch:
    """Recall of smoothing weights, each evaluated once; the rows of C and C_user are made once for all that is asked together."""

    def __init__(self, history: History, truth: Sparse, triggers: Ints, eligible: Bools) -> None:
        self.matrix = CoEngagement(pairs=history.pairs, user_items=history.user_items, user_level_weight=1.0)
        self.popularity, self.truth, self.triggers, self.eligible = history.popularity, truth, triggers, eligible
        self.known: dict[SmoothWeights, float] = {}

    def recalls(self, trials: Sequence[SmoothWeights]) -> dict[SmoothWeights, float]:
        """Macro recall of each of the trials, among all tried so far."""
        new = [trial for trial in dict.fromkeys(trials) if trial not in self.known]
        totals = dict.fromkeys(new, 0.0)
        for rows in blocks(len(self.triggers), len(self.eligible)) if new else ():
            part = self.triggers[rows]
            counts: Floats = self.matrix.pairs[part].toarray()
            by_user = self.matrix.rows(part) - counts
            for trial in new:
                scores = hide(_smoothed(self._mixed(counts, by_user, trial), self.popularity, trial), part, self.eligible)
                totals[trial] += len(part) * recall(scores, part, self.truth[rows], _TUNED_AT)
        self.known |= {trial: total / len(self.triggers) for trial, total in totals.items()}
        return self.known

    def _mixed(self, counts: Floats, by_user: Floats, trial: SmoothWeights) -> Floats:
        alone = not self.matrix.pairs.nnz  # without any pair, user-level co-engagement counts as it is: see CoEngagement
        return counts + np.float32(1 if alone else trial.user_level_weight) * by_user


def _tuning_rows(triggers: Ints, truth: Sparse, num_items: int, seed: int) -> Longs:
    """Rows of some triggers that were known and have a future."""
    usable = np.flatnonzero((triggers < num_items) & (np.asarray(truth.sum(axis=1)).ravel() > 0))
    return np.sort(np.random.default_rng(seed).permutation(usable)[:_MAX_TUNING_TRIGGERS])


# --- smoothed counts and their factorization: the best engagement-only list ---


@dataclass(frozen=True, kw_only=True)
class SmoothSvd:
    """share * softmax of the factorization + (1 - share) * smooth.

    Attributes:
        smooth: smoothed counts.
        factorization: of the same history, made without content.
        share: of the factorization, in [0, 1].
    """

    smooth: Smooth
    factorization: Factorization
    share: float

    def scores(self, triggers: Ints) -> Floats:
        """(B, N) p(j given i)."""
        if self.share == 0:
            return self.smooth.scores(triggers)
        p = factorization_probability(self.factorization, triggers)
        if self.share < 1:
            p *= np.float32(self.share)
            p += np.float32(1 - self.share) * self.smooth.scores(triggers)
        return p


def factorization_probability(factorization: Factorization, triggers: Ints) -> Floats:
    """(B, N) softmax of the scores, the trigger itself left out; an unknown trigger has the popularity term alone."""
    num_items = len(factorization.trigger)
    logits = factorization.scores(np.minimum(triggers, num_items - 1))
    weights = factorization.weights
    logits[triggers >= num_items] = np.float32(weights.temperature * weights.popularity_weight) * factorization.log_prior
    _hide_own(logits, triggers, -np.inf)
    logits -= np.maximum(logits.max(axis=1, keepdims=True), np.finfo(np.float32).min)  # one item alone has no finite logit
    return _normalized(np.exp(logits, out=logits))


def tune_smooth_svd(
    smooth: Smooth,
    factorizations: Mapping[float, Factorization],
    truth: Sparse,
    triggers: Ints,
    *,
    eligible: Bools,
    shares: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0),
    seed: int = 0,
) -> tuple[float, float]:
    """Which factorization, and its share, have the best recall@100, the first of equals; the first ones without any usable trigger.

    Args:
        smooth: smoothed counts before the holdout.
        factorizations: of the same history, by `prior_users`.
        truth: (T, N) what followed each trigger.
        triggers: (T,) item indices, drawn from as in tune_smooth.
        eligible: (N,) may be listed.
        shares: to choose from.
        seed: of the draw.
    """
    some = _tuning_rows(triggers, truth, len(eligible), seed)
    totals = dict.fromkeys(product(factorizations, shares), 0.0)
    for rows in (some[block] for block in blocks(len(some), len(eligible))):
        part = triggers[rows]
        by_counts = smooth.scores(part)
        for prior, factorization in factorizations.items():
            by_factors = factorization_probability(factorization, part)
            for share in shares:
                p = hide(np.float32(share) * by_factors + np.float32(1 - share) * by_counts, part, eligible)
                totals[prior, share] += len(part) * recall(p, part, truth[rows], _TUNED_AT)
    return max(totals, key=totals.__getitem__)


# --- EASE ---

_EASE_STEP, _MAX_EASE_REGULARIZATION = 3.0, 100_000.0
MAX_EASE_ITEMS = 12_000  # N^3 operations and about 16 N^2 bytes: 8.6 k items took 50 s on two busy cores, 12 k take 2.3 GB


def ease_weights(user_items: Sparse, *, regularization: float, max_items: int = MAX_EASE_ITEMS) -> Floats:
    """(N, N) item-to-item weights B of EASE: B_ij = -P_ij / P_jj, P = (X'X + lambda I)^-1, no diagonal.

    Steck 2019, "Embarrassingly Shallow Autoencoders for Sparse Data", arXiv 1905.03375, equation 8. A user who engaged item i alone
    is predicted row i of B.

    Args:
        user_items: (U, N) X.
        regularization: lambda > 0.
        max_items: largest N.

    Raises:
        CatalogTooLargeError: N is larger than `max_items`.
    """
    num_items = user_items.shape[1]
    if num_items > max_items:
        raise CatalogTooLargeError(
            f"EASE inverts a dense (N, N) matrix: found {num_items} items, wanted at most {max_items}; leave it out or raise max_items"
        )
    return _ease(_gram(user_items), regularization)


def ease_lists(triggers: Ints, *, weights: Floats, popularity: Floats, eligible: Bools, k: int, backfill: bool) -> Ints:
    """The items with the largest positive weight.

    Args:
        triggers: (T,) item indices.
        weights: (N, N) of `ease_weights`.
        popularity: (N,) any measure; ranks what follows.
        eligible: (N,) may be listed.
        k: list length.
        backfill: fill up with the most popular items.
    """

    def positive(part: Ints) -> Floats:
        rows = _of_known(part, len(weights), weights.__getitem__)
        return np.where(rows > 0, rows, np.float32(-np.inf))

    lists = score_lists(triggers, positive, eligible=eligible, k=k)
    return fill_with_popular(lists, triggers, popularity=popularity, eligible=eligible) if backfill else lists


def tune_ease(
    history: History,
    truth: Sparse,
    triggers: Ints,
    *,
    eligible: Bools,
    grid: Sequence[float] = (30.0, 100.0, 300.0, 1000.0, 3000.0),
    max_items: int = MAX_EASE_ITEMS,
    seed: int = 0,
) -> float:
    """The lambda with the best recall@100 of back-filled lists, the first of equals.

    Where the largest of the grid is the best, three times that is tried too, and so on up to 100,000 as long as recall gains: only a
    catalog that asks for it pays for the further inversions.

    Args:
        history: before the holdout.
        truth: (T, N) what followed each trigger.
        triggers: (T,) item indices, drawn from as in tune_smooth.
        eligible: (N,) may be listed.
        grid: lambdas to choose from; not empty.
        max_items: largest N.
        seed: of the draw.

    Raises:
        CatalogTooLargeError: N is larger than `max_items`.
    """
    some = _tuning_rows(triggers, truth, history.num_items, seed)
    if not len(some):
        return grid[0]

    def recall_of(regularization: float) -> float:
        weights = ease_weights(history.user_items, regularization=regularization, max_items=max_items)
        popularity = history.popularity
        lists = ease_lists(triggers[some], weights=weights, popularity=popularity, eligible=eligible, k=_TUNED_AT, backfill=True)
        return float(recall_at_k(lists, truth[some], k=_TUNED_AT).mean())

    reached = {regularization: recall_of(regularization) for regularization in grid}
    best = max(reached, key=reached.__getitem__)
    while best == max(reached) and (further := _EASE_STEP * best) <= _MAX_EASE_REGULARIZATION:
        reached[further] = recall_of(further)
        best = max(reached, key=reached.__getitem__)  # without a gain it stays, and is no longer the largest
    return best


def _gram(user_items: Sparse) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """(N, N) X'X, double: with lambda a millionth of the largest eigenvalue, float32 would keep one digit."""
    wide = user_items.astype(np.float64)
    return np.asfortranarray((wide.T @ wide).toarray())


def _ease(gram: np.ndarray[tuple[int, int], np.dtype[np.float64]], regularization: float) -> Floats:
    """B of a Gram matrix, which is overwritten: Cholesky, then its inverse, a third of the work of a general inverse."""
    gram[np.diag_indices_from(gram)] += regularization
    factor = cho_factor(gram, lower=True, overwrite_a=True, check_finite=False)[0]
    lower = lapack.dpotri(factor, lower=1, overwrite_c=1)[0]
    diagonal = np.diag(lower).copy()
    inverse = np.tril(lower, -1).astype(np.float32)
    weights: Floats = (inverse + inverse.T) / (-diagonal).astype(np.float32)
    return weights


# --- parts ---


def _scored(triggers: Ints, scores: csr_array, eligible: Bools, k: int) -> Ints:
    """(B, k) best positive cells of each trigger's row."""
    rows = scores[np.where(triggers < scores.shape[0], triggers, 0)]
    rows.sort_indices()  # ties go by position in the row
    offsets, target = rows.indptr.astype(np.int64), rows.indices
    trigger = triggers[segments(offsets)]
    usable = eligible[target] & (target != trigger) & (rows.data > 0) & (trigger < scores.shape[0])
    columns = top_columns(pad(np.where(usable, rows.data, -np.inf).astype(np.float32), offsets), k)
    found = columns >= 0
    return _rows(target[(columns + offsets[:-1, None])[found]], ends(found.sum(axis=1)), k)


def _of_known(triggers: Ints, num_items: int, rows: Callable[[Ints], Floats]) -> Floats:
    """(B, N) rows of the known triggers, zeros for the others; a new array."""
    known = triggers < num_items
    out = np.zeros((len(triggers), num_items), dtype=np.float32)
    if known.any():
        out[known] = rows(triggers[known])
    return out


def _hide_own(scores: Floats, triggers: Ints, value: float) -> Floats:
    """(B, N) scores, in place `value` at the trigger itself."""
    known = np.flatnonzero(triggers < scores.shape[1])
    scores[known, triggers[known]] = value
    return scores


def _normalized(rows: Floats) -> Floats:
    """(B, N) rows of sum 1 in place; a row of zeros stays."""
    rows /= np.maximum(rows.sum(axis=1, keepdims=True), _TINY)
    return rows


def _popular(popularity: Floats, eligible: Bools, k: int) -> Ints:
    """The first k eligible items by popularity."""
    items = np.flatnonzero(eligible).astype(np.int32)
    return items[np.argsort(-popularity[items], kind="stable")][:k]


def _missing(num_rows: int, k: int) -> Ints:
    """(num_rows, k) of -1."""
    return np.full((num_rows, k), -1, dtype=np.int32)


def _rows(items: Ints | Longs, offsets: Longs, k: int) -> Ints:
    """Flat items -> (T, k), -1 behind the end of a row."""
    filled = np.arange(k) < np.diff(offsets)[:, None]
    lists = _missing(len(filled), k)
    lists[filled] = items
    return lists


def _first(lists: Ints, k: int) -> Ints:
    """(T, W) -> (T, k): what is not -1, in order, the gaps closed."""
    found = lists >= 0
    offsets = ends(np.minimum(found.sum(axis=1), k))
    kept = found & (np.cumsum(found, axis=1) <= k)
    return _rows(lists[kept], offsets, k)


def _unless_listed(lists: Ints, listed: Ints) -> Ints:
    """(T, W) lists with -1 for what (T, k) `listed` has in the same row."""
    width = int(max(lists.max(initial=0), listed.max(initial=0))) + 2  # -1 becomes 0, which is in every row or none and stays -1
    row = np.arange(len(lists), dtype=np.int64)[:, None] * width
    repeated = np.isin(row + lists + 1, row + listed + 1)
    return np.where(repeated, np.int32(-1), lists)
