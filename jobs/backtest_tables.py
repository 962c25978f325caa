"""The tables of a backtest, made once: the terminal and the page only draw them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from jobs.backtest_measures import meaning_of
from jobs.backtest_results import INDEPENDENT, LOWER_IS_BETTER, Comparison, Method, Report, Row, name_of, number, percent

_NUM_BASELINES_BY_DECILE = 4
_PARTS = ("all", "new_pairs", "cold_triggers", "cold_targets")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A text, the interval below it, and a tone: `best` of its column, or a verdict."""

    text: str
    interval: str = ""
    tone: str = ""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A titled table; the first `num_labels` columns are words, the others numbers. A heading may have several lines.

    `meanings` says of each column what its numbers are.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    meanings: Sequence[str]
    num_labels: int = 1


def headline(report: Report) -> Grid | None:
    """Both axes of every method but the swept ones."""
    return _measures(report, "every method on both axes", _headline_metrics(report), [*report.our_heads, *report.baselines])


def measures(report: Report) -> Grid | None:
    """All measures of a report that has few of them."""
    return _measures(report, "every method", list(dict.fromkeys(row.metric for row in report.rows)), [*report.our_heads, *report.baselines])


def mixes(report: Report) -> Grid | None:
    """The swept mixes in the same measures."""
    grid = _measures(report, "every mix of the swept families", _headline_metrics(report), report.mixes)
    return grid and replace(grid, rows=[[replace(cell, tone="") for cell in row] for row in grid.rows])


def further(report: Report) -> Grid | None:
    """What else was measured."""
    ndcg = report.relevance("rel_ndcg@10")
    metrics = ("micro_recall@100", "recall@50", ndcg, "tail_share@10", "diversity@10", "overlap@10", "churn@10", "hypervolume")
    judged_as_a_whole = [method for method in report.mixes if report.find(method, "hypervolume")]
    return _measures(report, "further measures", metrics, [*report.our_heads, *report.baselines, *judged_as_a_whole])


def parts(report: Report) -> Grid | None:
    """Recall of new pairs, cold triggers and cold targets."""
    columns = [("recall@100", part, _part_heading(report, part)) for part in _PARTS]
    return _grid(report, "recall@100 where little is known", columns, [*report.our_heads, *report.baselines])


def deciles(report: Report, side: str) -> Grid | None:
    """Recall by the popularity decile of the `trigger` or the `target`, for our heads and the leading baselines."""
    columns = [("recall@100", f"{side}_decile_{decile}", str(decile)) for decile in range(1, 11)]
    shown = [*report.our_heads, *report.baselines[:_NUM_BASELINES_BY_DECILE]]
    grid = _grid(report, f"recall@100 by popularity decile of the {side}, 1 the least popular", columns, shown)
    return grid and replace(grid, rows=[[replace(cell, interval="") for cell in row] for row in grid.rows])


def judges(report: Report) -> Grid | None:
    """Relevance judge by judge, each named with its kind; a single judge is the headline already."""
    if len(report.judges) < 2:
        return None
    columns = [
        (f"{'' if kind == INDEPENDENT else 'same_source_'}relevance@{k}", f"judge:{name}", f"{name}\n{kind}\nrelevance@{k}")
        for name, kind in report.judges.items()
        for k in (100, 10)
    ]
    return _grid(report, "relevance judge by judge", columns, [*report.our_heads, *report.baselines])


def comparisons(report: Report) -> Grid | None:
    """Paired differences with their verdict, in the order given; a name is not repeated below itself."""
    titles = ("comparison", "measure", "ours", "theirs", "verdict", "paired\ndifference", "relative")
    names = [comparison.name for comparison in report.comparisons]
    shown = [name if name != before else "" for name, before in zip(names, ["", *names], strict=False)]
    rows = [_comparison(name, comparison) for name, comparison in zip(shown, report.comparisons, strict=True)]
    meanings = [*[""] * 5, "mean over triggers of ours - theirs, with its 95 % interval", "the difference as a share of theirs"]
    title = "ours against theirs, paired over triggers"
    return Grid(title=title, columns=titles, meanings=meanings, rows=rows, num_labels=5) if rows else None


def chosen(report: Report) -> Grid | None:
    """Settings chosen on validation."""
    rows = [[Cell(text=name), Cell(text=value)] for name, value in report.chosen.items()]
    title, meaning = "chosen on validation, before the cut", "the value that did best on the slices before the last one"
    return Grid(title=title, columns=("setting", "value"), meanings=("", meaning), rows=rows) if rows else None


def _comparison(name: str, of: Comparison) -> list[Cell]:
    words = [Cell(text=text) for text in (name, of.what, of.ours, of.theirs)]
    difference = Cell(text=number(of.value, signed=True), interval=_interval(of, signed=True))
    return [*words, Cell(text=of.verdict, tone=of.verdict.partition(" ")[0]), difference, Cell(text=percent(of.relative, signed=True))]


def _headline_metrics(report: Report) -> list[str]:
    relevance = [report.relevance(f"relevance@{k}") for k in (100, 10)]
    return ["recall@100", "debiased_recall@100", "recall@10", *relevance, "coverage@10", "gini@10"]


def _measures(report: Report, title: str, metrics: Sequence[str], methods: Sequence[Method]) -> Grid | None:
    return _grid(report, title, [(metric, "all", _heading(metric)) for metric in metrics], methods)


def _grid(report: Report, title: str, columns: Sequence[tuple[str, str, str]], methods: Sequence[Method]) -> Grid | None:
    """A row a method, a column per (metric, slice, heading); what holds nothing is left out, and None says that nothing is left."""
    taken = [column for column in columns if any(report.find(method, *column[:2]) for method in methods)]
    best = {column: _best(report, column, methods) for column in taken}
    rows = [
        [Cell(text=name_of(method)), *(_cell(report.find(method, *column[:2]), best[column]) for column in taken)]
        for method in methods
        if any(report.find(method, *column[:2]) for column in taken)
    ]
    meanings = ["", *(meaning_of(metric, part) for metric, part, _ in taken)]
    return Grid(title=title, columns=["method", *(heading for *_, heading in taken)], meanings=meanings, rows=rows) if rows else None


def _best(report: Report, column: tuple[str, str, str], methods: Sequence[Method]) -> float:
    better: Callable[..., float] = min if column[0] in LOWER_IS_BETTER else max
    return better(row.value for method in methods if (row := report.find(method, *column[:2])))


def _cell(row: Row | None, best: float) -> Cell:
    if row is None:
        return Cell(text="")
    return Cell(text=number(row.value), interval=_interval(row), tone="best" if row.value == best else "")


def _interval(of: Row | Comparison, *, signed: bool = False) -> str:
    ends = (number(of.low, signed=signed), number(of.high, signed=signed))
    return "" if "–" in ends else (" to " if signed else "–").join(ends)


def _heading(metric: str) -> str:
    """`same_source_relevance@100` on two lines, so that a column is as narrow as its numbers."""
    prefix, _, measure = metric.rpartition("_")
    return f"{prefix.replace('_', '-')}\n{measure}" if prefix else metric


def _part_heading(report: Report, part: str) -> str:
    triggers = max((row.num_triggers for row in report.rows if row.slice == part and row.metric == "recall@100"), default=0)
    return f"{part.replace('_', ' ')}\n{triggers:,} triggers"
