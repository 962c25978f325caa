"""Times against sizes of the click log, both on logarithmic axes, as one SVG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_NAMES = {
    "mtmh": "mtmh (Spark)",
    "mtmh_answer": "mtmh, the answer alone",
    "duckdb": "DuckDB",
    "duckdb_state": "DuckDB, all that mtmh writes",
    "polars": "Polars",
    "scipy": "scipy, counts only",
    "self_join": "Spark self-join",
}
_COLORS = {
    "mtmh": "#c8401a",
    "mtmh_answer": "#e79a7f",
    "duckdb": "#1b6ca8",
    "duckdb_state": "#7fb0d6",
    "polars": "#138a6b",
    "scipy": "#8e5aa8",
    "self_join": "#7a808a",
}


def draw_times(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the picture.

    Args:
        rows: of `var/bench/pairs.json`.
        path: of the SVG.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "mtmh"}):
        figure = Figure(figsize=(7.5, 5), layout="constrained")
        FigureCanvasAgg(figure)  # needs no display and leaves pyplot's state alone
        axes = figure.add_subplot()
        for method, name in _NAMES.items():
            mine = [row for row in rows if row["method"] == method and row["work"].startswith("clicks-") and row.get("median_s")]
            points = sorted((row["size"], row["median_s"]) for row in mine)
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", color=_COLORS[method], label=name)
        axes.set(xscale="log", yscale="log", xlabel="events of the click log", ylabel="seconds, median")
        axes.grid(color="#e6e8eb", which="both", linewidth=0.6)
        if axes.has_data():
            axes.legend(frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
