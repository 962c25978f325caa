"""A backtest as one HTML file that needs nothing else: words, picture and tables, for the screen, the dark and one or two printed pages."""

import re
from collections.abc import Iterable
from html import escape
from pathlib import Path
from string import Template

from jobs import backtest_tables as grids
from jobs import pages
from jobs.backtest_picture import frontier_svg
from jobs.backtest_results import Report
from jobs.backtest_tables import Cell, Grid
from jobs.backtest_words import summary_words

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
<h1>$title</h1>
<p class="sub">$subtitle</p>
$tally
<section><h2>In words</h2>
$words
</section>
<section><h2>Recall and relevance together</h2>
<figure>
<div role="img" aria-label="recall@100 and relevance@100 of every method, as in the tables below">
$picture
</div>
<figcaption>$caption</figcaption>
</figure>
</section>
$tables
<details><summary>All mixes, further measures, deciles, settings</summary>
$more
</details>
</main>
<script>$script</script>
</body>
</html>
""")


CAPTION = (
    "Up and to the right is better. A line joins the mixes of a family in their order. Bars are 95 % bootstrap intervals over triggers. "
    "A single gray point is a method without a dial; a ring is a mix that was chosen."
)
"""What every picture of a frontier needs said."""


def write_html(report: Report, path: Path) -> None:
    """Write the page to this file, in place of what was there; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_page(report), encoding="utf-8")


def _page(report: Report) -> str:
    shown = (grids.comparisons(report), grids.headline(report), grids.parts(report), grids.judges(report))
    by_decile = (grids.deciles(report, side) for side in ("trigger", "target"))
    more = (grids.mixes(report), grids.further(report), *by_decile, grids.chosen(report))
    return _PAGE.substitute(
        title=escape(report.title),
        style=pages.text("page.css"),
        script=pages.text("definitions.js"),
        subtitle=escape(_subtitle(report)),
        tally=_tally(report),
        words="\n".join(_paragraph(words) for words in summary_words(report)),
        picture=frontier_svg(report),
        caption=CAPTION,
        tables=_sections(shown),
        more=_sections(more),
    )


def _subtitle(report: Report) -> str:
    kind = f"final report, reading {report.num_reads}" if report.final else "validation report"
    return f"{report.config} · cut {report.cut}, judged until {report.until} · {report.num_triggers:,} triggers · {kind}"


def _paragraph(words: str) -> str:
    first, *others = map(_prose, words.splitlines() or [""])
    items = "".join(f"<li>{line}</li>" for line in others)
    return f"<p>{first}</p>" + (f"\n<ul>{items}</ul>" if items else "")


def _prose(words: str) -> str:
    """The lead of a paragraph in bold, and no line break inside a figure."""
    text = escape(words, quote=False).replace(" %", "&nbsp;%")
    text = re.sub(r"\[[−+.\d]+, [−+.\d]+\]", lambda found: found.group().replace(" ", "&nbsp;"), text)
    return re.sub(r"^[^:.,]{1,80}:", lambda found: f"<b>{found.group()}</b>", text)


def _tally(report: Report) -> str:
    """How many comparisons are won, tied and lost, at a glance."""
    verdicts: list[str] = [comparison.verdict for comparison in report.comparisons]
    names = {"wins": "wins", "ties": "ties", "loses": "losses"}
    boxes = [f'<div><b class="{verdict}">{verdicts.count(verdict)}</b>{name}</div>' for verdict, name in names.items()]
    return f'<div class="tally">{"".join(boxes)}</div>' if verdicts else ""


def _sections(grids: Iterable[Grid | None]) -> str:
    return "\n".join(
        f"<section><h2>{escape(grid.title[:1].upper() + grid.title[1:])}</h2>\n{table(grid)}\n</section>" for grid in grids if grid
    )


def table(grid: Grid) -> str:
    """A grid as HTML, everything in it escaped."""
    head = "".join(f"<th{_class(grid, index)}{_title(grid, index)}>{_lines(heading)}</th>" for index, heading in enumerate(grid.columns))
    body = "\n".join(
        f"<tr>{''.join(_data(cell, _class(grid, index, cell.tone) + _title(grid, index)) for index, cell in enumerate(cells))}</tr>"
        for cells in grid.rows
    )
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _class(grid: Grid, index: int, tone: str = "") -> str:
    names = " ".join(name for name in ("label" if index < grid.num_labels else "", tone) if name)
    return f' class="{names}"' if names else ""


def _title(grid: Grid, index: int) -> str:
    """What the numbers of the column mean: shown when pointed at, tapped or focused (definitions.js)."""
    return f' title="{escape(grid.meanings[index])}"' if grid.meanings[index] else ""


def _data(cell: Cell, attributes: str) -> str:
    interval = f'<span class="interval">{escape(cell.interval)}</span>' if cell.interval else ""
    return f"<td{attributes}>{escape(cell.text)}{interval}</td>"


def _lines(heading: str) -> str:
    return escape(heading).replace("\n", "<br>")
