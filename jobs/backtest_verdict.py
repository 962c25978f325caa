"""What came out of one judged cut, as rows with intervals and as a report at the settings that validation chose."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from conf.settings import Settings
from jobs.backtest_results import INDEPENDENT, SAME_SOURCE, SWEPT, Report, Row
from jobs.verdicts import RECALL, Board, Choice, compare, hypervolumes
from models.contest import Tuned
from models.metrics import Estimate
from models.scoreboard import Exam, Key, Scored


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A judged cut."""

    cut: date
    until: date
    final: bool
    num_reads: int
    board: Board
    tuned: Tuned
    rows: Sequence[Row]
    notes: Sequence[str]


def evaluation_rows(board: Board, settings: Settings) -> list[Row]:
    """Every measure of every method, with its interval."""
    draw: dict[str, Any] = {"num_resamples": settings.evaluation.num_bootstrap, "seed": settings.training.seed}
    rows = [row for method, scored in board.methods.items() for row in _rows(method, scored, draw)]
    rows += [row for family, mixes in board.families.items() for mix, scored in mixes.items() for row in _rows((family, mix), scored, draw)]
    rows += [_row((family, "-"), ("hypervolume", "all"), area) for family, area in hypervolumes(board, **draw).items()]
    return rows


def _rows(method: tuple[str, str], scored: Scored, draw: Mapping[str, Any]) -> Iterator[Row]:
    for key, estimate in scored.estimates(**draw):
        yield _row(method, key, estimate)


def _row(method: tuple[str, str], key: Key, found: Estimate) -> Row:
    return Row(
        method=method[0],
        head=method[1],
        metric=key[0],
        slice=key[1],
        value=found.value,
        low=found.low,
        high=found.high,
        num_triggers=found.num_triggers,
    )


def make_report(verdict: Verdict, choice: Choice, settings: Settings, *, minutes: float) -> Report:
    """What a reader is told of a judged cut, at settings that validation chose."""
    draw: dict[str, Any] = {"num_resamples": settings.evaluation.num_bootstrap, "seed": settings.training.seed}
    exam, rows = verdict.board.exam, verdict.rows
    return Report(
        config=settings.name,
        title=f"Backtest of {settings.name}",
        cut=verdict.cut,
        until=verdict.until,
        final=verdict.final,
        num_reads=verdict.num_reads,
        judges={name: INDEPENDENT if exam.independent[name] else SAME_SOURCE for name in exam.judges},
        unreachable_share=exam.unreachable_share,
        num_triggers=len(exam.triggers),
        rows=rows,
        comparisons=compare(verdict.board, choice, **draw),
        chosen=choice.described() | verdict.tuned.described(),
        notes=verdict.notes,
        families=_families(rows, verdict.board, exam),
        minutes=minutes,
        marks={found: "chosen at recall kept"} if (found := choice.described().get(f"{SWEPT[0]} at recall kept")) else {},
    )


def _families(rows: Sequence[Row], board: Board, exam: Exam) -> dict[str, list[tuple[str, Row, Row]]]:
    by_key = {(row.method, row.head, row.metric, row.slice): row for row in rows}
    return {
        family: [(mix, by_key[family, mix, *RECALL], by_key[family, mix, *exam.relevance_metric]) for mix in mixes]
        for family, mixes in board.families.items()
    }
