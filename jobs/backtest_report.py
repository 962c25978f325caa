"""The report of a backtest: tables for the terminal, one page of HTML, and JSON for whoever compares reports.

What a report holds is declared in `jobs/backtest_results.py`; the words, the picture and the page have a module each.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from rich.table import Table as RichTable
from rich.text import Text

from conf.errors import TableError
from jobs import backtest_tables as tables
from jobs.backtest_page import write_html
from jobs.backtest_picture import frontier_svg
from jobs.backtest_results import Comparison, Report, Row
from jobs.backtest_tables import Cell, Grid
from jobs.backtest_words import summary_words

__all__ = ["Comparison", "Report", "Row", "frontier_svg", "read_json", "summary_words", "terminal_tables", "write_html", "write_json"]

REPORTS = Path("var/backtest")
"""Where reports are written, and looked for: `<config>.html` and `<config>.json`."""

_TONES: Mapping[str, str] = {"best": "bold", "wins": "green", "ties": "yellow", "loses": "red"}


def terminal_tables(report: Report) -> list[RichTable]:
    """Both axes of every method, then slices and judges, then the comparisons; each fits into 140 columns."""
    by_decile = (tables.deciles(report, side) for side in ("trigger", "target"))
    grids = (tables.headline(report), tables.parts(report), *by_decile, tables.judges(report), tables.comparisons(report))
    return [_drawn(grid) for grid in grids if grid]


def write_json(report: Report, path: Path) -> None:
    """Write `{"cut", "rows": [{"method", "head", "metric", "slice", "value", "low", "high"}], …}`; NaN becomes null, folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_content(report), indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Report:
    """The report of a file that `write_json` wrote; how many triggers a single row is of, it does not keep.

    Raises:
        TableError: it is something else, or older code wrote it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        num = content["num_triggers"]
        read = [Row(**_numbers(row), num_triggers=num) for row in content["rows"]]
        rows = {(row.method, row.head, row.metric, row.slice): row for row in read}
        report = Report(
            **{name: content[name] for name in ("config", "title", "final", "judges", "num_triggers", "chosen", "notes", "marks", "depth")},
            **_numbers({name: content[name] for name in ("minutes", "unreachable_share")}),
            cut=date.fromisoformat(content["cut"]),
            until=date.fromisoformat(content["until"]),
            num_reads=content["reads"],
            rows=read,
            comparisons=[Comparison(**_numbers(of, without=("verdict", "relative"))) for of in content["comparisons"]],
            families={},
        )
        axes = (f"recall@{report.depth}", report.relevance(f"relevance@{report.depth}"))
        families = {
            family: [(mix, *(rows[family, mix, metric, "all"] for metric in axes)) for mix in mixes]
            for family, mixes in content["families"].items()
        }
    except (KeyError, TypeError, ValueError) as error:
        found = f"{type(error).__name__}: {error}"
        raise TableError(f"{path} is no report of a backtest as this code writes it ({found}); run `make backtest` again") from error
    return replace(report, families=families)


def _numbers(content: Mapping[str, Any], *, without: Sequence[str] = ()) -> dict[str, Any]:
    """What JSON could not hold is NaN again."""
    return {name: math.nan if value is None else value for name, value in content.items() if name not in without}


def _drawn(grid: Grid) -> RichTable:
    table = RichTable(title=Text(grid.title, style="italic"), title_justify="left")
    for index, heading in enumerate(grid.columns):
        table.add_column(Text(heading), justify="left" if index < grid.num_labels else "right", vertical="top")
    for cells in grid.rows:
        table.add_row(*(_text(cell) for cell in cells))
    return table


def _text(cell: Cell) -> Text:
    """Text rather than markup: an id may hold brackets."""
    parts = [(cell.text, _TONES.get(cell.tone, ""))]
    return Text.assemble(*parts, *([("\n" + cell.interval, "dim")] if cell.interval else []))


def _content(report: Report) -> dict[str, Any]:
    return {
        "cut": report.cut.isoformat(),
        "until": report.until.isoformat(),
        "config": report.config,
        "title": report.title,
        "final": report.final,
        "reads": report.num_reads,
        "judges": dict(report.judges),
        "unreachable_share": _number(report.unreachable_share),
        "num_triggers": report.num_triggers,
        "minutes": _number(report.minutes),
        "chosen": dict(report.chosen),
        "notes": list(report.notes),
        "depth": report.depth,
        "marks": dict(report.marks),
        "families": {family: [mix for mix, *_ in points] for family, points in report.families.items()},
        "comparisons": [_comparison(comparison) for comparison in report.comparisons],
        "rows": [_row(row) for row in report.all_rows],
    }


def _row(row: Row) -> dict[str, Any]:
    key = {"method": row.method, "head": row.head, "metric": row.metric, "slice": row.slice}
    return key | {"value": _number(row.value), "low": _number(row.low), "high": _number(row.high)}


def _comparison(of: Comparison) -> dict[str, Any]:
    numbers = {"value": of.value, "low": of.low, "high": of.high, "baseline_value": of.baseline_value, "relative": of.relative}
    key = {"name": of.name, "what": of.what, "ours": of.ours, "theirs": of.theirs, "verdict": of.verdict}
    return key | {name: _number(value) for name, value in numbers.items()}


def _number(value: float) -> float | None:
    """JSON has no NaN and no infinity; a numpy number becomes a plain one."""
    return float(value) if math.isfinite(value) else None
