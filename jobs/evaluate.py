"""Stage 7: the lists of D - horizon are scored on the co-engagement of (D - horizon, D], beside simple baselines.

Relevance is judged by content cosine, which the model has read: a night withholds nothing. Only a backtest has independent judges.

A test pair is a co-engagement whose target falls after the night of the judged lists. Ranking is over the full catalog; a partner that
is in no list stays in the denominator. Baselines rank from the very table versions that the judged night read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from scipy import sparse

from conf.tables import (
    CO_ENGAGEMENT_PAIRS,
    ENGAGEMENTS,
    EVALUATION,
    ITEM_FEATURES,
    ITEM_NEIGHBORS_HISTORY,
    ITEM_POPULARITY,
    Table,
)
from jobs.judging import Future, Indices, future_pairs, index_future
from jobs.ledger import StageRecord
from jobs.stage import StageRun, stage_main
from models import baselines, metrics

STAGE = "evaluate"
Lists = dict[tuple[str, str], Indices]
"""(T, K) item indices by method and head, -1 behind the end."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What is judged; (M,) user-days of each item before; (N, C) content and (N,) eligibility of the N <= M items known then."""

    future: Future
    popularity: npt.NDArray[np.float64]
    content: npt.NDArray[np.float32]
    eligible: npt.NDArray[np.bool_]


def evaluate(run: StageRun) -> None:
    """Find the judged night, collect its future, score lists and baselines, gate."""
    judged_date = run.run_date - timedelta(days=run.settings.evaluation.horizon_days)
    night = run.night.ledger.last_success(stage="publish_neighbors", run_date=judged_date)
    if night is None:
        run.note(f"no lists of {judged_date} to judge: nothing was evaluated")
        return
    if run.settings.evaluation.horizon_days > run.settings.lake.keep_nights:
        kept = f"lake.keep_nights is {run.settings.lake.keep_nights}, evaluation.horizon_days {run.settings.evaluation.horizon_days}"
        run.note(f"warning: lists of {judged_date} are kept no longer, nothing was evaluated: {kept}; raise the first or lower the second")
        return
    judged = _judged(run, night)
    rows: list[tuple[Any, ...]] = []
    for (method, head), lists in (_published(run, night, judged) | _baselines(run, night, judged)).items():
        rows += [(night.run_id, judged_date, method, head, *scored) for scored in _scores(run, judged, lists)]
    frame = run.night.spark.createDataFrame(
        [(*row, len(judged.future.triggers), run.settings.evaluation.horizon_days) for row in rows], ", ".join(_ddl())
    )
    run.replace(EVALUATION, frame, where=f"run_id = '{night.run_id}'")
    run.gate({"num_triggers": len(judged.future.triggers)} | {f"{row[2]}_{row[3]}_{row[4]}": row[6] for row in rows})


def _ddl() -> list[str]:
    return [f"{column.name} {column.type}" for column in EVALUATION.columns]


def _judged(run: StageRun, night: StageRecord) -> Judged:
    """The future pairs of at most `max_triggers` triggers, and what the judged night knew of their popularity."""
    first_day = night.run_date + timedelta(days=1)
    table = future_pairs(run.read(ENGAGEMENTS), settings=run.settings, first_day=first_day, last_day=run.run_date)
    features = (
        _pinned(run, night, ITEM_FEATURES).select("item_id", "item_index", "eligible", "content_vector").orderBy("item_index").toArrow()
    )
    future = index_future(table, features["item_id"].to_pylist())
    popularity = np.zeros(len(future.item_ids))
    counted = _pinned(run, night, ITEM_POPULARITY).select("item_id", "num_user_days").toArrow()
    popularity[future.positions(counted["item_id"])] = counted["num_user_days"].to_numpy()
    content = np.stack(features["content_vector"].to_numpy()).astype(np.float32)
    return Judged(future=future, popularity=popularity, content=content, eligible=features["eligible"].to_numpy())


def _pinned(run: StageRun, night: StageRecord, table: Table) -> DataFrame:
    """A table at the version the judged night used."""
    versions: dict[str, int] = {}
    for record in run.night.ledger.records(run_id=night.run_id, status="succeeded"):
        versions |= record.input_versions | record.output_versions
    return run.night.lake.read(table, versions[table.name])


