"""The one order of this project: score descending, then item index ascending (which is item_id ascending).

Shapes: `B` triggers, `W` columns, `M` candidates of all triggers in one flat list, trigger b owning `offsets[b]:offsets[b + 1]`.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from models.data import Floats

Longs = npt.NDArray[np.int64]

_CELLS_AT_ONCE = 16_000_000  # of a triggers x items matrix: 64 MB of scores, of which a few copies live at a time
_LOW = np.uint64(0xFFFFFFFF)


def best_per_row(scores: Floats, k: int) -> Longs:
    """The k best columns of each row.

    Score and column are packed into one integer: a plain sort of integers then breaks ties by column, and is vectorized.

    Args:
        scores: (B, W) without NaN; -inf marks what must not be chosen.
        k: most columns per row.

    Returns:
        (B, min(k, W)) columns, best first, ties by column; -1 where a row has no more.
    """
    width = scores.shape[1]
    if width == 0 or k == 0:
        return np.empty((len(scores), 0), dtype=np.int64)
    bits = (np.asarray(scores, dtype=np.float32) + np.float32(0)).view(np.uint32)  # + 0 makes 0 of -0, which ties with it
    descending = np.where(bits >> 31, bits, ~(bits | np.uint32(0x80000000)))  # IEEE 754 bits of one sign order like integers
    keys = descending.astype(np.uint64) << np.uint64(32) | np.arange(width, dtype=np.uint64)
    if k < width:
        keys = np.partition(keys, k - 1, axis=1)[:, :k]
    keys.sort(axis=1)
    columns = (keys & _LOW).astype(np.int64)
    columns[np.take_along_axis(scores, columns, axis=1) == -np.inf] = -1
    return columns


def blocks(num_rows: int, width: int) -> Iterator[slice]:
    """Slices of `num_rows` rows, `width` columns wide, small enough to hold a few dense copies of."""
    step = max(1, _CELLS_AT_ONCE // max(1, width))
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))


def segments(offsets: Longs) -> Longs:
    """(B + 1,) offsets -> (M,) row of each candidate."""
    return np.repeat(np.arange(len(offsets) - 1, dtype=np.int64), np.diff(offsets))


def pad(values: Floats, offsets: Longs) -> Floats:
    """(M,) flat -> (B, W) rows, the longest one's length wide, -inf behind the end of shorter ones."""
    lengths = np.diff(offsets)
    dense = np.full((len(lengths), int(lengths.max(initial=0))), -np.inf, dtype=np.float32)
    dense[np.arange(dense.shape[1]) < lengths[:, None]] = values
    return dense


def best_per_segment(scores: Floats, offsets: Longs, k: int) -> tuple[Longs, Longs]:
    """The k best candidates of each trigger.

    Args:
        scores: (M,); -inf marks what must not be chosen.
        offsets: (B + 1,).
        k: most candidates per trigger.

    Returns:
        (R,) positions among the M, best first per trigger, ties by position; and their (B + 1,) offsets.
    """
    lengths = np.diff(offsets)
    columns = np.full((len(lengths), min(k, int(lengths.max(initial=0)))), -1, dtype=np.int64)
    for rows in _alike(lengths):
        bounds = ends(lengths[rows])
        mine = np.arange(bounds[-1]) + np.repeat(offsets[rows] - bounds[:-1], lengths[rows])
        best = best_per_row(pad(scores[mine], bounds), k)
        columns[rows, : best.shape[1]] = best
    found = columns >= 0
    return (columns + offsets[:-1, None])[found], ends(found.sum(axis=1))


def _alike(lengths: Longs) -> list[Longs]:
    """Rows by the power of two that their length needs: as wide as the longest of all, most of a matrix could be its padding."""
    bits = np.frexp(np.maximum(lengths, 1) - 1)[1]
    return [np.flatnonzero(bits == number) for number in np.unique(bits[lengths > 0])]


def ends(lengths: npt.NDArray[np.integer]) -> Longs:
    """(B,) lengths -> (B + 1,) offsets."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
