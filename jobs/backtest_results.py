"""What a backtest found: measures with their intervals, paired comparisons, swept families, and how all of it came about.

In time: the methods know what happened until the end of `cut`, and are judged by what happened after it, until the end of `until`. A
validation report (`final=False`) judges a slice on which settings may still be chosen; a final one judges the last slice, and counts how
often that was read. Example: cut 2017-11-16 and until 2017-11-30 judge by the two weeks from 2017-11-17 on.

Every `low` and `high` is the end of a 95 % bootstrap interval over triggers; every share is between 0 and 1.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from typing import Literal

OURS = "mtmh"
HEADS = ("merged", "engagement", "relevance")
"""Heads of our model in the order of every table; others follow."""
ENCODER = "encoder"
"""Head under which the engagement head alone is reported, beside the list that the scorer orders."""
SWEPT = ("mtmh_blend", "late_blend", "rrf", "quota")
"""Families of mixes: their head is the mix as text, e.g. `0.01`."""
DIAL, NEW_PAIR_BONUS, NEW_ITEM_BONUS = "mtmh_dial", "mtmh_new_pairs", "mtmh_new_items"
"""Families of our merged list that are swept over something else than its mix; the last two without any relevance in it."""
VALIDATION, FINAL = "backtest_validation", "backtest_final"
"""Stages of the ledger: its rows of the second say how often a last slice was read."""
INDEPENDENT, SAME_SOURCE = "independent", "same-source"
LOWER_IS_BETTER = ("gini@10",)

Method = tuple[str, str]
"""Method and head."""
Verdict = Literal["wins", "ties", "loses", "not measured"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measure of one list on one slice: the mean over `num_triggers` triggers, NaN where it has no meaning."""

    method: str
    head: str
    metric: str
    slice: str
    value: float
    low: float
    high: float
    num_triggers: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A paired difference over the same triggers, ours - theirs, in the measure `what`; `baseline_value` is theirs alone."""

    name: str
    what: str
    ours: str
    theirs: str
    value: float
    low: float
    high: float
    baseline_value: float

    @property
    def verdict(self) -> Verdict:
        """A win or a loss needs an interval that leaves zero out; where lower is better, e.g. in-degree Gini, below zero is a win."""
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            return "not measured"
        low, high = (-self.high, -self.low) if self.what in LOWER_IS_BETTER else (self.low, self.high)
        if low > 0:
            return "wins"
        return "loses" if high < 0 else "ties"

    @property
    def relative(self) -> float:
        """The difference as a share of their value; NaN where that is 0."""
        return self.value / self.baseline_value if self.baseline_value else math.nan


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that a reader of a backtest is told.

    `num_reads` counts how often the last slice has been read so far, this time included; `judges` says of each judge whether it is
    independent or same-source; `unreachable_share` is the share of future weight whose target did not exist at the cut; `chosen` holds
    the settings chosen on validation; `families` the swept mixes in their order, each with its recall row and its relevance row;
    `depth` how many places of a list count on the frontier, and `marks` says of mixes of SWEPT[0] what they are, e.g. `chosen`.

    Raises:
        ValueError: a judge is of an unknown kind, which could pass a same-source judge off as something else.
    """

    config: str
    title: str
    cut: date
    until: date
    final: bool
    num_reads: int
    judges: Mapping[str, str]
    unreachable_share: float
    num_triggers: int
    rows: Sequence[Row]
    comparisons: Sequence[Comparison]
    chosen: Mapping[str, str]
    notes: Sequence[str]
    families: Mapping[str, Sequence[tuple[str, Row, Row]]]
    minutes: float
    depth: int = 100
    marks: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wrong = {name: kind for name, kind in self.judges.items() if kind not in (INDEPENDENT, SAME_SOURCE)}
        if wrong:
            raise ValueError(f"judges of unknown kind {wrong} in the report of {self.config}; wanted {INDEPENDENT!r} or {SAME_SOURCE!r}")

    def judges_of(self, kind: str) -> list[str]:
        """Names of the judges of this kind."""
        return [name for name, known in self.judges.items() if known == kind]

    @property
    def has_independent_judge(self) -> bool:
        """Whether relevance means more than overlap with what the lists were made from."""
        return bool(self.judges_of(INDEPENDENT))

    def relevance(self, measure: str) -> str:
        """Name of a relevance measure, e.g. `relevance@100`, under the best kind of judge there is."""
        return measure if self.has_independent_judge else f"same_source_{measure}"

    @cached_property
    def all_rows(self) -> list[Row]:
        """The rows, and those of the families that are not among them, each once."""
        swept = [row for points in self.families.values() for _, *pair in points for row in pair]
        return list({(row.method, row.head, row.metric, row.slice): row for row in [*swept, *self.rows]}.values())

    @cached_property
    def _by_key(self) -> dict[tuple[str, str, str, str], Row]:
        return {(row.method, row.head, row.metric, row.slice): row for row in self.all_rows}

    def find(self, method: Method, metric: str, part: str = "all") -> Row | None:
        """The row of a measure if it was taken and is a number."""
        row = self._by_key.get((*method, metric, part))
        return row if row is not None and math.isfinite(row.value) else None

    @cached_property
    def our_heads(self) -> list[Method]:
        """Heads of our model, the merged one first."""
        found = dict.fromkeys(row.head for row in self.all_rows if row.method == OURS)
        return [(OURS, head) for head in sorted(found, key=lambda head: HEADS.index(head) if head in HEADS else len(HEADS))]

    @cached_property
    def baselines(self) -> list[Method]:
        """Methods that are neither ours nor swept, the best recall first."""
        swept = {OURS, *SWEPT, *self.families}
        found = dict.fromkeys((row.method, row.head) for row in self.all_rows if row.method not in swept)
        return sorted(found, key=self._recall, reverse=True)

    def _recall(self, method: Method) -> float:
        row = self.find(method, f"recall@{self.depth}")
        return row.value if row else -1.0

    @cached_property
    def mixes(self) -> list[Method]:
        """Swept mixes, family by family."""
        mixed = [(family, mix) for family, points in self.families.items() for mix, *_ in points]
        swept = {*SWEPT, *self.families}
        return list(dict.fromkeys([*mixed, *((row.method, row.head) for row in self.all_rows if row.method in swept)]))


def name_of(method: Method) -> str:
    """How a list is called everywhere, e.g. `mtmh merged`, `bm25`, `rrf 0.5`."""
    return method[0] if method[1] == "-" else " ".join(method)


def number(value: float, *, signed: bool = False) -> str:
    """Four decimals, since the differences that matter are in the third; a dash for NaN."""
    if not math.isfinite(value):
        return "–"
    return f"{value:+.4f}".replace("-", "−") if signed else f"{value:.4f}".replace("-", "−")


def percent(share: float, *, signed: bool = False) -> str:
    """A share as percent with one decimal; a dash for NaN."""
    if not math.isfinite(share):
        return "–"
    return f"{100 * share:+.1f} %".replace("-", "−") if signed else f"{100 * share:.1f} %"
