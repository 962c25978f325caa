"""Where the encoder starts: a factorization of the co-engagement counts, calibrated on the last slice of engagements.

    M = C + b * C_user,   C = decayed pair weights, C_user = X' diag(1 / items of the user) X without its diagonal, of the mass of C
    D_row^-1/2 M D_column^-1/2 = U S V',  D = sums + median + 1
    score(j given i) = T * (A_i . B_j + rho * log p_j),  A = rows of U S at unit length, B = rows of V scaled by (norm / median)^eta,
    p = the share of user-days, decayed with a half-life of its own: what sells this week may say more than what sold when pairs were made

M is never formed: the randomized range finder (Halko, Martinsson, Tropp 2011, algorithm 4.4) needs its products only.
Shapes: `N` items, `U` users, `K` dimensions, `C` content dimensions, `T` triggers.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from scipy.linalg import lu, qr, svd
from scipy.sparse import csr_array, diags_array

from models.data import TREND_HALF_LIVES, Floats, History, Ints, Sparse
from models.draws import Keys, choose, normal

Values = npt.NDArray[np.float64]
_OVERSAMPLING = 16  # extra columns of the range finder
_NUM_POWER_STEPS = 3  # each a multiplication by M and one by M': the spectrum of counts falls slowly
_MAX_NORM_RATIO = 4.0  # longest target row against the median
_RIDGE = 1.0  # penalty of the content regression, in users


@dataclass(frozen=True, kw_only=True)
class ScoreWeights:
    """How a factorization becomes a score.

    Attributes:
        user_level_weight: b, mass of user-level co-engagement against the pairs' mass.
        dimension: K.
        target_norm_exponent: eta.
        popularity_weight: rho.
        temperature: T, the factor in front of the score (an inverse temperature).
        prior_users: m, the content prediction counts as much as this many users of a trigger.
        popularity_half_life_days: of p, one of TREND_HALF_LIVES; 0: p decays as the pairs do.
    """

    user_level_weight: float
    dimension: int
    target_norm_exponent: float
    popularity_weight: float
    temperature: float
    prior_users: float
    popularity_half_life_days: float = 0.0

    def changed(self, name: str, value: float) -> Self:
        """The same but for one weight."""
        content: dict[str, Any] = {name: value}
        return dataclasses.replace(self, **content)


@dataclass(frozen=True, kw_only=True)
class Factorization:
    """Calibrated rows.

    Attributes:
        trigger: (N, K) rows A, of length 1 or, mixed with a prediction, below; zero where nothing is known.
        target: (N, K) rows B.
        content_to_trigger: (C, K) ridge regression of A on content; predicts a cold item's row.
        content_to_target: (C, K) the same for B.
        log_popularity: (N,) log share of user-days that decay as the pairs do, floored.
        log_prior: (N,) log p_j of the score, floored.
        known: (N,) the item has a user or a pair; rows of the others come from content.
        weights: what was used.
    """

    trigger: Floats
    target: Floats
    content_to_trigger: Floats
    content_to_target: Floats
    log_popularity: Floats
    log_prior: Floats
    known: np.ndarray[tuple[int], np.dtype[np.bool_]]
    weights: ScoreWeights

    def scores(self, triggers: Ints) -> Floats:
        """(T, N) scores of all targets."""
        weights = self.weights
        product: Floats = self.trigger[triggers] @ self.target.T
        product += np.float32(weights.popularity_weight) * self.log_prior
        product *= np.float32(weights.temperature)
        return product

    def vectors(self) -> tuple[Floats, Floats]:
        """(N, K + 1) triggers and (N, K + 1) targets whose products are the scores; a target's last dimension is its popularity."""
        weights, ones = self.weights, np.ones((len(self.trigger), 1), dtype=np.float32)
        factor = np.float32(weights.temperature)
        bias = factor * np.float32(weights.popularity_weight) * self.log_prior[:, None]
        return np.hstack([factor * self.trigger, ones]), np.hstack([self.target, bias]).astype(np.float32)


def log_popularity(popularity: Floats) -> Floats:
    """(N,) log share of decayed user-days; an item counts at least half a median item's, so that no score depends on -inf."""
    seen = popularity[popularity > 0]
    floor = 0.5 * float(np.median(seen)) if seen.size else 1.0
    floored = np.maximum(popularity, np.float32(floor))
    return np.asarray(np.log(floored / floored.sum()), dtype=np.float32)


