"""The shared index of a night, and the Spark tasks that search it.

Shapes: `N` items of `item_features` by `item_index`; a task sees blocks of triggers with their counted pairs.
"""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from conf.faults import reach
from conf.settings import LakeSettings, RetrievalSettings
from conf.tables import CO_ENGAGEMENT_PAIRS, ITEM_EMBEDDINGS, ITEM_FEATURES, ITEM_POPULARITY, MERGE_POLICY
from jobs.list_files import MakeLists
from jobs.reader import shared_folder
from jobs.stage import StageRun
from models.data import TableRef, read_table
from models.distillation import DISTILLED
from models.eligibility import FilterColumn, FilterColumns
from models.merge import read_policies
from models.neighbors import CONTENT, MERGED, Counted, Retriever, build_index
from models.search import estimate_search
from models.user_level import UserLevel

CANDIDATES = "candidates"
"""Artefact of a night: what its lists were merged from, a file per block of triggers."""
_TRIGGERS_PER_TASK = 4_096
_MOST_TAGS = 8  # of an item that reasons may name: comparing all with all grows with the square
Rows = npt.NDArray[np.float32]


def index_items(run: StageRun) -> Path:
    """Write the night's index below its artefacts; returns its folder."""

    def table(declared: Any, *columns: str) -> pa.Table:
        return read_table(TableRef(uri=run.night.lake.path(declared), version=run.version(declared)), columns)

    columns = ("item_id", "item_index", "content_vector", "categories", "tags", "eligible", "filter_values")
    features = table(ITEM_FEATURES, *columns).sort_by("item_index")
    item_ids = features["item_id"].combine_chunks().cast(pa.string())
    popularity = table(ITEM_POPULARITY, "item_id", "weight", "num_user_days")
    embeddings = table(ITEM_EMBEDDINGS, "item_id", "head", "trigger_vector", "target_vector")
    model = run.night.artifacts("model")
    folder = run.night.artifacts("index")
    paths = features["categories"].to_pylist()
    codes = category_codes(paths)
    filters = _filter_columns(run, features["filter_values"], paths)
    eligible = features["eligible"].to_numpy() & filters.everywhere(run.settings.retrieval.filters)
    vectors = {head: _vectors(embeddings, head, item_ids) for head in run.settings.model.heads}
    content = _rows(features["content_vector"])
    _say_estimates(run, int(eligible.sum()), {head: target.shape[1] for head, (_, target) in vectors.items()} | {CONTENT: content.shape[1]})
    reports = build_index(
        folder,
        item_ids=item_ids,
        head_vectors=vectors,
        content=content,
        popularity_p=_aligned(popularity, "weight", item_ids),
        eligible=eligible,
        new=_aligned(popularity, "num_user_days", item_ids) < run.settings.retrieval.new_below_user_days,
        category_codes=codes,
        category_names=_category_names(paths, codes),
        tags=FilterColumn.rarest(features["tags"].to_pylist(), _MOST_TAGS),
        filters=filters,
        trends=np.load(model / "signals" / "trends.npy"),
        user_level=UserLevel.open(model / "signals"),
        scorer_file=model / "scorer.json",
        settings=run.settings.retrieval,
    )
    run.note("search: " + "; ".join(f"{name} {report}" for name, report in reports.items()))
    run.metrics |= {f"{name}_search_recall": report.recall for name, report in reports.items() if report.method == "ivf"}
    return folder


def _say_estimates(run: StageRun, num_items: int, dimensions: Mapping[str, int]) -> None:
    cores = os.cpu_count() or 1
    for name, dimension in dimensions.items():
        estimate = estimate_search(num_items, num_items, dimension, num_cores=cores, settings=run.settings.retrieval)
        run.night.display.say(f"  search of {name}, {estimate}")


def _filter_columns(run: StageRun, values: pa.ChunkedArray, paths: Sequence[Sequence[str] | None]) -> FilterColumns:
    """The mapped columns of all items, from maps as Arrow gives them: lists of (column, values)."""
    by_item = [dict(item or ()) for item in values.to_pylist()]
    columns = {name: [item.get(name) for item in by_item] for name in dict.fromkeys(run.settings.source.items.columns.filters)}
    filters = FilterColumns.encode(columns, coarsest=[path[0] if path else None for path in paths], as_of=run.run_date)
    for rule in run.settings.retrieval.filters:
        if bad := filters.not_days(rule):
            run.note(f"{len(bad)} values of column {rule.column} are no day YYYY-MM-DD, e.g. {bad[0]!r}: not released")
    return filters


