"""One cut of a backtest, judged: MTMH's lists, every baseline and every swept family on one exam, to rows of `evaluation`.

The lists are made by the very index and retriever that a night publishes from, for the judged triggers only. Whole-list measures
(coverage, Gini) are therefore of these triggers' lists. Shapes: `T` judged triggers, `K` = 100 positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date

import numpy as np
from pyspark.sql import functions as F

from conf.settings import RetrievalSettings, Settings
from conf.tables import EVALUATION, ITEM_FEATURES, ITEM_POPULARITY
from jobs.backtest_lists import keep_lists
from jobs.backtest_results import DIAL, ENCODER, FINAL, NEW_ITEM_BONUS, NEW_PAIR_BONUS, OURS, Row
from jobs.backtest_verdict import Verdict, evaluation_rows
from jobs.exam import ASSOCIATIONS, CutData, read_cut
from jobs.lake import only_row
from jobs.retrieval import counted_of, distilled_vectors, index_items
from jobs.stage import Night, StageRun
from jobs.verdicts import RECALL, Board
from models import metrics
from models.baselines import score_lists
from models.contest import LIST_LENGTH, TRAINED, Tuned
from models.data import Floats, Ints
from models.distillation import DISTILLED
from models.merge import Policy, read_policies
from models.metrics import Values
from models.neighbors import ENGAGEMENT, MERGED, Counted, Neighbors, Retriever
from models.ranking import Longs
from models.scoreboard import Scored, measure, measure_axes

_NUM_BASELINES = 8 + 2 * len(ASSOCIATIONS)
_BLEND = "mtmh_blend"


def judge_cut(run: StageRun, *, until: date, last_cut: date, tuned: Tuned | None, before: Night | None, found: list[Verdict]) -> None:
    """Judge the lists of a cut whose training stages are done; appends the verdict to `found`.

    Args:
        run: stage VALIDATION or FINAL of the cut's night.
        until: last day of the slice.
        last_cut: cut of the last slice, whose readings are counted.
        tuned: weights of the baselines; None: choose them on this very slice.
        before: the trained night of the day before, for the churn; None: it is not measured.
        found: takes the result.
    """
    steps = _Steps(total=_num_methods(run))
    with run.night.display.watch("judging", steps.read):
        data = read_cut(run, until=until)
        tuned = tuned or data.contest.tune(data.exam.future[:, : data.future.num_known], run.settings.backtest)
        _note_reach(run, data)
        board = _board(run, data, tuned, before, steps)
    earlier = run.night.ledger.records(stage=FINAL, run_date=last_cut)
    final = run.stage == FINAL
    rows = evaluation_rows(board, run.settings)
    verdict = Verdict(
        cut=run.run_date,
        until=until,
        final=final,
        num_reads=len(earlier) + final,
        board=board,
        tuned=tuned,
        rows=rows,
        notes=run.notes,
    )
    _write(run, rows, until)
    run.gate(_metrics(run, data, board))
    found.append(verdict)


@dataclass
class _Steps:
    """How far the judging is: lists measured so far, of those there may be (a method that cannot run here is fewer)."""

    total: int
    done: int = 0

    def read(self) -> tuple[float, float, str]:
        return self.done, self.total, "lists"


def _note_reach(run: StageRun, data: CutData) -> None:
    """How much of the future no counting method can find; the share of unknown items alone says little where the catalog has no times."""
    weight = np.asarray(data.exam.future.sum(axis=0), np.float64).ravel()
    never = weight[data.exam.popularity == 0].sum() / max(float(weight.sum()), 1e-12)
    times = "" if run.settings.source.items.columns.event_timestamp else " (the catalog has no times: items that came later are in it)"
    run.note(f"{never:.1%} of the future weight lies on items that nobody had engaged with before the cut{times}")


def _num_methods(run: StageRun) -> int:
    settings = run.settings.backtest
    families = len(settings.blend_values) + 2 * len(settings.content_shares)  # of ours, and of the baselines'
    dials = len(settings.popularity_exponents) + len(settings.new_pair_bonuses) + len(settings.new_item_bonuses)
    return len(run.settings.list_names) + 1 + 2 * families + dials + _NUM_BASELINES


# --- boards ---


def _board(run: StageRun, data: CutData, tuned: Tuned, before: Night | None, steps: _Steps) -> Board:
    settings, exam = run.settings.backtest, data.exam
    methods: dict[tuple[str, str], Scored] = {}
    opened = Opened.of(run, data)
    heads, swept = head_lists(run, opened), _swept_lists(run, opened)
    for head, lists in heads.items():
        methods[OURS, head] = _with_overlap(measure(lists, exam), lists, heads["engagement" if head != "engagement" else "relevance"])
        steps.done += 1
    if before is not None:
        methods[OURS, MERGED].values["churn@10", "all"] = _churn(StageRun(night=before, stage=run.stage), data, heads[MERGED])
    kept: dict[str, Ints] = {}
    for name, lists in data.contest.baselines(tuned, settings, note=run.note):
        methods[name, "-"] = measure(lists, exam)
        kept |= {name: lists} if name in TRAINED else {}
        steps.done += 1
    keep_lists(run.night.artifacts("backtest"), data.future.item_ids, data.future.triggers, kept)
    swept |= data.contest.families(tuned, settings)
    families = {}
    for family, mixes in swept.items():
        families[family] = {mix: measure_axes(lists, exam) for mix, lists in mixes.items()}
        steps.done += len(mixes)
    return Board(exam=exam, methods=methods, families=families)


def _with_overlap(scored: Scored, lists: Ints, other: Ints) -> Scored:
    """Adds how many of the first 10 it shares with the engagement list (the engagement list: with the relevance list)."""
    scored.values["overlap@10", "all"] = metrics.overlap_at_k(lists, other, k=10)
    return scored


@dataclass(frozen=True, kw_only=True)
class Opened:
    """The index of a cut's night, the judged triggers that it knows, their counted pairs, and their rows among all judged ones."""

    retriever: Retriever
    triggers: Ints
    counted: Counted
    rows: Longs
    num_rows: int

    @classmethod
    def of(cls, run: StageRun, data: CutData) -> "Opened":
        """Writes the index anew."""
        rows = np.flatnonzero(data.future.triggers < data.future.num_known)
        triggers = data.future.triggers[rows]
        retriever = Retriever.open(index_items(run))
        return cls(retriever=retriever, triggers=triggers, counted=counted_of(run, triggers), rows=rows, num_rows=len(data.future.triggers))

    def empty(self) -> Ints:
        """(T, K) of -1: no neighbors of any judged trigger; those that the index does not know stay so."""
        return np.full((self.num_rows, LIST_LENGTH), -1, np.int32)

    def matrix(self, lists: Ints) -> Ints:
        """(T, K) item indices of all judged triggers from (B, K) of those that the index knows."""
        matrix = self.empty()
        matrix[self.rows] = lists
        return matrix

    def swept(self, policies: Sequence[Policy], settings: RetrievalSettings) -> list[Ints]:
        """(T, K) merged lists under each policy, a block of triggers at a time: of so many lists only the ids are kept."""
        lists = [self.empty() for _ in policies]
        for start in range(0, len(self.triggers), settings.block_size):
            stop = min(start + settings.block_size, len(self.triggers))
            counted = self.counted.part(start, stop)
            found = self.retriever.merge_under(self.triggers[start:stop], counted, policies, settings=settings)
            for matrix, neighbors in zip(lists, found, strict=True):
                matrix[self.rows[start:stop]] = _padded(neighbors)
        return lists