def _published(run: StageRun, night: StageRecord, judged: Judged) -> Lists:
    """The (T, K) lists of every head of the judged night."""
    k = max(run.settings.evaluation.cutoffs)
    history = run.read(ITEM_NEIGHBORS_HISTORY).where(F.col("run_id") == F.lit(night.run_id))
    wanted = run.night.spark.createDataFrame(
        [(judged.future.item_ids[item],) for item in judged.future.triggers.tolist()], "item_id string"
    )
    ids = F.slice("neighbors.neighbor_id", 1, k).alias("ids")
    rows = history.join(F.broadcast(wanted), "item_id", how="left_semi").select("item_id", "head", ids).toArrow()
    index = {item_id: position for position, item_id in enumerate(judged.future.item_ids)}
    row_of = {judged.future.item_ids[item]: row for row, item in enumerate(judged.future.triggers.tolist())}
    lists: Lists = {}
    for item_id, head, neighbors in zip(rows["item_id"].to_pylist(), rows["head"].to_pylist(), rows["ids"].to_pylist(), strict=True):
        found = lists.setdefault(("mtmh", head), np.full((len(judged.future.triggers), k), -1, np.int32))
        found[row_of[item_id], : len(neighbors)] = [index[neighbor] for neighbor in neighbors]
    return lists


def _baselines(run: StageRun, night: StageRecord, judged: Judged) -> Lists:
    """Popularity, decayed counts and content, ranked from what the judged night knew; a trigger it did not know gets popularity only."""
    k = max(run.settings.evaluation.cutoffs)
    content, eligible = judged.content, judged.eligible
    popularity = judged.popularity[: len(eligible)].astype(np.float32)
    counts = _counts(run, night, judged.future.item_ids[: len(eligible)])
    ranked = {"popularity": baselines.popularity_lists(judged.future.triggers, popularity=popularity, eligible=eligible, k=k)}
    ranked["counts"] = baselines.count_lists(judged.future.triggers, counts=counts, popularity=popularity, eligible=eligible, k=k)
    ranked["content"] = baselines.content_lists(judged.future.triggers, content=content, eligible=eligible, k=k)
    return {(name, "-"): lists for name, lists in ranked.items()}


def _counts(run: StageRun, night: StageRecord, item_ids: list[str]) -> sparse.csr_array:
    """(N, N) decayed co-engagement weight as the judged night knew it."""
    table = _pinned(run, night, CO_ENGAGEMENT_PAIRS).select("trigger_item_id", "target_item_id", "weight").toArrow()
    known = pa.array(item_ids)
    rows, columns = (pc.index_in(table[name], known).to_numpy() for name in ("trigger_item_id", "target_item_id"))
    return sparse.csr_array((table["weight"].to_numpy(), (rows, columns)), shape=(len(item_ids), len(item_ids)))


def _scores(run: StageRun, judged: Judged, lists: Indices) -> Iterator[tuple[str, str, float, float, float]]:
    """(metric, slice, value, low, high) of one method's lists."""
    settings = run.settings.evaluation
    alike = _content_cosine(judged, lists)
    for k in settings.cutoffs:
        plain = metrics.recall_at_k(lists, judged.future.partners, k=k)
        debiased = metrics.debiased_recall_at_k(lists, judged.future.partners, judged.popularity, k=k)
        relevance = metrics.relevance_at_k(lists, alike, k=k)
        for name, values in ((f"recall@{k}", plain), (f"debiased_recall@{k}", debiased), (f"same_source_relevance@{k}", relevance)):
            found = metrics.bootstrap(values, num_resamples=settings.num_bootstrap, seed=run.settings.training.seed)
            yield name, "all", found.value, found.low, found.high


def _content_cosine(judged: Judged, lists: Indices) -> npt.NDArray[np.float64]:
    """(T, K) cosine of trigger and neighbor in content, at least 0; NaN where one was not known. Same-source: the model reads it."""
    num_known = len(judged.content)
    found = np.full(lists.shape, np.nan)
    for row, (trigger, neighbors) in enumerate(zip(judged.future.triggers.tolist(), lists, strict=True)):
        known = np.flatnonzero((neighbors >= 0) & (neighbors < num_known))
        if trigger < num_known:
            found[row, known] = np.maximum(judged.content[neighbors[known]] @ judged.content[trigger], 0.0)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage alone."""
    stage_main(STAGE, evaluate, description="past lists against what happened since", argv=argv)


if __name__ == "__main__":
    main()