def category_codes(paths: Sequence[Sequence[str] | None]) -> npt.NDArray[np.int32]:
    """Category paths to (N, L) codes: one per level for the whole path down to it, -1 where a path has ended."""
    depth = max((len(path) for path in paths if path), default=0)
    codes = np.full((len(paths), depth), -1, np.int32)
    seen: dict[tuple[str, ...], int] = {}
    for row, path in enumerate(paths):
        for level in range(len(path or ())):
            codes[row, level] = seen.setdefault(tuple(path[: level + 1]) if path else (), len(seen))
    return codes


def _category_names(paths: Sequence[Sequence[str] | None], codes: npt.NDArray[np.int32]) -> list[str]:
    """The name of each code: the last level of its path."""
    names = [""] * (int(codes.max(initial=-1)) + 1)
    for path, row in zip(paths, codes.tolist(), strict=True):
        for name, code in zip(path or (), row, strict=False):
            names[code] = name
    return names


def _rows(vectors: pa.ChunkedArray) -> Rows:
    """A column of lists of one length to (N, V)."""
    whole = vectors.combine_chunks()
    return np.asarray(whole.flatten().to_numpy(zero_copy_only=False), np.float32).reshape(len(whole), -1)


def _vectors(embeddings: pa.Table, head: str, item_ids: pa.Array) -> tuple[Rows, Rows]:
    mine = embeddings.filter(pc.equal(embeddings["head"].cast(pa.string()), head))
    order = pc.index_in(item_ids, mine["item_id"].combine_chunks().cast(pa.string()))
    return _rows(mine["trigger_vector"].take(order)), _rows(mine["target_vector"].take(order))


def distilled_vectors(run: StageRun, item_ids: pa.Array) -> tuple[Rows, Rows] | None:
    """(N, V) trigger and target vectors that the night's scorer was distilled into; None: the catalog is too large for that."""
    ref = TableRef(uri=run.night.lake.path(ITEM_EMBEDDINGS), version=run.version(ITEM_EMBEDDINGS))
    mine = read_table(ref, ("item_id", "head", "trigger_vector", "target_vector"), pc.field("head") == DISTILLED)
    return _vectors(mine, DISTILLED, item_ids) if mine.num_rows else None


def _aligned(table: pa.Table, column: str, item_ids: pa.Array) -> npt.NDArray[np.float32]:
    """(N,) values by item, 0 where the table has no row."""
    found = pc.index_in(item_ids, table["item_id"].combine_chunks().cast(pa.string()))
    return np.asarray(pc.fill_null(table[column].combine_chunks().take(found), 0.0).to_numpy(zero_copy_only=False), np.float32)


