"""How good lists are: against what happened next, against a judge, and as a whole.

A list is a row of item indices, best first, -1 for a missing position; a missing position counts as a miss, never as a shorter list.
Metrics of triggers return one value per trigger, NaN where it is undefined (a trigger without any future partner), so that intervals and
paired differences can resample triggers. `future` holds the weight of each future partner.

Shapes: `T` triggers, `K` positions, `N` items, `N'` items of the future (those of the catalog first, then those it did not know),
`C` content dimensions, `P` settings of a swept dial, `S` bootstrap resamples.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from models.judges import Judge
from models.ranking import Longs

Values = npt.NDArray[np.float64]
Items = npt.NDArray[np.integer]
Mask = npt.NDArray[np.bool_]
Vectors = npt.NDArray[np.floating]
_RESAMPLES_AT_ONCE = 4_000_000  # drawn indices held in memory: 32 MB
_CELLS_AT_ONCE = 4_000_000  # of a triggers x items matrix, or of gathered vectors: 16 MB in float32


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number over triggers with a percentile bootstrap interval; all NaN when there is no trigger."""

    value: float
    low: float
    high: float
    num_triggers: int


_NOTHING = Estimate(value=float("nan"), low=float("nan"), high=float("nan"), num_triggers=0)


# --- per trigger ---


def recall_at_k(lists: Items, future: csr_array, *, k: int) -> Values:
    """Share of a trigger's future weight that its first k neighbors hold: sum_{j in list[:k]} w_ij / sum_j w_ij.

    Args:
        lists: (T, K).
        future: (T, N) weights >= 0.
        k: positions that count.

    Returns:
        (T,); its mean is macro recall: every trigger counts the same.
    """
    found, total = micro_recall_at_k(lists, future, k=k)
    return _ratio(found, total)


def micro_recall_at_k(lists: Items, future: csr_array, *, k: int) -> tuple[Values, Values]:
    """What micro recall is made of, sum_t found_t / sum_t total_t: every future co-engagement counts the same (see `bootstrap_ratio`).

    Args:
        lists: (T, K).
        future: (T, N') weights >= 0.
        k: positions that count.

    Returns:
        found: (T,) future weight that the first k neighbors hold.
        total: (T,) future weight.
    """
    partners = _canonical(future)
    total = np.asarray(partners.sum(axis=1), dtype=np.float64)
    return np.asarray(_weights_of(lists[:, :k], partners).sum(axis=1), dtype=np.float64), total


def debiased_recall_at_k(lists: Items, future: csr_array, popularity: npt.NDArray[np.floating], *, k: int) -> Values:
    """Recall in which a partner weighs w_ij / sqrt(popularity_j), so that finding what everybody finds earns less.

    Args:
        lists: (T, K).
        future: (T, N) weights >= 0.
        popularity: (N,) user-days before the lists were made; below 1 counts as 1.
        k: positions that count.
    """
    partners = _canonical(future)
    partners.data = partners.data / np.sqrt(np.maximum(popularity, 1.0))[partners.indices]
    return recall_at_k(lists, partners, k=k)


def relevance_at_k(lists: Items, judged: Values, *, k: int) -> Values:
    """Mean judged relevance over k positions.

    Args:
        lists: (T, K).
        judged: (T, K) relevance of trigger and neighbor in [0, 1]; NaN, not judged, counts as 0.
        k: positions that count, also those that no list of T reaches.
    """
    kept = np.where(lists[:, :k] >= 0, np.nan_to_num(judged[:, :k], nan=0.0), 0.0)
    return np.asarray(kept.sum(axis=1) / k, dtype=np.float64)


def rel_ndcg_at_k(judged: Values, ideal: Values) -> Values:
    """Judged relevance, early positions first: sum_r g_r / log2(r + 1) over that of the best list there could be.

    NDCG of Järvelin and Kekäläinen (2002) with gain = grade; the best list is of the full catalog, not of what happens to be listed.

    Args:
        judged: (T, K) grades by position, r from 1; NaN, a missing position, counts as 0.
        ideal: (T, k) the best grades, descending (see `ideal_grades`); its width is the number of positions that count.

    Returns:
        (T,), NaN where the ideal is 0: nothing in the catalog is relevant.
    """
    return _ratio(_discounted(judged[:, : ideal.shape[1]]), _discounted(ideal))


