"""The exam of one cut of a backtest: what was known at the cut, what happened after it, and the judges, as arrays over one item index.

Judges may know everything there is, also what was withheld from the model: their columns come from `item_annotations` itself, as known at
the end of the data.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import date, timedelta
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from scipy.sparse import csr_array

from conf.errors import SettingsError, SourceError
from conf.settings import JudgeSettings
from conf.tables import (
    CO_ENGAGEMENT_DAILY,
    CO_ENGAGEMENT_PAIRS,
    ENGAGEMENTS,
    ITEM_ANNOTATIONS,
    ITEM_FEATURES,
    ITEM_POPULARITY,
    PAIR_RELEVANCE,
    RELEVANCE_EXAMPLES,
)
from features.annotations import annotations_as_of
from jobs.judging import Future, future_pairs, index_future
from jobs.retrieval import category_codes
from jobs.stage import StageRun
from models.contest import Contest, DailyCounts
from models.data import TableRef, TrainingData, load_training_data
from models.factorization import ScoreWeights
from models.judges import Judge, LabelJudge, PairJudge, TaxonomyJudge, word_documents
from models.scoreboard import Exam

ASSOCIATIONS = ("conditional", "cosine", "jaccard", "decayed_jaccard", "lift", "bm25", "swing")
_TRAINING = (ENGAGEMENTS, CO_ENGAGEMENT_DAILY, CO_ENGAGEMENT_PAIRS, ITEM_POPULARITY, ITEM_FEATURES, RELEVANCE_EXAMPLES)


@dataclass(frozen=True, kw_only=True)
class CutData:
    """A cut: its baselines, the future with its ids, and the exam."""

    contest: Contest
    future: Future
    exam: Exam


def read_cut(run: StageRun, *, until: date) -> CutData:
    """Read everything at the versions that the cut's night pinned.

    Args:
        run: of the cut's night.
        until: last day of the future.

    Raises:
        SourceError: nothing happened after the cut.
    """
    refs = {table.name: TableRef(uri=run.night.lake.path(table), version=run.version(table)) for table in _TRAINING}
    counting = run.settings.pairs
    known = load_training_data(refs, run_date=run.run_date, half_life_days=counting.half_life_days, symmetric=counting.window.symmetric)
    first_day = run.run_date + timedelta(days=1)
    table = future_pairs(run.read(ENGAGEMENTS), settings=run.settings, first_day=first_day, last_day=until)
    if not table.num_rows:
        raise SourceError(f"no co-engagement from {first_day} to {until}; widen evaluation.window or backtest.slice_share")
    future = index_future(table, known.item_ids.tolist())
    exam = Exam(
        triggers=future.triggers,
        future=future.partners,
        popularity=_popularity(run, future),
        known_pairs=_known_pairs(run, future),
        eligible=known.eligible,
        content=known.content,
        judges=_judges(run, known, until=until),
        independent={name: judge.independent for name, judge in run.settings.backtest.judges.items()},
    )
    contest = Contest(
        known=known,
        associations=_associations(run, future),
        daily=_daily_counts(run, future),
        sequences=_sequences(run, future),
        sequences_are_sessions=run.settings.pairs.window.kind == "session",
        factors=_factors(run),
        triggers=future.triggers,
    )
    return CutData(contest=contest, future=future, exam=exam)


def _factors(run: StageRun) -> ScoreWeights:
    """The weights that the cut's training chose on its own holdout."""
    chosen = json.loads((run.night.artifacts("model") / "metrics.json").read_text())
    weights = {name: chosen[name] for name in (field.name for field in fields(ScoreWeights))}
    return ScoreWeights(**weights | {"dimension": int(weights["dimension"])})


def _popularity(run: StageRun, future: Future) -> npt.NDArray[np.float64]:
    counted = run.read(ITEM_POPULARITY).select("item_id", "num_user_days").toArrow()
    popularity = np.zeros(len(future.item_ids))
    popularity[future.positions(counted["item_id"])] = counted["num_user_days"].to_numpy()
    return popularity


def _triggers(run: StageRun, future: Future) -> DataFrame:
    """trigger_item_id and its row."""
    rows = [(future.item_ids[item], row) for row, item in enumerate(future.triggers.tolist())]
    return F.broadcast(run.night.spark.createDataFrame(rows, "trigger_item_id string, row int"))


def _known_pairs(run: StageRun, future: Future) -> csr_array:
    """(T, M) 1 where the two were engaged together before the cut, in either direction, by however few users."""
    daily = run.read(CO_ENGAGEMENT_DAILY).where(F.col("event_date") <= F.lit(run.run_date))
    pairs = daily.select("trigger_item_id", "target_item_id")
    pairs = pairs.union(pairs.select("target_item_id", "trigger_item_id"))
    table = pairs.join(_triggers(run, future), "trigger_item_id", how="inner").select("row", "target_item_id").distinct().toArrow()
    return _cells(table, future, np.ones(table.num_rows, np.float32))


def _cells(table: pa.Table, future: Future, values: npt.NDArray[np.float32], *, num_rows: int | None = None) -> csr_array:
    """`row` and `target_item_id` to a (T, M) matrix; targets that are not here are left out."""
    target = future.positions(table["target_item_id"])
    here = target >= 0
    shape = (len(future.triggers) if num_rows is None else num_rows, len(future.item_ids))
    return csr_array((values[here], (table["row"].to_numpy()[here], target[here])), shape=shape)