def list_tasks(run: StageRun, index: Path) -> tuple[DataFrame, MakeLists]:
    """Triggers with their counted pairs, a partition a range of items, and what makes their lists in Spark tasks that map one index."""
    triggers = run.read(ITEM_FEATURES).where("in_catalog").select("item_index")
    num_items = run.read(ITEM_FEATURES).count()
    num_tasks = max(2, -(-num_items // _TRIGGERS_PER_TASK))
    blocks = (
        triggers.join(_counted(run).withColumnRenamed("trigger_index", "item_index"), "item_index", how="left")
        .repartitionById(num_tasks, F.floor(F.col("item_index").cast("bigint") * num_tasks / num_items).cast("int"))
        .sortWithinPartitions("item_index")
    )
    policies = [row.asDict() for row in run.read(MERGE_POLICY).collect()]
    read_policies(policies)  # a bad row is reported here, not by a task
    keep = str(new_candidates(run)) if run.settings.retrieval.keep_candidates else None
    search = partial(search_batches, index=str(index), policies=policies, settings=run.settings.retrieval, keep=keep)
    return blocks, search


def new_candidates(run: StageRun) -> Path:
    """The folder of this night's kept candidates, emptied."""
    folder = run.night.artifacts(CANDIDATES)
    shutil.rmtree(folder)
    return run.night.artifacts(CANDIDATES)


def drop_candidates(lake: LakeSettings, *, keep: str) -> None:
    """Remove the kept candidates of all nights but one: those of nights that are not current are never merged again."""
    for folder in shared_folder(lake).glob(f"_artifacts/*/{CANDIDATES}"):
        if folder.parent.name != keep:
            shutil.rmtree(folder)


def possible_lengths(run: StageRun, item_ids: Sequence[str]) -> list[int]:
    """How many neighbors the merged lists of some items could hold: all eligible items but those that the rules refuse."""
    retriever = Retriever.open(run.night.artifacts("index"))
    rules, eligible = retriever.rules(run.settings.retrieval), np.flatnonzero(retriever.eligible).astype(np.int32)
    triggers = pc.index_in(pa.array(item_ids), retriever.item_ids).to_pylist()
    return [rules.num_possible(MERGED, trigger, eligible) for trigger in triggers]


def counted_of(run: StageRun, triggers: npt.NDArray[np.int32]) -> Counted:
    """The counted pairs of some (B,) trigger indices, in their order."""
    wanted = run.night.spark.createDataFrame([(item, row) for row, item in enumerate(triggers.tolist())], "trigger_index int, row int")
    rows = F.broadcast(wanted).join(_counted(run), "trigger_index", how="left").orderBy("row")
    table = rows.select("target", "weight", "num_user_days").toArrow().combine_chunks()
    return _counted_block(pa.RecordBatch.from_struct_array(table.to_struct_array().combine_chunks()))


def _counted(run: StageRun) -> DataFrame:
    """trigger_index and parallel arrays target, weight (decayed to the run date) and num_user_days of its pairs."""
    pairs, indices = run.read(CO_ENGAGEMENT_PAIRS), run.read(ITEM_FEATURES).select("item_id", "item_index")
    trigger = F.broadcast(indices.select(F.col("item_id").alias("trigger_item_id"), F.col("item_index").alias("trigger_index")))
    target = F.broadcast(indices.select(F.col("item_id").alias("target_item_id"), F.col("item_index").alias("target_index")))
    age = F.datediff(F.lit(run.run_date), "landmark_date").cast("double")
    decayed = (F.col("weight") * F.pow(F.lit(2.0), -age / F.lit(run.settings.pairs.half_life_days))).cast("float")
    pair = F.struct(F.col("target_index").alias("target"), decayed.alias("weight"), "num_user_days")
    grouped = (
        pairs.join(trigger, "trigger_item_id", how="inner")
        .join(target, "target_item_id", how="inner")
        .groupBy("trigger_index")
        .agg(F.array_sort(F.collect_list(pair)).alias("pairs"))
    )
    return grouped.select("trigger_index", *(F.col(f"pairs.{name}").alias(name) for name in ("target", "weight", "num_user_days")))


def search_batches(
    batches: Iterator[pa.RecordBatch], *, index: str, policies: Sequence[Mapping[str, Any]], settings: RetrievalSettings, keep: str | None
) -> Iterator[pa.RecordBatch]:
    """Batches of triggers to batches of lists, what they were merged from kept in a folder; runs inside a Spark task."""
    retriever = Retriever.open(Path(index))
    by_scope = read_policies(policies)
    for batch in batches:
        for start in range(0, batch.num_rows, settings.block_size):
            block = batch.slice(start, settings.block_size)
            trigger = block.column("item_index").to_numpy().astype(np.int32)
            policies_of = retriever.policies_for(by_scope, trigger)
            lists = retriever.retrieve(trigger, _counted_block(block), policies_of, settings=settings, keep=keep is not None)
            reach("publish_neighbors.search")
            for candidates in lists.kept:
                candidates.save(Path(keep or ""))
            yield retriever.to_arrow(lists)


def _counted_block(block: pa.RecordBatch) -> Counted:
    lengths = pc.fill_null(pc.list_value_length(block.column("target")), 0).to_numpy(zero_copy_only=False)
    flat = {name: block.column(name).flatten().to_numpy(zero_copy_only=False) for name in ("target", "weight", "num_user_days")}
    return Counted(
        indptr=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        target=flat["target"].astype(np.int32),
        weight=flat["weight"].astype(np.float32),
        num_user_days=flat["num_user_days"].astype(np.int64),
    )
