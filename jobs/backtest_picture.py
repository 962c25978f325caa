"""The two-axis frontier as one SVG: recall to the right, relevance upward, an interval on both axes of every point."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from jobs.backtest_labels import Box, Spot, between, leader, place
from jobs.backtest_results import HEADS, INDEPENDENT, NEW_ITEM_BONUS, NEW_PAIR_BONUS, SAME_SOURCE, SWEPT, Method, Report, Row, name_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = tuple[Row, Row]
"""A recall row and a relevance row."""

SVG_SETTINGS: Any = {  # Any, since the type of its keys is private to matplotlib
    "svg.fonttype": "none",  # text stays text: it can be searched, and takes the reader's font
    "svg.hashsalt": "mtmh",  # ids inside the file are random otherwise, and the same report would differ each time
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8f98",
    "axes.labelcolor": "#30343b",
    "xtick.color": "#5b616b",
    "ytick.color": "#5b616b",
}
_OURS, _BASELINE, _BASELINE_TEXT = "#c8401a", "#7a808a", "#4d535d"
_STYLES = {"mtmh_blend": (_OURS, "o"), "late_blend": ("#1b6ca8", "s"), "rrf": ("#138a6b", "^"), "quota": ("#8e5aa8", "D")}
_SPARE_STYLES = (("#a87b12", "v"), ("#b0417a", "P"), ("#4a5568", "X"))
_HEAD_MARKERS = dict(zip(HEADS, (("*", 16.0), (">", 9.0), ("p", 10.0)), strict=True))


@dataclass(frozen=True, kw_only=True)
class _Label:
    """A text that belongs to a point in data coordinates."""

    text: str
    at: Spot
    color: str
    size: float = 9


def frontier_svg(report: Report) -> str:
    """An `<svg>` element without prolog, metadata or outer links; the same report gives the same text."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(SVG_SETTINGS):
        figure = Figure(figsize=(10, 6.4), dpi=72, layout="constrained")  # at 72 dpi a pixel is a point, in which SVG counts
        FigureCanvasAgg(figure)  # a canvas of its own needs no display and leaves pyplot's state alone
        axes = figure.add_subplot()
        _name_axes(axes, report)
        families = [family for family in report.families if family not in (NEW_PAIR_BONUS, NEW_ITEM_BONUS)]  # of no relevance by intent
        spare = [family for family in families if family not in _STYLES]
        drawn = [spot for family in families for spot in _draw_family(axes, report, family, spare.index(family) if family in spare else 0)]
        points = [point for method in [*report.our_heads, *report.baselines] if (point := _draw_single(axes, report, method))]
        drawn += [spot for point in points for spot in _cross(point)]
        marks = _marked(axes, report)
        if report.families:
            figure.legend(loc="outside lower center", ncols=4, frameon=False)
        figure.draw_without_rendering()  # fixes the layout: from here on, positions in pixels are final
        _write_labels(axes, [*marks, *(_label(report, point) for point in points), *_mix_labels(report)], drawn)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    return text[text.index("<svg") :].strip()