class CoEngagement:
    """M = C + b * C_user as a matrix that is multiplied but never formed."""

    def __init__(self, *, pairs: Sparse, user_items: Sparse, user_level_weight: float) -> None:
        self.pairs = pairs
        self.pairs_transposed: Sparse = pairs.T.tocsr()
        self.items_users: Sparse = user_items.T.tocsr()
        num_items = np.asarray(user_items.sum(axis=1), dtype=np.float32).ravel()
        per_user = np.divide(1, num_items, out=np.zeros_like(num_items), where=num_items > 0)
        self.weighted_users: Sparse = diags_array(per_user).dot(user_items).tocsr().astype(np.float32)
        self.diagonal: Floats = np.asarray(self.weighted_users.sum(axis=0), dtype=np.float32).ravel()
        user_mass = float(np.maximum(num_items - 1, 0).sum())
        mass = float(pairs.sum())
        # without any pair above the privacy minimum, user-level co-engagement stands alone
        self.factor = np.float32(user_level_weight * mass / user_mass if mass > 0 and user_mass > 0 else float(user_mass > 0))

    def dot(self, block: Floats) -> Floats:
        """M @ block: (N, K) -> (N, K)."""
        return self._plus_users(self.pairs.dot(block), block)

    def dot_transposed(self, block: Floats) -> Floats:
        """M' @ block; C_user is symmetric."""
        return self._plus_users(self.pairs_transposed.dot(block), block)

    def _plus_users(self, product: Floats, block: Floats) -> Floats:
        if self.factor:
            product += self.factor * self.items_users.dot(self.weighted_users.dot(block))
            product -= (self.factor * self.diagonal)[:, None] * block
        return product

    def rows(self, triggers: Ints) -> Floats:
        """(T, N) dense rows of M; the trigger's own cell is 0."""
        out: Floats = self.pairs[triggers].toarray()
        if self.factor:
            out += self.factor * self.items_users[triggers].dot(self.weighted_users).toarray()
        out[np.arange(len(triggers)), triggers] = 0
        return out

    def estimated_rows(self, triggers: Ints, candidates: Ints, *, most_users: int, offset: npt.NDArray[np.float64]) -> Floats:
        """(T, M) dense rows of M at some targets, the trigger's own cell 0, from so few users that a row costs the same in any log.

        Args:
            triggers: (T,) item indices.
            candidates: (M,) item indices.
            most_users: of a trigger with n of them, more than these, every n / most_users-th stands for as many: right in the mean.
            offset: (T,) in [0, 1), uniform: where counting begins.
        """
        out: Floats = self.pairs[triggers][:, candidates].toarray()
        if self.factor:
            users = _thinned(self.items_users[triggers], most_users, offset)
            named, column = np.unique(users.indices, return_inverse=True)
            users = csr_array((users.data, column.astype(np.int32), users.indptr), shape=(len(triggers), len(named)))
            out += self.factor * users.dot(self.weighted_users[named][:, candidates]).toarray()
        out[triggers[:, None] == candidates[None, :]] = 0
        return out


def _thinned(rows: Sparse, most: int, offset: npt.NDArray[np.float64]) -> Sparse:
    """Rows with at most so many cells, evenly spaced from (T,) offsets on, each worth as many as it stands for."""
    have = np.diff(rows.indptr)
    kept = np.minimum(have, most)
    indptr = np.concatenate([[0], np.cumsum(kept)]).astype(np.int32)
    row = np.repeat(np.arange(len(have)), kept)
    stride = have[row] / kept[row]
    place = ((np.arange(indptr[-1]) - indptr[row] + offset[row]) * stride).astype(np.int64)
    cell = rows.indptr[row] + np.minimum(place, have[row] - 1)
    return csr_array((rows.data[cell] * stride.astype(np.float32), rows.indices[cell], indptr), shape=rows.shape)


