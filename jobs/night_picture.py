"""Learning curves of a night as one SVG: the loss of each task over the steps, each in a picture of its own, as their scales differ."""

import io
from collections.abc import Mapping, Sequence

from jobs.backtest_picture import SVG_SETTINGS

_COLORS = ("#1b6ca8", "#c8401a", "#138a6b", "#8e5aa8", "#a87b12", "#b0417a")


def curves_svg(steps: Sequence[Mapping[str, float]]) -> str:
    """An `<svg>` element of the entries of history.json; empty if no step was taken."""
    names = [name for name in (steps[0] if steps else ()) if not name.startswith("cosine ") and not name.endswith("_share")]
    if not names:
        return ""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_columns = min(3, len(names))
    num_rows = -(-len(names) // num_columns)
    with rc_context(SVG_SETTINGS):
        figure = Figure(figsize=(10, 2.3 * num_rows), dpi=72, layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(num_rows, num_columns, squeeze=False, sharex=True).ravel()
        for place, (axes, name) in enumerate(zip(grid, names, strict=False)):
            axes.plot(range(1, len(steps) + 1), [step[name] for step in steps], color=_COLORS[place % len(_COLORS)], linewidth=1.4)
            axes.set_title("all tasks, weighted" if name == "loss" else name.replace("/", " head: "), fontsize=10, loc="left")
            axes.grid(color="#e6e8eb", linewidth=0.8)
        for axes in grid[len(names) :]:
            axes.set_visible(False)
        figure.supxlabel("step", fontsize=10)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    return text[text.index("<svg") :].strip()
