"""A made report in words, tables, picture, page and JSON: losses said as plainly as wins, names escaped, nothing fetched from elsewhere."""

import io
import json
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from conf.errors import TableError
from jobs import backtest_tables as tables
from jobs.backtest_measures import meaning_of
from jobs.backtest_report import Comparison, Report, Row, frontier_svg, read_json, summary_words, terminal_tables, write_html, write_json
from models.judges import TaxonomyJudge
from models.scoreboard import measure
from tests.models.test_scoreboard import CODES, LISTS, exam

FAMILIES = ("mtmh_blend", "late_blend", "rrf", "quota")
MIXES = ("0", "0.01", "0.03", "0.1", "0.3", "1")
ODD = "<b>&[red]$a_b$"
"""A name that HTML, rich markup and matplotlib's formulas would each take for something else."""
# recall@100 and relevance@100, after a prototype on grocery baskets
BASELINES = {
    "popularity": (0.1107, 0.0666),
    "counts": (0.1141, 0.1026),
    "smooth": (0.1348, 0.0906),
    "smooth_svd": (0.1368, 0.0873),
    "cosine": (0.0552, 0.0998),
    "bm25": (0.0555, 0.1093),
    "jaccard": (0.0560, 0.1080),
    "decayed_jaccard": (0.0599, 0.1149),
    "swing": (0.1213, 0.0969),
    "conditional": (0.0548, 0.1003),
    "als": (0.0270, 0.1150),
    "item2vec": (0.0310, 0.1220),
    "content": (0.0262, 0.6743),
}
HEADS = {"engagement": (0.1398, 0.0890), "relevance": (0.0610, 0.6300), "merged": (0.1389, 0.2064)}


def row(metric: str, value: float, **over: Any) -> Row:
    base = {"method": "mtmh", "head": "merged", "slice": "all", "num_triggers": 4000}
    return Row(**(base | {"metric": metric, "value": value, "low": 0.96 * value, "high": 1.04 * value} | over))


def comparison(low: float, high: float, **over: Any) -> Comparison:
    base: dict[str, Any] = {"name": "best baseline", "what": "recall@100", "ours": "mtmh merged", "theirs": "smooth_svd"}
    return Comparison(**(base | {"value": (low + high) / 2, "low": low, "high": high, "baseline_value": 0.1} | over))


def measured(method: str, head: str, recall: float, relevance: float, judges: Mapping[str, str]) -> list[Row]:
    values = {
        "recall@100": recall,
        "debiased_recall@100": 0.6 * recall,
        "recall@50": 0.7 * recall,
        "recall@10": 0.3 * recall,
        "coverage@10": 0.5 * relevance,
        "gini@10": 0.999 - relevance,
        "diversity@10": 0.5,
        "churn@10": math.nan,
    }
    slices = ["new_pairs", "cold_triggers", "cold_targets", *(f"{side}_decile_{n}" for side in ("trigger", "target") for n in range(1, 11))]
    kind = {"method": method, "head": head}
    return [
        *(row(metric, value, **kind) for metric, value in values.items()),
        *(row("recall@100", recall * (0.5 + 0.03 * index), slice=name, num_triggers=900, **kind) for index, name in enumerate(slices)),
        *(row(metric, value, slice=part, **kind) for metric, part, value in judged(relevance, judges)),
    ]


def judged(relevance: float, judges: Mapping[str, str]) -> Iterator[tuple[str, str, float]]:
    """Metric, slice and value as `measure` names them; each judge is a little stricter than the one before."""
    taken = set()
    for place, (name, kind) in enumerate(judges.items()):
        prefix = "" if kind == "independent" else "same_source_"
        first = [] if kind in taken else ["all"]
        taken.add(kind)
        value = relevance * (1 - 0.1 * place)
        for metric, share in {"relevance@100": value, "relevance@10": min(1.3 * value, 0.95), "rel_ndcg@10": min(1.2 * value, 0.9)}.items():
            yield from ((prefix + metric, part, share) for part in [*first, *([f"judge:{name}"] if len(judges) > 1 else [])])