def spectrum(matrix: CoEngagement, *, dimension: int, keys: Keys, seed: int) -> tuple[Floats, Floats, Floats]:
    """Leading singular triplets of D_row^-1/2 M D_column^-1/2.

    Args:
        matrix: M.
        dimension: K, cut at N - 1.
        keys: (N,) of the items. The range finder starts from rows that are drawn by them: with three power steps a tenth of the nearest
            items depends on where it starts, and an item that is new must not change that for all others.
        seed: of these rows.

    Returns:
        (N, K) left vectors, (K,) singular values descending, (N, K) right vectors; K is `dimension` cut at N - 1.
    """
    num_items = matrix.pairs.shape[0]
    ones = np.ones((num_items, 1), dtype=np.float32)
    row, column = _damping(matrix.dot(ones)), _damping(matrix.dot_transposed(ones))
    rank = max(1, min(dimension, num_items - 1))
    width = min(num_items, rank + _OVERSAMPLING)
    block: Floats = normal(keys, width, seed=seed)
    for _ in range(_NUM_POWER_STEPS):
        block = _orthonormal(row * matrix.dot(column * block))
        block = _orthonormal(column * matrix.dot_transposed(row * block))
    left = qr(row * matrix.dot(column * block), mode="economic")[0]
    small = column * matrix.dot_transposed(row * left)  # (N, width) = (Q' M)'
    right, values, rotation = svd(small, full_matrices=False)
    return (left @ rotation.T)[:, :rank], values[:rank], right[:, :rank]


def _damping(sums: Floats) -> Floats:
    """(N, 1) D^-1/2; the median keeps rare items from having the largest entries."""
    some = sums[sums > 0]
    return np.asarray(1 / np.sqrt(np.maximum(sums, 0) + (np.median(some) if some.size else 0) + 1), dtype=np.float32)


def _orthonormal(block: Floats) -> Floats:
    """A well-conditioned basis between power steps, where LU does and is cheaper than QR; only the last one must be orthogonal."""
    return np.asarray(lu(block, permute_l=True, check_finite=False)[0], dtype=np.float32)


class Spectral:
    """The factorization of one history for one b: everything else of ScoreWeights is cheap to vary."""

    def __init__(self, history: History, content: Floats, *, user_level_weight: float, dimension: int, seed: int) -> None:
        self.history = history
        self.content = content
        self.user_level_weight = user_level_weight
        matrix = CoEngagement(pairs=history.pairs, user_items=history.user_items, user_level_weight=user_level_weight)
        left, values, right = spectrum(matrix, dimension=dimension, keys=history.keys, seed=seed)
        self.left: Floats = np.asarray(left * values, dtype=np.float32)
        self.right: Floats = np.asarray(right, dtype=np.float32)
        self.num_users = history.num_users
        self.known = (self.num_users > 0) | (np.diff(history.pairs.indptr) > 0) | (np.diff(matrix.pairs_transposed.indptr) > 0)
        self.log_popularity = log_popularity(history.popularity)
        self._trends = history.trends

    def factorization(self, weights: ScoreWeights) -> Factorization:
        """Rows for these weights (whose user_level_weight is this object's).

        Unknown items and, by `prior_users`, rare triggers take the row that a ridge regression on content predicts. It is shorter than 1,
        so popularity counts for more where less is known; stretching it to unit length cost .0024 of .1544 recall@100 on ifdb_games.
        """
        trigger = _unit(self.left[:, : weights.dimension])
        target = _scaled(self.right[:, : weights.dimension], weights.target_norm_exponent)
        to_trigger, to_target = (ridge(self.content, rows, self.num_users) for rows in (trigger, target))
        users = np.where(self.known, np.maximum(self.num_users, 1), 0)
        return Factorization(
            trigger=_mix(trigger, self.content @ to_trigger, users, weights.prior_users),
            target=np.where(self.known[:, None], target, self.content @ to_target),
            content_to_trigger=to_trigger,
            content_to_target=to_target,
            log_popularity=self.log_popularity,
            log_prior=self.log_prior(weights.popularity_half_life_days),
            known=self.known,
            weights=weights,
        )

    def log_prior(self, half_life_days: float) -> Floats:
        """(N,) log p_j under a half-life; 0: that of the pairs."""
        if half_life_days == 0:
            return self.log_popularity
        return log_popularity(np.exp(self._trends[:, TREND_HALF_LIVES.index(half_life_days)]))