def head_lists(run: StageRun, opened: Opened) -> dict[str, Ints]:
    """(T, K) lists of every head and of the merged list, and of vectors by themselves: the engagement head's, and distilled ones."""
    retriever, triggers = opened.retriever, opened.triggers
    scopes = retriever.policies_for(_policies(run), triggers)
    found = retriever.retrieve(triggers, opened.counted, scopes, settings=_list_settings(run.settings))
    heads = {head: opened.matrix(_padded(neighbors)) for head, neighbors in found.heads.items()}
    alone = {ENCODER: (retriever.heads[ENGAGEMENT].trigger, retriever.heads[ENGAGEMENT].target)}
    if distilled := distilled_vectors(run, retriever.item_ids):
        alone[DISTILLED] = distilled
    return heads | {name: opened.matrix(_lists_of(*vectors, retriever, triggers)) for name, vectors in alone.items()}


def _swept_lists(run: StageRun, opened: Opened) -> dict[str, dict[str, Ints]]:
    """Per family (T, K) merged lists, over each kind of policy, the popularity discount, the share of relevance and both bonuses;
    the latter and the frontiers without anything else of the default row but its discount.
    """
    settings, default = run.settings.backtest, _policies(run)["default"]
    blend = default if default.kind == "blend" else replace(default, kind="blend", value=0.0)
    bare = replace(blend, relevance_share=0.0, new_pair_bonus=0.0, new_item_bonus=0.0)
    mixes = {
        _BLEND: {v: replace(bare, value=v) for v in settings.blend_values},
        "mtmh_share": {v: replace(blend, relevance_share=v) for v in settings.content_shares},
        "mtmh_rrf": {v: replace(bare, kind="rrf", value=v) for v in settings.content_shares},
        DIAL: {x: replace(blend, popularity_exponent=x) for x in settings.popularity_exponents},
        NEW_PAIR_BONUS: {x: replace(bare, value=0.0, new_pair_bonus=x) for x in settings.new_pair_bonuses},
        NEW_ITEM_BONUS: {x: replace(bare, value=0.0, new_item_bonus=x) for x in settings.new_item_bonuses},
    }
    mixes = {family: swept for family, swept in mixes.items() if swept}
    flat = [policy for family in mixes.values() for policy in family.values()]
    merged = iter(opened.swept(flat, _list_settings(run.settings)))
    return {family: {f"{mix:g}": next(merged) for mix in of} for family, of in mixes.items()}