def family(name: str, prefix: str, place: int, mixes: Sequence[str] = MIXES) -> list[tuple[str, Row, Row]]:
    """Less recall and more relevance from mix to mix, each family a little worse than the one before."""
    reach = 1 - 0.08 * place
    values = [(0.1398 - 0.07 * step**2.5, 0.088 + 0.5 * reach * step) for step in (0, 0.2, 0.4, 0.6, 0.8, 1)]
    return [
        (mix, row("recall@100", recall, method=name, head=mix), row(f"{prefix}relevance@100", relevance, method=name, head=mix))
        for mix, (recall, relevance) in zip(mixes, values, strict=True)
    ]


def report(**over: Any) -> Report:
    judges = over.get("judges", {"taxonomy": "independent"})
    prefix = "" if "independent" in judges.values() else "same_source_"
    lists = {("mtmh", head): values for head, values in HEADS.items()} | {(name, "-"): values for name, values in BASELINES.items()}
    base: dict[str, Any] = {
        "config": "demo",
        "title": "Backtest on grocery baskets",
        "cut": date(2017, 11, 16),
        "until": date(2017, 11, 30),
        "final": True,
        "num_reads": 3,
        "judges": judges,
        "unreachable_share": 0.0213,
        "num_triggers": 4000,
        "rows": [found for (method, head), values in lists.items() for found in measured(method, head, *values, judges)],
        "comparisons": [
            comparison(0.0011, 0.0051),
            comparison(0.1031, 0.1351, what="relevance@100", name="relevance at recall kept", baseline_value=0.0873),
            comparison(-0.0010, 0.0018, theirs="smooth", what="recall@10", name="short lists"),
            comparison(-0.0034, -0.0014, theirs="late_blend 0.03", what="debiased_recall@100", name="best simple blend"),
        ],
        "chosen": {"mtmh_blend": "0.03", "pairs.half_life_days": "60"},
        "notes": ["EASE was left out: the catalog has more than 20,000 items."],
        "families": {name: family(name, prefix, place) for place, name in enumerate(FAMILIES)},
        "minutes": 18.4,
    }
    return Report(**(base | over))


def paragraph(made: Report, start: str) -> str:
    (found,) = [words for words in summary_words(made) if words.startswith(start)]
    return found


def test_words_name_wins_ties_and_losses() -> None:
    wins, ties, loses = (paragraph(report(), f"MTMH {verdict}") for verdict in ("wins", "ties", "loses"))
    assert wins.startswith("MTMH wins: 2 of 4 comparisons.\nBest baseline: mtmh merged is ahead of smooth_svd on recall@100 by +0.0031 ")
    assert "+0.0031 [+0.0011, +0.0051], +3.1 %." in wins
    assert "Relevance at recall kept: mtmh merged is ahead of smooth_svd on relevance@100 by +0.1191" in wins
    assert "mtmh merged cannot be told apart from smooth on recall@10 at +0.0004 [−0.0010, +0.0018]" in ties
    assert "mtmh merged is behind late_blend 0.03 on debiased_recall@100 by −0.0024 [−0.0034, −0.0014]" in loses
    assert paragraph(report(comparisons=[comparison(0.1, 0.2)]), "MTMH loses") == "MTMH loses: none of 1 comparison."


def test_measures_of_one_pair_share_a_sentence() -> None:
    both = [comparison(0.1, 0.2), comparison(-0.2, -0.1, what="gini@10")]
    wins = paragraph(report(comparisons=both), "MTMH wins")
    assert wins.count("is ahead of") == 1
    assert "; gini@10, where lower is better, by −0.1500 [−0.2000, −0.1000]" in wins


def test_words_say_what_was_judged_and_how_often() -> None:
    words = " ".join(summary_words(report()))
    for said in (
        "4,000 triggers",
        "2017-11-17 to 2017-11-30",
        "2.1 % of the future weight",
        "judged by taxonomy, independent of",
        "read 3 times, this time included",
        "recall@100 0.1389 [0.1333, 0.1445] beside 0.1368 [0.1313, 0.1423] of smooth_svd",
        "Note: EASE was left out",
    ):
        assert said in words
    validation = " ".join(summary_words(report(final=False, num_reads=0)))
    assert "validation report" in validation
    assert "has not been read" in validation