def factorize(history: History, content: Floats, *, weights: ScoreWeights, seed: int) -> Factorization:
    """Factorize one history.

    Args:
        history: (N, N) pairs, (U, N) user_items, (N,) popularity.
        content: (N, C) unit or zero rows; C may be 0.
        weights: b, K, eta, rho, p's half-life, T and m; K is cut at N - 1.
        seed: of the range finder.
    """
    spectral = Spectral(history, content, user_level_weight=weights.user_level_weight, dimension=weights.dimension, seed=seed)
    return spectral.factorization(weights)


def ridge(content: Floats, rows: Floats, num_users: Floats) -> Floats:
    """(C, K) weights W of min sum_i n_i |c_i W - row_i|^2 + |W|^2, n_i the square root of the item's users."""
    weight = np.sqrt(num_users)[:, None].astype(np.float32)
    gram = content.T @ (weight * content) + np.float32(_RIDGE) * np.eye(content.shape[1], dtype=np.float32)
    return np.asarray(np.linalg.solve(gram, content.T @ (weight * rows)), dtype=np.float32)


def _unit(rows: Floats) -> Floats:
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(np.divide(rows, norm, out=np.zeros_like(rows), where=norm > 1e-12), dtype=np.float32)


def _scaled(rows: Floats, exponent: float) -> Floats:
    """Rows at length (norm / median norm)^exponent, the ratio cut at 4."""
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    some = norm[norm > 1e-12]
    ratio = np.minimum(norm / (np.median(some) if some.size else 1), _MAX_NORM_RATIO)
    return np.asarray(_unit(rows) * ratio**exponent, dtype=np.float32)


def _mix(rows: Floats, predicted: Floats, num_users: Floats, prior_users: float) -> Floats:
    """(n * row + m * prediction) / (n + m); a row without users is the prediction even for m = 0."""
    total = num_users + prior_users
    share: Floats = np.divide(num_users, total, out=np.zeros_like(num_users), where=total > 0)[:, None]
    return np.asarray(share * rows + (1 - share) * predicted, dtype=np.float32)


# --- choosing the weights on the holdout ---


def recall(scores: Floats, triggers: Ints, truth: Sparse, cutoff: int) -> float:
    """Macro recall@cutoff: the mean of `recalls`, which says what is given."""
    return float(recalls(scores, triggers, truth, cutoff).mean())


def recalls(scores: Floats, triggers: Ints, truth: Sparse, cutoff: int) -> Values:
    """(T,) recall@cutoff: the weighted share of each trigger's holdout partners in its list.

    Args:
        scores: (T, N) of all targets, overwritten at the trigger itself.
        triggers: (T,) item indices.
        truth: (T, N) future weight, none on the diagonal.
        cutoff: length of the list. Of items level with its last one as many as find room count, each as likely as another: a row of equal
            scores says nothing, and finds what chance finds.
    """
    scores[np.arange(len(triggers)), triggers] = -np.inf
    length = min(cutoff, scores.shape[1] - 1)
    last = scores.shape[1] - length
    threshold = np.partition(scores, last, axis=1)[:, last]  # five times faster than argpartition, which also says who
    rows = _rows(truth)
    partner = scores[rows, truth.indices]
    found, level = (partner > threshold[rows]).astype(np.float64), partner == threshold[rows]
    if level.any():
        some, of = np.unique(rows[level], return_inverse=True)
        bar = threshold[some, None]
        above, equal = (scores[some] > bar).sum(axis=1), (scores[some] == bar).sum(axis=1)
        found[level] = ((length - above) / equal)[of]
    hits = np.bincount(rows, weights=truth.data * found, minlength=len(triggers))
    return np.asarray(hits / np.asarray(truth.sum(axis=1)).ravel(), dtype=np.float64)


def _rows(matrix: Sparse) -> npt.NDArray[np.int64]:
    """Row of each stored cell."""
    return np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))


def log_likelihoods(scores: Floats, triggers: Ints, truth: Sparse) -> Values:
    """(T,) expected log softmax score of a holdout partner."""
    scores[np.arange(len(triggers)), triggers] = -np.inf
    top = scores.max(axis=1)
    normalizer = np.log(np.exp(scores - top[:, None]).sum(axis=1)) + top
    share: Floats = np.asarray(truth.sum(axis=1), dtype=np.float32).ravel()
    rows = _rows(truth)
    gained = np.bincount(rows, weights=truth.data * scores[rows, truth.indices], minlength=len(triggers))
    return np.asarray(gained / share - normalizer, dtype=np.float64)


