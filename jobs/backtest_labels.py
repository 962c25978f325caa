"""Where the labels of a crowded picture go: beside their points, clear of each other, of what is drawn and of each other's leaders.

All lengths are in pixels, y upward.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Spot = tuple[float, float]
"""x and y."""

_REACHES = (8.0, 14.0, 22.0, 34.0, 50.0, 70.0)
"""Distances at which a label is tried around its point."""
_NUM_DIRECTIONS = 16
_LEADER_FROM = 12.0
"""A label farther away than this is tied to its point by a line, its leader."""
_MARGIN = 3.0
"""What is drawn closer to a label than this disturbs it."""


@dataclass(frozen=True, kw_only=True)
class Box:
    """An upright rectangle."""

    left: float
    bottom: float
    right: float
    top: float

    @property
    def area(self) -> float:
        """In square pixels."""
        return (self.right - self.left) * (self.top - self.bottom)

    def overlap(self, other: "Box") -> float:
        """Square pixels that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(width, 0.0) * max(height, 0.0)

    def nearest(self, spot: Spot) -> Spot:
        """The spot of this box that is nearest to the given one."""
        return min(max(spot[0], self.left), self.right), min(max(spot[1], self.bottom), self.top)

    def touches(self, spot: Spot) -> bool:
        """Whether the spot lies in the box or at its margin."""
        return math.dist(spot, self.nearest(spot)) < _MARGIN


def place(points: Sequence[Spot], sizes: Sequence[Spot], *, frame: Box, drawn: Sequence[Spot]) -> list[Box]:
    """Greedily, in the given order, a box of its size for every point where it disturbs least.

    Args:
        points: what the labels belong to.
        sizes: width and height of each label.
        frame: labels had better stay inside.
        drawn: spots along everything that is drawn.
    """
    placed: list[Box] = []
    occupied = list(drawn)
    for point, size in zip(points, sizes, strict=True):
        tried = [_around(point, size, reach, turn) for reach in _REACHES for turn in range(_NUM_DIRECTIONS)]
        costs = [_cost(box, point, frame, placed, occupied) for box in tried]
        placed.append(tried[costs.index(min(costs))])
        occupied += leader(point, placed[-1])
    return placed


def leader(point: Spot, box: Box) -> list[Spot]:
    """Spots of the line from a point to its label; none if it is near enough to be understood without."""
    end = box.nearest(point)
    return between(point, end) if math.dist(point, end) > _LEADER_FROM else []


def between(first: Spot, second: Spot, num_steps: int = 8) -> list[Spot]:
    """Evenly spaced spots from one to the other, both included."""
    shares = [step / num_steps for step in range(num_steps + 1)]
    return [(first[0] + share * (second[0] - first[0]), first[1] + share * (second[1] - first[1])) for share in shares]


def _around(point: Spot, size: Spot, reach: float, turn: int) -> Box:
    """The box whose edge or corner is `reach` away from the point; turn 0 is to its right, then counterclockwise."""
    angle = math.tau * turn / _NUM_DIRECTIONS
    left = point[0] + math.cos(angle) * reach + (math.cos(angle) - 1) * size[0] / 2
    bottom = point[1] + math.sin(angle) * reach + (math.sin(angle) - 1) * size[1] / 2
    return Box(left=left, bottom=bottom, right=left + size[0], top=bottom + size[1])


def _cost(box: Box, point: Spot, frame: Box, placed: Sequence[Box], occupied: Sequence[Spot]) -> float:
    """Covered text is worst, then a leader through text, then text outside the frame, then covered lines, then distance."""
    covered = sum(box.overlap(other) for other in placed) / box.area
    crossed = sum(other.touches(spot) for other in placed for spot in leader(point, box))
    outside = 1 - box.overlap(frame) / box.area
    disturbed = sum(box.touches(spot) for spot in occupied)
    return 2_000 * covered + 200 * crossed + 1_000 * outside + 12 * disturbed + 2 * math.dist(point, box.nearest(point))
