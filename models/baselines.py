"""What a list must beat: popularity, raw counts with popularity behind them, content.

Each takes T triggers and gives (T, k) item indices, best first, ties by index, -1 where there are fewer. The trigger itself and
ineligible items are never listed. A trigger at or beyond N (an item that was not known yet) has no counts and no content.

Shapes: `T` triggers, `N` items, `C` content dimensions.
"""

import numpy as np
from scipy.sparse import csr_array

from models.data import Bools, Floats, Ints
from models.ranking import Longs, best_per_row, best_per_segment, ends, segments

_CELLS_AT_ONCE = 16_000_000  # of a triggers x items matrix: 64 MB of scores, twice that of sort keys


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
    rows = counts[np.where(triggers < counts.shape[0], triggers, 0)]
    offsets, target = rows.indptr.astype(np.int64), rows.indices
    trigger = triggers[segments(offsets)]
    usable = eligible[target] & (target != trigger) & (rows.data > 0) & (trigger < counts.shape[0])
    position, listed = best_per_segment(np.where(usable, rows.data, -np.inf).astype(np.float32), offsets, k)
    counted = _rows(target[position], listed, k)
    popular = popularity_lists(triggers, popularity=popularity, eligible=eligible, k=2 * k)  # at most k of them are counted already
    return _first(np.concatenate([counted, _unless_listed(popular, counted)], axis=1), k)


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
    lists = np.full((len(triggers), k), -1, dtype=np.int32)
    known = np.flatnonzero((triggers < len(content)) & described[np.minimum(triggers, len(content) - 1)])
    step = max(1, _CELLS_AT_ONCE // max(1, len(items)))
    for rows in (known[start : start + step] for start in range(0, len(known), step)):
        scores = content[triggers[rows]] @ content[items].T
        scores[items == triggers[rows][:, None]] = -np.inf
        columns = best_per_row(scores, k)
        lists[rows, : columns.shape[1]] = np.where(columns >= 0, items[columns], -1)
    return lists


def _popular(popularity: Floats, eligible: Bools, k: int) -> Ints:
    """The first k eligible items by popularity."""
    items = np.flatnonzero(eligible).astype(np.int32)
    return items[np.argsort(-popularity[items], kind="stable")][:k]


def _rows(items: Ints, offsets: Longs, k: int) -> Ints:
    """Flat items -> (T, k), -1 behind the end of a row."""
    filled = np.arange(k) < np.diff(offsets)[:, None]
    lists = np.full(filled.shape, -1, dtype=np.int32)
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