def is_better(trial: Values, present: Values, *, stay: float) -> bool:
    """Whether the mean of (T,) paired values is higher, by more than `stay` standard errors of the difference."""
    gain = trial - present
    return bool(gain.mean() > stay * gain.std() / len(gain) ** 0.5)


def sample_triggers(holdout: Sparse, *, keys: Keys, maximum: int, seed: int) -> Ints:
    """(T,) ascending triggers with partners in the holdout, at most `maximum` of them, drawn by the items' keys and seed."""
    some = np.flatnonzero(np.diff(holdout.indptr) > 0)
    return some[choose(keys[some], maximum, seed)].astype(np.int32)


PRIOR_USERS = (0.0, 1.0, 3.0)
_GRID: dict[str, Sequence[float]] = {
    "popularity_half_life_days": (0.0, *TREND_HALF_LIVES),
    "popularity_weight": (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0),
    "target_norm_exponent": (0.0, 0.25, 0.5, 0.75, 1.0),
    "prior_users": PRIOR_USERS,
}
_USER_LEVEL_WEIGHTS = (0.3, 1.0, 3.0)
_TEMPERATURES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 9.0, 13.0, 20.0)
_CONTENT_SHARES = (0.1, 0.15, 0.3, 0.5, 0.7, 0.85, 1.0)
_SURE = 2.0  # standard errors
_CUTOFF = 100
_NUM_SWEEPS = 2
_BLOCK = 250  # triggers scored at once: 68 MB of scores at 68 k items


class Calibration:
    """Coordinate search of ScoreWeights against holdout recall; each setting is evaluated once.

    Args:
        holdout: (N, N) what followed.
        triggers: (T,) the rows of it to look at.
        stay: standard errors that a gain must exceed for a weight to change.
        watch: told the number of settings tried, after each.
    """

    def __init__(self, *, holdout: Sparse, triggers: Ints, stay: float = 0.0, watch: Callable[[int], None] | None = None) -> None:
        self.triggers, self.stay = triggers, stay
        self._watch = watch
        self.truth: Sparse = holdout[triggers]
        self.log: list[dict[str, float]] = []

    def values(self, factorization: Factorization, measure: Callable[[Floats, Ints, Sparse], Values]) -> Values:
        """(T,) a measure of the sampled triggers, computed in blocks."""
        parts = []
        for start in range(0, len(self.triggers), _BLOCK):
            part = self.triggers[start : start + _BLOCK]
            parts.append(measure(factorization.scores(part), part, self.truth[start : start + _BLOCK]))
        return np.concatenate(parts)

    def recall(self, spectra: Mapping[float, Spectral], weights: ScoreWeights) -> Values:
        """(T,) recall@100 of one setting; its mean is logged."""
        values = self.values(spectra[weights.user_level_weight].factorization(weights), lambda s, t, truth: recalls(s, t, truth, _CUTOFF))
        self.log.append({**dataclasses.asdict(weights), "recall": float(values.mean())})
        if self._watch is not None:
            self._watch(len(self.log))
        return values

    def improve(self, spectra: Mapping[float, Spectral], weights: ScoreWeights, dimensions: Sequence[int]) -> tuple[ScoreWeights, float]:
        """Sweeps over the coordinates until none moves, two at most; a coordinate moves only where recall gains enough."""
        best = self.recall(spectra, weights)
        grid = {"user_level_weight": list(spectra), **_GRID, "dimension": dimensions}
        for _ in range(_NUM_SWEEPS):
            before = weights
            for name, values in grid.items():
                for value in values:
                    trial = weights.changed(name, value)
                    if value != getattr(weights, name) and is_better(gained := self.recall(spectra, trial), best, stay=self.stay):
                        weights, best = trial, gained
            if weights == before:
                break
        return weights, float(best.mean())

    def temperature(self, spectral: Spectral, weights: ScoreWeights) -> float:
        """T of the largest likelihood, if it gains enough against the present one."""

        def likelihood(temperature: float) -> Values:
            trial = dataclasses.replace(weights, temperature=temperature)
            return self.values(spectral.factorization(trial), log_likelihoods)

        return _choose({value: likelihood(value) for value in (weights.temperature, *_TEMPERATURES)}, weights.temperature, self.stay)


