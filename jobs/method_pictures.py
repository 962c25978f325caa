"""Pictures of docs/method.md, each one SVG that is the same for the same code; `make docs` writes them to docs/pictures/.

What they show is computed: the decay by its formula, the mix by the formula of `models.merge` on twelve made-up candidates, the frontier
from the table of docs/benchmarks.md.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.backtest_picture import SVG_SETTINGS, frontier_svg
from jobs.backtest_results import ENCODER, INDEPENDENT, OURS, SWEPT, Report, Row
from jobs.session import ROOT
from models.distillation import DISTILLED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OURS, _BLUE, _GREEN, _GRAY, _INK = "#c8401a", "#1b6ca8", "#138a6b", "#7a808a", "#1c2027"
_CANDIDATES = (
    ("milk", 0.0150, 0.03), ("bananas", 0.0118, 0.10), ("bread", 0.0088, 0.02), ("crackers", 0.0080, 0.24), ("eggs", 0.0058, 0.10),
    ("tomato soup", 0.0052, 0.62), ("chicken broth", 0.0040, 0.48), ("noodles", 0.0030, 0.36), ("lentil soup", 0.0018, 0.74),
    ("pea soup", 0.0006, 0.84), ("bouillon", 0.0005, 0.52), ("vinegar", 0.0003, 0.14),
)  # fmt: skip
"""Made-up candidates of a can of soup: name, p(j|i), relevance."""
_MIXES, _NUM_LISTED = (0.0, 0.01, 0.05), 4
_SET = "**interactive fiction"


def pictures() -> dict[str, str]:
    """Every picture by its path below docs/."""
    drawn = {"night": _night, "decay": _decay, "encoder": _encoder, "mix": _mix}
    sizes = {"night": (10, 2.2), "decay": (7.5, 3.4), "encoder": (10, 4.4), "mix": (10, 3.7)}
    columns = {"mix": len(_MIXES)}
    found = {f"pictures/method-{name}.svg": _svg(draw, sizes[name], columns.get(name, 1)) for name, draw in drawn.items()}
    return found | {"pictures/method-frontier.svg": frontier_svg(measured(ROOT / "docs" / "benchmarks.md"))}


def _svg(draw: Callable[[Sequence["Axes"]], None], size: tuple[float, float], columns: int) -> str:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(SVG_SETTINGS):
        figure = Figure(figsize=size, dpi=72, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure.subplots(1, columns, squeeze=False, sharey=True)[0])
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    return text[text.index("<svg") :].strip()


def _night(panels: Sequence["Axes"]) -> None:
    """What a night knows, and when it is judged."""
    axes = panels[0]
    for start, width, color, words in ((0, 5.9, _BLUE, "history"), (5.9, 1.1, _GREEN, "last slice"), (7, 2, _OURS, "what happens next")):
        axes.barh(0, width, left=start, height=0.5, color=color, alpha=0.85)
        axes.text(start + width / 2, 0, words, color="white", ha="center", va="center", fontsize=10)
    for day, words in ((7.0, "run date D, end of day (UTC)"), (9.0, "D + h")):
        axes.axvline(day, ymin=0.1, ymax=0.75, color=_INK, linewidth=1.2, linestyle=":")
        axes.text(day, 0.55, words, ha="center", va="bottom", fontsize=9, color=_INK)
    about = (
        (2.95, "counted, decayed"),
        (5.9, "weights are calibrated here,\nknowing only what was before it"),
        (8.4, "evaluate judges\nthe lists of D by it"),
    )
    for at, words in about:
        axes.text(at, -0.4, words, ha="center", va="top", fontsize=9, color=_GRAY)
    axes.set(xlim=(0, 9.6), ylim=(-1.1, 1))
    axes.set_axis_off()


def _decay(panels: Sequence["Axes"]) -> None:
    """The weight of one co-engagement by its age."""
    axes, ages = panels[0], range(366)
    for half_life, color in ((30, _OURS), (90, _BLUE), (365, _GREEN)):
        axes.plot(ages, [2.0 ** (-age / half_life) for age in ages], color=color, linewidth=1.8)
        axes.plot([half_life], [0.5], marker="o", color=color)
        axes.plot([], [], color=color, label=f"half life {half_life} days")
    axes.legend(frameon=False, loc="upper right")
    axes.set(xlabel="age in days", ylabel="weight of one user-day", ylim=(0, 1.03), xlim=(0, 372))
    axes.grid(color="#e6e8eb", linewidth=0.8)


def _encoder(panels: Sequence["Axes"]) -> None:
    """From an item to its lists."""
    axes = panels[0]
    places = (
        ("id", 1.1, 3.3, "id vector\n(starts as a factorization\nof the counts)", _BLUE),
        ("content", 1.1, 0.9, "content vector\n(text, categories, tags)", _BLUE),
        ("trunk", 3.6, 2.1, "shared encoder", _INK),
        ("engagement", 5.7, 3.4, "engagement head\nwho is next?", _OURS),
        ("relevance", 5.7, 0.8, "relevance head\nwhat is alike?", _GREEN),
        ("p", 8.2, 3.4, "engagement list by p(j | i):\nthe scorer adds counts,\nusers and trends", _OURS),
        ("merged", 8.2, 2.1, "merged list\np + λ · relevance", _INK),
        ("r", 8.2, 0.8, "relevance list", _GREEN),
    )
    boxes = {}
    for name, x, y, words, color in places:
        frame = {"boxstyle": "round,pad=0.55", "facecolor": "white", "edgecolor": color, "linewidth": 1.4}
        boxes[name] = axes.text(x, y, words, ha="center", va="center", fontsize=10, color=color, bbox=frame)
    arrows = "id trunk, content trunk, trunk engagement, trunk relevance, engagement p, relevance r, p merged, r merged"
    for start, end in (pair.split() for pair in arrows.split(", ")):
        patches = {"patchA": boxes[start].get_bbox_patch(), "patchB": boxes[end].get_bbox_patch()}
        style = {"arrowstyle": "-|>", "color": _GRAY, "shrinkA": 1, "shrinkB": 3} | patches
        axes.annotate("", boxes[end].get_position(), boxes[start].get_position(), arrowprops=style)
    axes.set(xlim=(0, 9.6), ylim=(0, 4.2))
    axes.set_axis_off()


def _mix(panels: Sequence["Axes"]) -> None:
    """The same candidates under three mixes: listed is what lies right of the line."""
    for axes, mix in zip(panels, _MIXES, strict=True):
        scores = {name: p + mix * max(relevance, 0.0) for name, p, relevance in _CANDIDATES}
        listed = sorted(scores, key=lambda name: -scores[name])[:_NUM_LISTED]
        last = scores[listed[-1]]
        for name, p, relevance in _CANDIDATES:
            color = _OURS if name in listed else _GRAY
            axes.plot(p, relevance, marker="o", color=color, markersize=7 if name in listed else 5, linestyle="none")
            axes.annotate(name, (p, relevance), (5, 3), textcoords="offset points", fontsize=8, color=color)
        axes.plot([last, last - mix * 0.92], [0, 0.92], color=_INK, linewidth=1, linestyle=":")
        axes.set(xlabel="p(j | i), engagement", xlim=(-0.0008, 0.0168), ylim=(-0.04, 0.92), xticks=(0, 0.005, 0.01, 0.015))
        axes.set_title(f"λ = {mix:g}", fontsize=10, loc="left")
        axes.grid(color="#e6e8eb", linewidth=0.8)
    panels[0].set_ylabel("relevance")


def measured(page: Path) -> Report:
    """Lists of one table of docs/benchmarks.md, as a report with two measures."""
    text = page.read_text(encoding="utf-8")
    part = text[text.index(_SET) :]
    lines = re.findall(r"^\| (?!list|-)(.+?) \|$", part[: part.index("|\n\n") + 1], flags=re.MULTILINE)
    rows = [row for line in lines for row in _rows([cell.strip() for cell in line.split("|")])]
    swept = {(row.head, row.metric): row for row in rows if row.method == SWEPT[0]}
    mixes = sorted({mix for mix, _ in swept}, key=float)
    family = [(mix, swept[mix, "recall@100"], swept[mix, "relevance@100"]) for mix in mixes]
    return Report(
        config="ifdb_games", title="interactive fiction", cut=date(2025, 2, 28), until=date(2026, 6, 1), final=True, num_reads=1,
        judges={"tags": INDEPENDENT}, unreachable_share=float("nan"), num_triggers=2910,
        rows=[row for row in rows if row.method != SWEPT[0]], comparisons=(), chosen={}, notes=(), families={SWEPT[0]: family},
        minutes=float("nan"),
    )  # fmt: skip


def _rows(cells: Sequence[str]) -> list[Row]:
    """A line of the table: list, recall@100, debiased recall@100, relevance@100 (each `value ±half`), coverage."""
    name = cells[0]
    mix = re.search(r"^mtmh, λ = ([\d.]+)", name)
    if name.startswith(_OTHER_POLICIES):
        return []
    method = (SWEPT[0], mix.group(1)) if mix else _OUR_HEADS.get(name, (name.partition(" (")[0], "-"))
    return [_row(method, metric, cells[place]) for metric, place in (("recall@100", 1), ("relevance@100", 3))]


_OTHER_POLICIES = ("mtmh, relevance share", "mtmh, rank fusion", "mtmh, new pairs", "mtmh, new items")  # neither drawn mixes nor baselines
_OUR_HEADS: Mapping[str, tuple[str, str]] = {
    "mtmh merged (default)": (OURS, "merged"),
    "mtmh engagement": (OURS, "engagement"),
    "mtmh engagement, the encoder alone": (OURS, ENCODER),
    "mtmh distilled vectors alone": (OURS, DISTILLED),
    "mtmh relevance": (OURS, "relevance"),
}


def _row(method: tuple[str, str], metric: str, cell: str) -> Row:
    value, half = (float(number) for number in re.findall(r"\d\.\d+", cell))
    ends = {"low": value - half, "high": value + half}
    return Row(method=method[0], head=method[1], metric=metric, slice="all", value=value, num_triggers=2910, **ends)