def test_without_an_independent_judge_it_says_so() -> None:
    made = report(judges={"titles": "same-source"})
    words = paragraph(made, "No independent judge")
    assert "titles" in words
    assert "no more than overlap" in words
    assert "same_source_relevance@100" in " ".join(summary_words(made))
    assert "same-source judge: titles" in frontier_svg(made)
    assert "relevance was not judged" in paragraph(report(judges={}), "No independent judge")


ONE, TWO, MIXED = (
    {"taxonomy": "independent"},
    {"taxonomy": "independent", "editors": "independent"},
    {"titles": "same-source", "taxonomy": "independent", "editors": "independent"},
)


@pytest.mark.parametrize("judges", [ONE, TWO, MIXED, {"titles": "same-source"}])
def test_the_rows_here_are_named_as_they_are_measured(judges: dict[str, str]) -> None:
    judge = TaxonomyJudge(codes=CODES, level_grades=(1.0,))
    made = exam(judges=dict.fromkeys(judges, judge), independent={name: kind == "independent" for name, kind in judges.items()})
    found = {key for key in measure(LISTS, made).values if "rel" in key[0]}
    assert {(metric, part) for metric, part, _ in judged(0.5, judges)} == found


def test_the_table_of_judges_shows_all_of_them() -> None:
    assert tables.judges(report()) is None
    grid = tables.judges(report(judges=MIXED))
    assert grid is not None
    wanted = [(name, kind, k) for name, kind in MIXED.items() for k in (100, 10)]
    assert list(grid.columns) == ["method", *(f"{name}\n{kind}\nrelevance@{k}" for name, kind, k in wanted)]
    (merged,) = [cells for cells in grid.rows if cells[0].text == "mtmh merged"]
    assert [cell.text for cell in merged[1::2]] == ["0.2064", "0.1858", "0.1651"]
    words = paragraph(report(judges=TWO), "Relevance is judged by taxonomy and editors")
    assert "Where no judge is named, relevance is that of taxonomy; a table shows it judge by judge." in words
    assert "Where no judge is named" not in paragraph(report(judges=MIXED | {"editors": "same-source"}), "Relevance is judged by taxonomy")


@pytest.mark.parametrize(
    ("low", "high", "what", "verdict"),
    [
        (0.1, 0.2, "recall@100", "wins"),
        (0.0, 0.2, "recall@100", "ties"),
        (-0.2, -0.1, "recall@100", "loses"),
        (-0.2, -0.1, "gini@10", "wins"),  # lower in-degree Gini is better
        (0.1, 0.2, "gini@10", "loses"),
        (math.nan, math.nan, "recall@100", "not measured"),
    ],
)
def test_verdict(low: float, high: float, what: str, verdict: str) -> None:
    assert comparison(low, high, what=what).verdict == verdict


def test_relative_difference() -> None:
    assert comparison(0.01, 0.03, baseline_value=0.1).relative == pytest.approx(0.2)
    assert math.isnan(comparison(0.01, 0.03, baseline_value=0.0).relative)


def test_an_unknown_kind_of_judge_is_refused() -> None:
    with pytest.raises(ValueError, match="'titles': 'independant'"):
        report(judges={"titles": "independant"})


def printed(made: Report) -> list[str]:
    console = Console(width=140, record=True, file=io.StringIO())
    for table in terminal_tables(made):
        console.print(table)
    return console.export_text().splitlines()


@pytest.mark.parametrize("judges", [ONE, MIXED, {"titles": "same-source"}])
def test_terminal_tables_fit(judges: dict[str, str]) -> None:
    long = comparison(
        0.1, 0.2, name="merged list on cold triggers against the baseline that is best there", what="same_source_relevance@100"
    )
    made = report(judges=judges, comparisons=[*report().comparisons, long])
    lines = printed(made)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= 140
    assert "…" not in text
    assert all(name in text for name in [*BASELINES, "mtmh merged", "new pairs", "loses", "+0.1000 to +0.2000"])
    assert all(f"{found.low:.4f}–{found.high:.4f}" in text for found in made.rows if found.slice == "all" and found.metric == "recall@10")