def _name_axes(axes: "Axes", report: Report) -> None:
    kind = INDEPENDENT if report.has_independent_judge else SAME_SOURCE
    names = next(iter(report.judges_of(kind)), "none")  # of several, the first one's relevance is the one without a name
    meaning = f"independent judge: {names}" if kind == INDEPENDENT else f"same-source judge: {names}; overlap with the source"
    axes.set_xlabel(f"recall@{report.depth}  →  more of the future partners found")
    axes.set_ylabel(_plain(f"{report.relevance(f'relevance@{report.depth}')}  →\n({meaning})"))
    axes.grid(color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(0.07)


def _draw_family(axes: "Axes", report: Report, family: str, index: int) -> list[Spot]:
    """A line through the mixes in their order; returns spots along it."""
    color, marker = _STYLES.get(family) or _SPARE_STYLES[index % len(_SPARE_STYLES)]
    points = [(recall, relevance) for _, recall, relevance in report.families[family] if _is_drawable((recall, relevance))]
    _draw(axes, points, color=color, marker=marker, linewidth=1.6, markersize=5, label=_plain(family))
    return [spot for ends in pairwise(map(_spot, points)) for spot in between(*ends)] + [spot for point in points for spot in _cross(point)]


def _draw_single(axes: "Axes", report: Report, method: Method) -> Point | None:
    """One head of ours, or one baseline."""
    recall, relevance = (report.find(method, name) for name in (f"recall@{report.depth}", report.relevance(f"relevance@{report.depth}")))
    if recall is None or relevance is None:
        return None
    if method in report.our_heads:
        marker, size = _HEAD_MARKERS.get(method[1], ("h", 9.0))
        _draw(axes, [(recall, relevance)], color=_OURS, marker=marker, markersize=size, markeredgecolor="white", linestyle="none", zorder=5)
    else:
        _draw(axes, [(recall, relevance)], color=_BASELINE, marker="o", markersize=5, linestyle="none", zorder=3)
    return recall, relevance


def _label(report: Report, point: Point) -> _Label:
    method = (point[0].method, point[0].head)
    return _Label(text=name_of(method), at=_spot(point), color=_OURS if method in report.our_heads else _BASELINE_TEXT)


def _marked(axes: "Axes", report: Report) -> list[_Label]:
    """A ring around every marked mix of our family, and what it is."""
    points = {mix: point for mix, *point in report.families.get(SWEPT[0], ()) if _is_drawable((point[0], point[1]))}
    found = [((points[mix][0], points[mix][1]), what) for mix, what in report.marks.items() if mix in points]
    for point, _ in found:
        axes.plot(*_spot(point), marker="o", markersize=13, markerfacecolor="none", markeredgecolor="#1c2027", linestyle="none", zorder=7)
    return [_Label(text=what, at=_spot(point), color="#1c2027") for point, what in found]


def _mix_labels(report: Report) -> list[_Label]:
    """The dial's positions along our own family only; on every line they would be a thicket."""
    points = {mix: point for mix, *point in report.families.get(SWEPT[0], ())}
    return [
        _Label(text=mix, at=_spot((recall, relevance)), color=_OURS, size=7)
        for mix, (recall, relevance) in points.items()
        if _is_drawable((recall, relevance))
    ]


def _spot(point: Point) -> Spot:
    return point[0].value, point[1].value


def _cross(point: Point) -> list[Spot]:
    """Spots along both intervals of a point."""
    x, y = _spot(point)
    ((left,), (right,)), ((down,), (up,)) = (_reaches([row]) for row in point)
    return [*between((x - left, y), (x + right, y)), *between((x, y - down), (x, y + up))]


def _draw(axes: "Axes", points: Sequence[Point], **style: Any) -> None:
    axes.errorbar(
        [recall.value for recall, _ in points],
        [relevance.value for _, relevance in points],
        xerr=_reaches([recall for recall, _ in points]),
        yerr=_reaches([relevance for _, relevance in points]),
        elinewidth=0.8,
        **style,
    )


def _reaches(rows: Sequence[Row]) -> list[list[float]]:
    """How far the intervals reach below and above the values; nothing where an end is NaN."""
    below = [max(row.value - row.low, 0.0) if math.isfinite(row.low) else 0.0 for row in rows]
    return [below, [max(row.high - row.value, 0.0) if math.isfinite(row.high) else 0.0 for row in rows]]


def _is_drawable(point: Point) -> bool:
    return all(math.isfinite(row.value) for row in point)


def _write_labels(axes: "Axes", labels: Sequence[_Label], drawn: Sequence[Spot]) -> None:
    """Set the labels beside their points, and tie to its point what has to stand farther away."""
    axes.autoscale(False)  # a leader must not move the points that the labels were placed by
    texts = [
        axes.annotate(_plain(of.text), of.at, (0, 0), textcoords="offset pixels", color=of.color, fontsize=of.size, zorder=6)
        for of in labels
    ]
    extents = [text.get_window_extent() for text in texts]
    points = _in_pixels(axes, [label.at for label in labels])
    (left, bottom), (right, top) = axes.get_window_extent().get_points().tolist()
    frame = Box(left=left, bottom=bottom, right=right, top=top)
    sizes = [(extent.width, extent.height) for extent in extents]
    boxes = place(points, sizes, frame=frame, drawn=_in_pixels(axes, drawn))
    for text, point, box in zip(texts, points, boxes, strict=True):
        text.set_position((box.left - point[0], box.bottom - point[1]))
        if line := leader(point, box):
            x, y = axes.transData.inverted().transform([line[0], line[-1]]).T
            axes.plot(x, y, color=_BASELINE, linewidth=0.5, zorder=2)


def _in_pixels(axes: "Axes", spots: Sequence[Spot]) -> list[Spot]:
    return [(x, y) for x, y in axes.transData.transform(spots).tolist()] if spots else []


def _plain(text: str) -> str:
    """The text as it stands: matplotlib would read what is between two dollar signs as a formula."""
    return text.replace("$", r"\$")
