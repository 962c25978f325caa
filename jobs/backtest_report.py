"""The report of a backtest: tables for the terminal, one page of HTML, and JSON for whoever compares reports.

What a report holds is declared in `jobs/backtest_results.py`; the words, the picture and the page have a module each.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table as RichTable
from rich.text import Text

from jobs import backtest_tables as tables
from jobs.backtest_page import write_html
from jobs.backtest_picture import frontier_svg
from jobs.backtest_results import Comparison, Report, Row
from jobs.backtest_tables import Cell, Grid
from jobs.backtest_words import summary_words

__all__ = ["Comparison", "Report", "Row", "frontier_svg", "summary_words", "terminal_tables", "write_html", "write_json"]

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