def test_odd_names_stand_as_they_are(tmp_path: Path) -> None:
    rows = [*report().rows, row("recall@100", 0.05, method=ODD, head="-"), row("relevance@100", 0.4, method=ODD, head="-")]
    made = report(rows=rows, title=ODD, notes=[ODD], families={f"family {ODD}": family(f"family {ODD}", "", 0)})
    write_html(made, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "<b>&[red]" not in text
    assert "&lt;b&gt;&amp;[red]$a_b$" in text
    assert any(ODD in line for line in printed(made))
    assert {ODD, f"family {ODD}"} <= {element.text for element in ET.fromstring(frontier_svg(made)).iter()}


class Balanced(HTMLParser):
    """Every element that is opened is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in {"meta", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_needs_nothing_else(tmp_path: Path) -> None:
    write_html(report(), tmp_path / "new" / "report.html")
    text = (tmp_path / "new" / "report.html").read_text()
    page = Balanced()
    page.feed(text)
    page.close()
    assert not page.open
    assert {"svg", "table", "details"} <= set(page.seen)
    assert not {"link", "img"} & set(page.seen)
    assert " src=" not in text, "its script is inside it"
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert "MTMH loses:</b> 1 of 4 comparisons" in text


def test_picture_is_xml_with_text_and_always_the_same() -> None:
    picture = frontier_svg(report())
    texts = {element.text for element in ET.fromstring(picture).iter() if element.tag.endswith("}text")}
    assert {*FAMILIES, *BASELINES, "mtmh merged", "mtmh relevance"} <= texts
    assert picture == frontier_svg(report())
    assert re.findall(r"\d{4}-\d\d-\d\d", picture) == []


def test_an_empty_or_unmeasured_report_is_drawn(tmp_path: Path) -> None:
    hollow = row("recall@100", math.nan, low=math.nan, high=math.nan)
    for made in (
        report(rows=[], comparisons=[], families={}, chosen={}, notes=[]),
        report(rows=[hollow], families={"rrf": [("1", hollow, hollow)]}, comparisons=[comparison(math.nan, math.nan)]),
    ):
        write_html(made, tmp_path / "report.html")
        printed(made)
    assert "could not be set against" in (tmp_path / "report.html").read_text()


def test_json_has_the_fixed_form(tmp_path: Path) -> None:
    write_json(report(), tmp_path / "report.json")
    found = json.loads((tmp_path / "report.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert found["cut"] == "2017-11-16"
    assert found["reads"] == 3
    assert {tuple(entry) for entry in found["rows"]} == {("method", "head", "metric", "slice", "value", "low", "high")}
    values = {(entry["method"], entry["head"], entry["metric"], entry["slice"]): entry["value"] for entry in found["rows"]}
    assert values["mtmh", "merged", "recall@100", "all"] == 0.1389
    assert values["mtmh", "merged", "churn@10", "all"] is None
    assert ("rrf", "0.3", "recall@100", "all") in values
    assert len(values) == len(found["rows"])
    assert [entry["verdict"] for entry in found["comparisons"]] == ["wins", "wins", "ties", "loses"]


def test_what_json_keeps_is_read_again(tmp_path: Path) -> None:
    made = report(marks={"0.03": "chosen"})
    write_json(made, tmp_path / "report.json")
    found = read_json(tmp_path / "report.json")
    picture = frontier_svg(found)
    assert picture == frontier_svg(made)
    assert "chosen" in {element.text for element in ET.fromstring(picture).iter()}
    write_json(found, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == (tmp_path / "report.json").read_text()
    (tmp_path / "report.json").write_text('{"cut": "2024-01-01", "rows": []}')
    with pytest.raises(TableError, match=r"no report of a backtest as this code writes it.*run `make backtest` again"):
        read_json(tmp_path / "report.json")


def test_every_number_of_the_page_is_explained(tmp_path: Path) -> None:
    write_html(report(judges=MIXED), tmp_path / "report.html")
    cells = re.findall(r"<td([^>]*)>([−+.\d]+)(?:<|$)", (tmp_path / "report.html").read_text())
    assert len(cells) > 300
    assert [text for attributes, text in cells if "title=" not in attributes] == []
    words = meaning_of("same_source_relevance@100", "judge:titles")
    assert words.endswith("reads what the model has read too; a missing place counts 0; by the judge titles")