def _associations(run: StageRun, future: Future) -> dict[str, csr_array]:
    """(N, N) per association column of the counted pairs, filled at the rows of the judged triggers."""
    pairs = run.read(CO_ENGAGEMENT_PAIRS).join(_triggers(run, future), "trigger_item_id", how="inner")
    table = pairs.select("row", "target_item_id", *ASSOCIATIONS).toArrow()
    trigger, target = future.triggers[table["row"].to_numpy()], future.positions(table["target_item_id"])
    here = (target >= 0) & (target < future.num_known)
    shape = (future.num_known, future.num_known)
    values = {name: table[name].to_numpy().astype(np.float32)[here] for name in ASSOCIATIONS}
    return {name: csr_array((column, (trigger[here], target[here])), shape=shape) for name, column in values.items()}


def _daily_counts(run: StageRun, future: Future) -> DailyCounts:
    days = run.read(ENGAGEMENTS).where(F.col("event_date") <= F.lit(run.run_date))
    users = days.groupBy("event_date", F.col("item_id").alias("target_item_id")).agg(F.count_distinct("user_id").alias("users"))
    age = F.date_diff(F.lit(run.run_date), "event_date").alias("age")
    table = users.select(age, "target_item_id", "users").toArrow()
    ages, row = np.unique(table["age"].to_numpy(), return_inverse=True)
    rows = table.append_column("row", pa.array(row))
    counts = _cells(rows, future, table["users"].to_numpy().astype(np.float32), num_rows=len(ages))[:, : future.num_known]
    return DailyCounts(ages=ages.astype(np.float32), counts=counts)


def _sequences(run: StageRun, future: Future) -> list[list[int]]:
    """Item indices in order of time, a list per session, or per user where the source has none; lists of one say nothing."""
    by_session = run.settings.pairs.window.kind == "session"
    if not run.settings.backtest.external_baselines:
        return []
    events = run.read(ENGAGEMENTS).where(F.col("event_date") <= F.lit(run.run_date))
    key = ["user_id", "session_id"] if by_session else ["user_id"]
    ordered = F.array_sort(F.collect_list(F.struct("engaged_at", "item_id")))["item_id"].alias("items")
    table = events.groupBy(*key).agg(ordered).where(F.size("items") > 1).orderBy(*key).select("items").toArrow()
    lists = table["items"].combine_chunks()
    flat = future.positions(pa.chunked_array([lists.flatten()]))
    bounds = lists.offsets.to_numpy()
    return [flat[start:stop].tolist() for start, stop in pairwise(bounds)]


# --- judges ---


def _judges(run: StageRun, known: TrainingData, *, until: date) -> dict[str, Judge]:
    described = annotations_as_of(run.read(ITEM_ANNOTATIONS), run_date=until).where(~F.col("deleted"))
    table = described.select("item_id", "title", "categories", "tags").toArrow()
    place = {item_id: row for row, item_id in enumerate(table["item_id"].to_pylist())}
    rows = [place.get(item_id) for item_id in known.item_ids.tolist()]
    columns = {name: _aligned(table[name].to_pylist(), rows) for name in ("title", "categories", "tags")}
    return {name: _judge(run, name, columns, known) for name in run.settings.backtest.judges}


def _aligned(values: Sequence[Any], rows: Sequence[int | None]) -> list[Any]:
    return [None if row is None else values[row] for row in rows]


def _judge(run: StageRun, name: str, columns: Mapping[str, list[Any]], known: TrainingData) -> Judge:
    settings = run.settings.backtest.judges[name]
    if settings.kind == "taxonomy":
        return _taxonomy_judge(name, settings, columns["categories"])
    if settings.kind == "labels":
        documents = [None if tags is None else dict.fromkeys(tags, 1.0) for tags in columns["tags"]]
        return LabelJudge.from_documents(documents, ignored=settings.ignored_labels, weighted=False)
    if settings.kind == "words":
        return LabelJudge.from_documents(word_documents(columns["title"]))
    return _pair_judge(run, settings, known)


def _taxonomy_judge(name: str, settings: JudgeSettings, categories: Sequence[Sequence[str] | None]) -> Judge:
    codes, grades = category_codes(categories), settings.level_grades
    if codes.shape[1] > len(grades):
        raise SettingsError(
            f"found category paths of {codes.shape[1]} levels, and {len(grades)} grades {grades} in backtest.judges.{name}.level_grades; "
            "wanted a grade for each level: add grades there, or map fewer levels in source.items.columns.categories"
        )
    return TaxonomyJudge(codes=codes, level_grades=grades)


def _pair_judge(run: StageRun, settings: JudgeSettings, known: TrainingData) -> Judge:
    labels = run.read(PAIR_RELEVANCE)
    wanted = labels.where(F.col("source").isin(settings.sources)) if settings.sources else labels
    latest = wanted.groupBy("item_id", "other_item_id").agg(F.max_by("grade", "rated_at").alias("grade")).toArrow()
    index = {item_id: row for row, item_id in enumerate(known.item_ids.tolist())}
    left, right = (np.array([index.get(i, -1) for i in latest[name].to_pylist()], np.int32) for name in ("item_id", "other_item_id"))
    here = (left >= 0) & (right >= 0)
    grade = latest["grade"].to_numpy().astype(np.float64)
    return PairJudge.from_pairs(left[here], right[here], grade[here], num_items=known.num_items)
