"""Volume bands: how many rows tonight may have, given the last good nights.

The center is the median of up to `MAX_NIGHTS` nights, so that one odd night neither hides a fault nor causes a false one. With a
largest drop d in [0,1], the band runs from median * (1 - d) to median / (1 - d): halving and doubling are equally suspicious.
Worked case: nights of 100, 104, 9 and 102 rows and d = 0.5 have median 101 and the band [50.5, 202].
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

MAX_NIGHTS = 7
"""Nights behind the median: a week, so that every weekday counts once."""


@dataclass(frozen=True, kw_only=True)
class VolumeBand:
    """Expected number of rows; `high` is infinite where any drop is allowed."""

    center: float
    low: float
    high: float
    num_nights: int


def volume_band(metric: str, past: Sequence[Mapping[str, float]], *, max_drop: float) -> VolumeBand | None:
    """The band of one metric.

    Args:
        metric: a count of rows.
        past: metrics of good nights, oldest first; nights without the metric, or without a finite one, do not count.
        max_drop: largest accepted drop against the median, a share in [0,1].

    Returns:
        None when no night counts: there is nothing to compare the first night with.
    """
    known = [night[metric] for night in past if math.isfinite(night.get(metric, math.nan))][-MAX_NIGHTS:]
    if not known:
        return None
    center = median(known)
    high = center / (1 - max_drop) if max_drop < 1 else math.inf
    return VolumeBand(center=center, low=center * (1 - max_drop), high=high, num_nights=len(known))