def _choose(values: Mapping[float, Values], present: float, stay: float) -> float:
    """The setting with the highest mean, or the present one unless that gains more than `stay` standard errors."""
    best = max(values, key=lambda setting: float(values[setting].mean()))
    return best if is_better(values[best], values[present], stay=stay) else present


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """What the holdout chose.

    Attributes:
        weights: of the engagement score.
        content_share: of the relevance head's start.
        fit: the factorization of the history before the holdout, with these weights.
        recall: holdout recall@100 of it; nan without a holdout.
        log: every setting tried, with its recall.
    """

    weights: ScoreWeights
    content_share: float
    fit: Factorization
    recall: float
    log: list[dict[str, float]]


def calibrate(
    history: History,
    content: Floats,
    holdout: Sparse,
    triggers: Ints,
    *,
    start: ScoreWeights,
    largest: int,
    content_share: float,
    seed: int,
    stay: float = 0.0,
    watch: Callable[[int], None] | None = None,
) -> Calibrated:
    """Choose the weights on the holdout by coordinate search; without triggers the given ones stand.

    Recall on some hundred triggers has several settings within its noise of the best. Who takes the best one every night jumps between
    them, and the lists with it: against rho = .35, a rho of .5 changes a fifth of the first twenty on ifdb_games. So a night that starts
    from the weights of the night before moves only for a gain that is clearly more than chance.

    Args:
        history: before the holdout.
        content: (N, C).
        holdout: (N, N) what followed.
        triggers: (T,) the rows of it to look at.
        start: weights to start from.
        largest: K of the largest factorization tried; the other one has half of it.
        content_share: share to start from, of the relevance head.
        seed: of the range finder.
        stay: standard errors that a gain must exceed for a weight to change.
        watch: told the number of settings tried, after each.
    """

    def spectral(user_level_weight: float) -> Spectral:
        return Spectral(history, content, user_level_weight=user_level_weight, dimension=largest, seed=seed)

    if not len(triggers):
        fit = spectral(start.user_level_weight).factorization(start)
        return Calibrated(weights=start, content_share=content_share, fit=fit, recall=float("nan"), log=[])
    search = Calibration(holdout=holdout, triggers=triggers, stay=stay, watch=watch)
    spectra = {b: spectral(b) for b in sorted({*_USER_LEVEL_WEIGHTS, start.user_level_weight})}
    weights, reached = search.improve(spectra, start, (largest, largest // 2))
    best = spectra[weights.user_level_weight]
    weights = dataclasses.replace(weights, temperature=search.temperature(best, weights))
    fit = best.factorization(weights)
    share = choose_content_share(fit, content, history, holdout, triggers, default=content_share, stay=stay)
    return Calibrated(weights=weights, content_share=share, fit=fit, recall=reached, log=search.log)


def choose_content_share(
    fit: Factorization, content: Floats, history: History, holdout: Sparse, triggers: Ints, *, default: float, stay: float = 0.0
) -> float:
    """The largest share of content cosine whose recall on *new* pairs, which no count can know, is not surely below the best share's.

    It is the relevance head's: engagement has to earn its place there, by more than the noise of some hundred triggers, and never by a
    judge of relevance. With `stay` the default stands unless the best share gains more than so many standard errors.
    """
    known = history.pairs[triggers] + history.pairs.T.tocsr()[triggers]
    new = holdout[triggers]
    new = (new - new.multiply(known > 0)).tocsr()
    new.eliminate_zeros()
    some = np.flatnonzero(np.diff(new.indptr) > 0)
    if len(some) < 2:
        return default
    found: dict[float, list[Values]] = {share: [] for share in (default, *_CONTENT_SHARES)}
    for start in range(0, len(some), _BLOCK):
        part = some[start : start + _BLOCK]
        rows = triggers[part]
        by_content, spectral = content[rows] @ content.T, fit.trigger[rows] @ fit.trigger.T
        for share in found:
            scores = np.float32(share) * by_content + np.float32(1 - share) * spectral
            found[share].append(recalls(scores, rows, new[part], _CUTOFF))
    values = {share: np.concatenate(parts) for share, parts in found.items()}
    best = max(values.values(), key=lambda reached: float(reached.mean()))
    if stay and not is_better(best, values[default], stay=stay):
        return default
    return max(share for share, reached in values.items() if not is_better(best, reached, stay=_SURE))