def _lists_of(trigger: Floats, target: Floats, retriever: Retriever, triggers: Ints) -> Ints:
    """What vectors find by themselves in the full catalog, without counts, users and trends."""
    return score_lists(triggers, lambda part: trigger[part] @ target.T, eligible=retriever.eligible, k=LIST_LENGTH)


def _padded(neighbors: Neighbors) -> Ints:
    """(B, K) item indices, -1 behind the end."""
    inside = np.arange(LIST_LENGTH) < np.diff(neighbors.offsets)[:, None]
    found = np.full(inside.shape, -1, np.int32)
    found[inside] = neighbors.neighbor
    return found


def _policies(run: StageRun) -> dict[str, Policy]:
    return read_policies([policy.model_dump() for policy in run.settings.merge])


def _list_settings(settings: Settings) -> RetrievalSettings:
    return settings.retrieval.model_copy(update={"list_length": LIST_LENGTH})


def _churn(before: StageRun, data: CutData, merged: Ints) -> Values:
    """(T,) change of the merged list's first 10 against the night before; NaN for a trigger that one of the two did not know."""
    retriever = Retriever.open(index_items(before))
    place = data.future.positions(retriever.item_ids).astype(np.int32)  # of the earlier night's items in this one's index
    back = np.full(len(data.future.item_ids), -1, np.int32)
    back[place[place >= 0]] = np.flatnonzero(place >= 0)
    both = np.flatnonzero((back[data.future.triggers] >= 0) & (data.future.triggers < data.future.num_known))
    triggers = back[data.future.triggers[both]]
    policies = retriever.policies_for(_policies(before), triggers)
    settings = _list_settings(before.settings)
    lists = _padded(retriever.retrieve(triggers, counted_of(before, triggers), policies, settings=settings).heads[MERGED])
    gone = np.int32(len(data.future.item_ids)) + lists  # an item that has left since is another item than any of today
    earlier = np.where(lists >= 0, np.where(place[lists] >= 0, place[lists], gone), np.int32(-1))
    churn = np.full(len(data.future.triggers), np.nan)
    churn[both] = metrics.churn_at_k(earlier, merged[both], k=10)
    return churn


def _write(run: StageRun, rows: Sequence[Row], until: date) -> None:
    days = (until - run.run_date).days
    content = [
        (run.night.run_id, run.run_date, r.method, r.head, r.metric, r.slice, r.value, r.low, r.high, r.num_triggers, days) for r in rows
    ]
    names = ", ".join(f"{column.name} {column.type}" for column in EVALUATION.columns)
    run.replace(EVALUATION, run.night.spark.createDataFrame(content, names), where=f"run_id = '{run.night.run_id}'")


def _metrics(run: StageRun, data: CutData, board: Board) -> dict[str, float]:
    """For the gate: how much was judged, and whether anything of the judges or of the future got through to training."""
    exam = data.exam
    after = F.count_if(F.col("last_engaged_date") > F.lit(run.run_date)).alias("n")
    metric, _ = exam.relevance_metric
    content = board.methods["content", "-"].values[metric.replace("relevance@100", "rel_ndcg@10"), "all"]
    reached = {head: float(np.nanmean(board.methods[OURS, head].values[RECALL])) for head in ("engagement", "merged")}
    return {
        "num_triggers": len(exam.triggers),
        "num_rows_after_cut": only_row(run.read(ITEM_POPULARITY).agg(after))["n"],
        "num_withheld_values": _num_withheld(run),
        "content_rel_ndcg": float(np.nanmean(content)) if any(exam.independent.values()) and not np.isnan(content).all() else 0.0,
        **{f"{head}_recall_at_100": value for head, value in reached.items()},
    }


def _num_withheld(run: StageRun) -> float:
    """Values in item_features of columns that the judges withhold."""
    features = run.read(ITEM_FEATURES)
    counts = []
    for field in run.settings.features.judge_fields:
        name, _, level = field.partition("[")
        if name not in features.columns:
            continue  # text and embedding have no column there
        seen = F.size(name) > int(level.partition(":")[0]) if level else F.col(name).isNotNull()
        counts.append(F.count_if(seen).alias(field))
    return float(sum(only_row(features.agg(*counts)).values())) if counts else 0.0