def ideal_grades(judge: Judge, triggers: Items, eligible: Mask, *, k: int) -> Values:
    """The best grades that a list of k eligible items could show, the trigger itself never among them.

    Args:
        judge: of N items.
        triggers: (T,) item indices.
        eligible: (N,) may be listed.
        k: list length.

    Returns:
        (T, k) descending, rounded to float32; 0 behind the last eligible item.
    """
    items = np.flatnonzero(eligible)
    best = np.zeros((len(triggers), k))
    step = max(1, _CELLS_AT_ONCE // max(1, len(eligible)))
    for start in range(0, len(triggers), step):
        costs = -judge.rows(triggers[start : start + step])[:, items]  # the trigger has grade 0 with itself, which adds nothing
        if k < len(items):
            costs = np.partition(costs, k, axis=1)[:, :k]  # of the smallest: some 10 times faster than of the largest
        best[start : start + step, : costs.shape[1]] = -np.sort(costs, axis=1)
    return best


def tail_share_at_k(lists: Items, tail: Mask, *, k: int) -> Values:
    """Share of the filled ones among the first k positions that show tail items.

    Args:
        lists: (T, K).
        tail: (N,) see `tail_items`.
        k: positions that count.

    Returns:
        (T,), NaN for an empty list.
    """
    shown = lists[:, :k]
    filled = shown >= 0
    if not filled.any():
        return np.full(len(lists), np.nan)
    return _ratio((filled & tail[np.where(filled, shown, 0)]).sum(axis=1), filled.sum(axis=1))


def intra_list_diversity_at_k(lists: Items, vectors: Vectors, *, k: int) -> Values:
    """1 - mean cosine of the pairs of the first k neighbors, by |sum v|^2 = sum |v|^2 + twice the cosines (Ziegler et al. 2005).

    Args:
        lists: (T, K).
        vectors: (N, C) unit rows; an item with a row of zeros has no vector, and is left out rather than called different from all.
        k: positions that count.

    Returns:
        (T,), NaN with fewer than two neighbors that have a vector.
    """
    described = np.any(vectors, axis=1)
    diversity = np.full(len(lists), np.nan)
    step = max(1, _CELLS_AT_ONCE // max(1, k * vectors.shape[1]))
    for start in range(0, len(lists), step):
        shown = lists[start : start + step, :k]
        used = (shown >= 0) & described[shown]  # -1 reads the last item, and is masked
        listed = np.where(used[:, :, None], vectors[shown], 0.0)  # (t, k, C)
        squares = np.einsum("tkc,tkc->t", listed, listed, dtype=np.float64)
        whole = listed.sum(axis=1, dtype=np.float64)
        num_used = used.sum(axis=1)
        diversity[start : start + step] = 1.0 - _ratio((whole**2).sum(axis=1) - squares, num_used * (num_used - 1))
    return diversity


def overlap_at_k(a: Items, b: Items, *, k: int) -> Values:
    """Jaccard similarity |A and B| / |A or B| of the first k neighbors that two methods list for the same triggers; 1 for two empty lists.

    Args:
        a: (T, K), no item twice in a row.
        b: (T, K'), likewise.
        k: positions that count.
    """
    return 1.0 - churn_at_k(a, b, k=k)


def churn_at_k(before: Items, now: Items, *, k: int) -> Values:
    """1 - |A and B| / |A or B| of the first k neighbors of the same triggers on two nights; two empty lists did not change.

    Args:
        before: (T, K), no item twice in a row.
        now: (T, K'), likewise.
        k: positions that count.
    """
    old, new = before[:, :k], now[:, :k]
    num_old, num_new = (old >= 0).sum(axis=1), (new >= 0).sum(axis=1)
    together = np.sort(np.concatenate([old, new], axis=1), axis=1)  # an item of both lists stands twice in a row
    both = ((together[:, 1:] == together[:, :-1]) & (together[:, 1:] >= 0)).sum(axis=1)
    either = num_old + num_new - both
    jaccard: Values = np.divide(both, either, out=np.ones(len(both)), where=either > 0)
    return 1.0 - jaccard


def _ratio(part: npt.NDArray[np.number], whole: npt.NDArray[np.number]) -> Values:
    """(T,) part / whole, NaN where there is no whole."""
    ratio: Values = np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)
    return ratio


def _discounted(grades: Values) -> Values:
    """(T, k) grades by position -> (T,) discounted gain, NaN counting as 0.

    Grades are rounded to float32, as those of `ideal_grades` are: else the ratio of the best list could differ from 1.
    """
    gains = np.nan_to_num(grades, nan=0.0).astype(np.float32)
    return np.asarray(gains @ (1.0 / np.log2(np.arange(grades.shape[1]) + 2.0)), dtype=np.float64)


def _canonical(future: csr_array) -> csr_array:
    """A float64 copy with ascending, unique columns."""
    partners: csr_array = future.astype(np.float64, copy=True)
    partners.sum_duplicates()
    return partners


def _weights_of(lists: Items, partners: csr_array) -> Values:
    """(T, K) weight of each listed item, 0 for strangers and missing positions."""
    num_rows, num_items = partners.shape
    if not partners.nnz:
        return np.zeros(lists.shape)
    known = _flat_cells(partners, num_items)
    wanted = np.arange(num_rows, dtype=np.int64)[:, None] * num_items + lists
    at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return np.where((lists >= 0) & (known[at] == wanted), partners.data[at], 0.0)


# --- slices: the part of the future that a question is about ---


def new_pairs(future: csr_array, known: csr_array) -> csr_array:
    """The co-engagements of pairs that `known` does not have: what cannot be found by remembering.

    Args:
        future: (T, N') weights.
        known: (T, N) for the same triggers; what counts is where it is not 0. N and N' may differ, item j is item j.

    Returns:
        (T, N') without explicit zeros.
    """
    partners = _canonical(future)
    return _kept(partners, ~_held(partners, known))


def targets_in(future: csr_array, items: Mask) -> csr_array:
    """The co-engagements with targets of a group of items: cold ones, say, or the tail.

    Args:
        future: (T, N') weights.
        items: (N',) the group.

    Returns:
        (T, N') without explicit zeros.

    Raises:
        ValueError: the mask is not of the items of the future.
    """
    if items.shape != (future.shape[1],):
        raise ValueError(f"found a mask {items.shape} for a future of {future.shape[1]} items; wanted one for each of its items")
    partners = _canonical(future)
    return _kept(partners, items[partners.indices])


def tail_items(popularity: npt.NDArray[np.number], *, share: float = 0.8) -> Mask:
    """Items outside the head, the smallest set of most popular items that together hold a share of the engagement.

    Args:
        popularity: (N,) engagement >= 0; of equally popular items at the border the first ones are in the head.
        share: what the head holds at least.

    Returns:
        (N,).
    """
    order = np.argsort(-popularity, kind="stable")
    held = np.cumsum(popularity[order], dtype=np.float64)
    before = np.concatenate([[0.0], held[:-1]])[: len(order)]  # by the more popular ones
    tail = np.empty(len(popularity), dtype=np.bool_)
    # without the slack, 0.8 of a sum can lie a rounding error above what holds exactly that, and the head would take one more
    tail[order] = before >= share * held[-1:].sum() * (1 - 1e-12)
    return tail


def _held(partners: csr_array, other: csr_array) -> Mask:
    """Of each stored cell of (T, N') `partners`, in order: the (T, N) `other` is not 0 there."""
    if partners.shape[0] != other.shape[0]:
        raise ValueError(f"found {other.shape[0]} rows of pairs against {partners.shape[0]} of the future; wanted the same triggers")
    width = max(partners.shape[1], other.shape[1])
    cells = _canonical(other)
    cells.eliminate_zeros()
    return np.isin(_flat_cells(partners, width), _flat_cells(cells, width))


def _kept(partners: csr_array, kept: Mask) -> csr_array:
    partners.data = np.where(kept, partners.data, 0.0)
    partners.eliminate_zeros()
    return partners


def _flat_cells(cells: csr_array, width: int) -> Longs:
    """Where each stored cell stands, in order: row * width + column."""
    rows = np.repeat(np.arange(cells.shape[0], dtype=np.int64), np.diff(cells.indptr))
    return rows * width + cells.indices


# --- of all lists together ---


def in_degrees(lists: Items, *, k: int, num_items: int) -> Longs:
    """(N,) number of lists whose first k positions show the item."""
    shown = lists[:, :k]
    return np.bincount(shown[shown >= 0], minlength=num_items).astype(np.int64)


def coverage_at_k(lists: Items, eligible: npt.NDArray[np.bool_], *, k: int) -> float:
    """Share of the (N,) eligible items that at least one list shows among its first k; NaN without any."""
    degrees = in_degrees(lists, k=k, num_items=len(eligible))[eligible]
    return float((degrees > 0).mean()) if len(degrees) else float("nan")


def gini_at_k(lists: Items, eligible: npt.NDArray[np.bool_], *, k: int) -> float:
    """In-degree Gini over the (N,) eligible items: 0 when all are shown equally often, near 1 when few are shown everywhere.

    G = sum_r (2r - n - 1) d_r / (n sum_r d_r) with in-degrees d ascending, r from 1 to n. NaN when nothing is shown.
    """
    degrees = np.sort(in_degrees(lists, k=k, num_items=len(eligible))[eligible])
    n, total = len(degrees), degrees.sum()
    if total == 0:
        return float("nan")
    ranks = np.arange(1, n + 1)
    return float(((2 * ranks - n - 1) * degrees).sum() / (n * total))


def hypervolume(points: Values, *, reference: tuple[float, float] = (0.0, 0.0), mixtures: bool = False) -> float:
    """Area that a family of trade-offs dominates above the reference, both axes to be maximized (Zitzler and Thiele 1999).

    Of two families on the same curve the one that is swept in finer steps has more of it, a few percent between 7 and 14 settings. Mixtures
    make that level: one of two settings for some triggers and the other one for the rest has means on the line between them.

    Args:
        points: (P, 2), in any order; what does not exceed the reference on both axes adds nothing.
        reference: the corner from which areas are measured.
        mixtures: whether what mixtures of two settings dominate counts, too, which is all below the concave hull.

    Returns:
        0 without points, NaN if a coordinate is NaN.
    """
    return float(_areas(points[None, :, 0], points[None, :, 1], reference, mixtures)[0])


def _areas(x: Values, y: Values, reference: tuple[float, float], mixtures: bool) -> Values:
    """(S, P) coordinates of S families -> (S,) areas."""
    if not x.shape[1]:
        return np.zeros(len(x))
    width, height = x - reference[0], y - reference[1]
    outside = np.minimum(width, height) <= 0  # false of NaN, which stays
    width, height = (np.where(outside, 0.0, axis) for axis in (width, height))
    return _below_hull(width, height) if mixtures else _below_steps(width, height)


def _below_steps(width: Values, height: Values) -> Values:
    """From the right, each strip is as high as the highest point so far."""
    order = np.argsort(-width, axis=1, kind="stable")
    width, height = np.take_along_axis(width, order, axis=1), np.take_along_axis(height, order, axis=1)
    strips = width - np.concatenate([width[:, 1:], np.zeros((len(width), 1))], axis=1)
    return np.asarray((strips * np.maximum.accumulate(height, axis=1)).sum(axis=1), dtype=np.float64)


def _below_hull(width: Values, height: Values) -> Values:
    """The concave hull begins as high as the highest point."""
    start = np.zeros((len(width), 1))
    width, height = np.concatenate([start, width], axis=1), np.concatenate([height.max(axis=1, keepdims=True), height], axis=1)
    order = np.argsort(width, axis=1, kind="stable")
    width, height = np.take_along_axis(width, order, axis=1), np.take_along_axis(height, order, axis=1)
    hull = height.copy()
    for left, right in itertools.combinations(range(width.shape[1]), 2):  # the highest line that passes over each point
        inside = slice(left, right + 1)
        run = (width[:, right] - width[:, left])[:, None]
        share = np.divide(width[:, inside] - width[:, left, None], run, out=np.zeros((len(width), right + 1 - left)), where=run > 0)
        line = height[:, left, None] + share * (height[:, right] - height[:, left])[:, None]
        hull[:, inside] = np.maximum(hull[:, inside], line)
    return np.asarray((np.diff(width, axis=1) * (hull[:, 1:] + hull[:, :-1]) / 2).sum(axis=1), dtype=np.float64)


# --- intervals ---


def bootstrap(values: Values, *, num_resamples: int, seed: int, confidence: float = 0.95) -> Estimate:
    """Mean over triggers and its percentile interval, resampling triggers with replacement.

    Args:
        values: (T,) of a metric; NaN left out.
        num_resamples: S.
        seed: equal seeds give equal intervals.
        confidence: share of the resampled means inside.
    """
    defined = values[~np.isnan(values)]
    if not len(defined):
        return _NOTHING
    means = _resampled_means(defined, num_resamples, np.random.default_rng(seed))
    return _estimate(float(defined.mean()), means, num_triggers=len(defined), confidence=confidence)


def paired_difference(values: Values, baseline: Values, *, num_resamples: int, seed: int, confidence: float = 0.95) -> Estimate:
    """Mean of values - baseline over the same triggers with its interval: above zero as a whole, the gain is not the triggers' luck.

    Args:
        values: (T,) of a metric.
        baseline: (T,) of the same metric and triggers; a trigger that is NaN on either side is left out.
        num_resamples: S.
        seed: equal seeds give equal intervals.
        confidence: share of the resampled means inside.

    Raises:
        ValueError: the two are not of the same triggers.
    """
    if values.shape != baseline.shape:
        raise ValueError(
            f"found {values.shape} values against {baseline.shape} of the baseline; wanted the same triggers in the same order"
        )
    return bootstrap(values - baseline, num_resamples=num_resamples, seed=seed, confidence=confidence)


def bootstrap_ratio(found: Values, total: Values, *, num_resamples: int, seed: int, confidence: float = 0.95) -> Estimate:
    """sum_t found_t / sum_t total_t and its percentile interval, resampling triggers with replacement.

    Args:
        found: (T,) parts, as of `micro_recall_at_k`.
        total: (T,) wholes >= 0; a trigger with 0 is left out.
        num_resamples: S.
        seed: equal seeds give equal intervals.
        confidence: share of the resampled ratios inside.

    Raises:
        ValueError: the two are not of the same triggers.
    """
    _check_same({"found": found, "total": total})
    parts = np.stack([found, total], axis=1)[total > 0]  # (T, 2)
    if not len(parts):
        return _NOTHING
    sums = np.concatenate([counts @ parts for counts in _resample_counts(len(parts), num_resamples, seed)])
    value = float(parts[:, 0].sum() / parts[:, 1].sum())
    return _estimate(value, sums[:, 0] / sums[:, 1], num_triggers=len(parts), confidence=confidence)


def bootstrap_hypervolume(
    x: Values,
    y: Values,
    *,
    num_resamples: int,
    seed: int,
    reference: tuple[float, float] = (0.0, 0.0),
    mixtures: bool = False,
    confidence: float = 0.95,
) -> Estimate:
    """Hypervolume of a swept dial, each setting's point being its means over triggers, and its percentile interval.

    Args:
        x: (T, P) a metric of each trigger under each of P settings. Means are over the triggers where it is not NaN (nanmean), for each
            axis by itself: a trigger without future counts in no recall and yet in relevance.
        y: (T, P) the other metric, likewise.
        num_resamples: S.
        seed: equal seeds give equal intervals.
        reference: see `hypervolume`.
        mixtures: see `hypervolume`.
        confidence: share of the resampled areas inside.

    Returns:
        num_triggers are those with a value on an axis; NaN if a setting has no value at all on one.

    Raises:
        ValueError: x and y are not of the same triggers and settings.
    """
    _check_same({"x": x, "y": y})
    kept = ~(np.isnan(x) & np.isnan(y)).all(axis=1)
    areas = partial(_areas, reference=reference, mixtures=mixtures)
    return _frontier_estimate([(x[kept], y[kept])], areas, num_resamples=num_resamples, seed=seed, confidence=confidence)


def paired_hypervolume(
    x_a: Values,
    y_a: Values,
    x_b: Values,
    y_b: Values,
    *,
    num_resamples: int,
    seed: int,
    reference: tuple[float, float] = (0.0, 0.0),
    mixtures: bool = False,
    confidence: float = 0.95,
) -> Estimate:
    """Hypervolume of family a minus that of family b over the same triggers, each resample drawn once for both.

    Args:
        x_a: (T, P) as in `bootstrap_hypervolume`.
        y_a: (T, P).
        x_b: (T, P') of the same triggers; families may have different numbers of settings.
        y_b: (T, P').
        num_resamples: S.
        seed: equal seeds give equal intervals.
        reference: see `hypervolume`.
        mixtures: see `hypervolume`.
        confidence: share of the resampled differences inside.

    Raises:
        ValueError: x and y of a family are not of the same triggers and settings, or the families not of the same triggers.
    """
    _check_same({"x_a": x_a, "y_a": y_a})
    _check_same({"x_b": x_b, "y_b": y_b})
    _check_same({"x_a": x_a[:, :0], "x_b": x_b[:, :0]})
    kept = ~np.isnan(np.concatenate([x_a, y_a, x_b, y_b], axis=1)).all(axis=1)
    families = [(x_a[kept], y_a[kept]), (x_b[kept], y_b[kept])]
    areas = partial(_areas, reference=reference, mixtures=mixtures)
    return _frontier_estimate(families, areas, num_resamples=num_resamples, seed=seed, confidence=confidence)


def _frontier_estimate(
    families: list[tuple[Values, Values]], areas: Callable[[Values, Values], Values], *, num_resamples: int, seed: int, confidence: float
) -> Estimate:
    """The first family's hypervolume, less that of the second if there is one."""
    num_triggers = len(families[0][0])
    if not num_triggers:
        return _NOTHING

    def gained(counts: Values) -> Values:
        first, *rest = [areas(_weighted_means(counts, x), _weighted_means(counts, y)) for x, y in families]
        return first - rest[0] if rest else first

    value = float(gained(np.ones((1, num_triggers)))[0])
    resampled = np.concatenate([gained(counts) for counts in _resample_counts(num_triggers, num_resamples, seed)])
    return _estimate(value, resampled, num_triggers=num_triggers, confidence=confidence)


def _weighted_means(counts: Values, values: Values) -> Values:
    """(S, T) times each trigger was drawn, (T, P) values -> (S, P) means over what is not NaN; NaN where nothing was drawn that has one."""
    defined = ~np.isnan(values)
    number = counts @ defined.astype(np.float64)
    sums = counts @ np.where(defined, values, 0.0)
    means: Values = np.divide(sums, number, out=np.full(sums.shape, np.nan), where=number > 0)
    return means


def _resample_counts(num_triggers: int, num_resamples: int, seed: int) -> Iterator[Values]:
    """Blocks of an (S, T) matrix: how often each of T triggers is drawn in T draws with replacement.

    Sums over a resample are then a matrix product, and one draw serves any number of columns.
    """
    rng = np.random.default_rng(seed)
    step = max(1, _RESAMPLES_AT_ONCE // num_triggers)
    for start in range(0, num_resamples, step):
        size = min(step, num_resamples - start)
        drawn = rng.integers(num_triggers, size=(size, num_triggers)) + np.arange(size)[:, None] * num_triggers
        yield np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape).astype(np.float64)


def _estimate(value: float, resampled: Values, *, num_triggers: int, confidence: float) -> Estimate:
    """A value with the percentile interval of its (S,) resampled ones; NaN, a resample without any value, is left out."""
    if np.isnan(value):
        return Estimate(value=value, low=value, high=value, num_triggers=num_triggers)
    low, high = np.nanquantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(value=value, low=float(low), high=float(high), num_triggers=num_triggers)


def _check_same(arrays: dict[str, Values]) -> None:
    shapes = {name: array.shape for name, array in arrays.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"found shapes {shapes}; wanted the same triggers and settings in the same order")


def _resampled_means(values: Values, num_resamples: int, rng: np.random.Generator) -> Values:
    """(S,) means of resamples, a bounded number of them drawn at once."""
    step = max(1, _RESAMPLES_AT_ONCE // len(values))
    sizes = [min(step, num_resamples - start) for start in range(0, num_resamples, step)]
    return np.concatenate([values[rng.integers(len(values), size=(size, len(values)))].mean(axis=1) for size in sizes])
