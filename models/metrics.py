"""How good lists are: against what happened next, against a judge, and as a whole.

A list is a row of item indices, best first, -1 for a missing position; a missing position counts as a miss, never as a shorter list.
Metrics of triggers return one value per trigger, NaN where it is undefined (a trigger without any future partner), so that intervals and
paired differences can resample triggers. `future` holds the weight of each future partner.

Shapes: `T` triggers, `K` positions, `N` items, `S` bootstrap resamples.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from models.ranking import Longs

Values = npt.NDArray[np.float64]
Items = npt.NDArray[np.integer]
_RESAMPLES_AT_ONCE = 4_000_000  # drawn indices held in memory: 32 MB


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over triggers with a percentile bootstrap interval; all NaN when there is no trigger."""

    value: float
    low: float
    high: float
    num_triggers: int


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
    partners = _canonical(future)
    total = np.asarray(partners.sum(axis=1), dtype=np.float64)
    found = _weights_of(lists[:, :k], partners).sum(axis=1)
    shares: Values = np.divide(found, total, out=np.full(len(total), np.nan), where=total > 0)
    return shares


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
    rows = np.repeat(np.arange(num_rows, dtype=np.int64), np.diff(partners.indptr))
    known = rows * num_items + partners.indices
    wanted = np.arange(num_rows, dtype=np.int64)[:, None] * num_items + lists
    at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return np.where((lists >= 0) & (known[at] == wanted), partners.data[at], 0.0)


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
        return Estimate(value=float("nan"), low=float("nan"), high=float("nan"), num_triggers=0)
    means = _resampled_means(defined, num_resamples, np.random.default_rng(seed))
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(value=float(defined.mean()), low=float(low), high=float(high), num_triggers=len(defined))


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


def _resampled_means(values: Values, num_resamples: int, rng: np.random.Generator) -> Values:
    """(S,) means of resamples, a bounded number of them drawn at once."""
    step = max(1, _RESAMPLES_AT_ONCE // len(values))
    sizes = [min(step, num_resamples - start) for start in range(0, num_resamples, step)]
    return np.concatenate([values[rng.integers(len(values), size=(size, len(values)))].mean(axis=1) for size in sizes])
