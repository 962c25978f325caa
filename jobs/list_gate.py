"""The numbers that a night's lists pass the gate by: of the files that were written, before any of them is published.

Ids and scores are a tenth of a list's bytes. Tasks read these columns alone, without Spark's rows; only what filters and limits
refuse is counted by Spark.
"""

import json
from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from conf.tables import CO_ENGAGEMENT_PAIRS, ITEM_FEATURES, ITEM_NEIGHBORS, ITEM_NEIGHBORS_HISTORY
from features.pair_files import open_uri
from jobs.lake import in_memory, only_row
from jobs.reader import known_changes
from jobs.retrieval import possible_lengths
from jobs.stage import StageRun
from validation.eligibility import excess_neighbors, refused_neighbors
from validation.lists import LIST_SCHEMA, ListRule, inspect_lists

_MAX_SHORT_LISTS = 2_000
"""Short lists whose possible length is counted."""
_MAX_TRIGGERS = 2_000
"""Triggers whose strongest counted partners are looked for in their lists, and how many of them."""
_NUM_PARTNERS = 10
_COLUMNS = ["item_id", "head", "neighbors.list.element.neighbor_id", "neighbors.list.element.score"]
_ROWS = 10_000  # lists that a task holds; each time the eligible ids are hashed anew
_MERGED = "head = 'merged'"


def list_metrics(run: StageRun, files: Sequence[str], expected: int) -> dict[str, float]:
    """Numbers of the lists in some files; churn is against what item_neighbors holds at a version.

    Args:
        run: of the stage that wrote them.
        files: names below the history's folder; they hold this run's lists and no others.
        expected: version of item_neighbors that the night saw at its start.
    """
    features, folder = run.read(ITEM_FEATURES), run.night.lake.path(ITEM_NEIGHBORS_HISTORY)
    catalog = features.where("in_catalog").select("item_id")
    sample = catalog.orderBy(F.xxhash64("item_id")).limit(_MAX_TRIGGERS).toArrow()["item_id"].combine_chunks()
    eligible = features.where("eligible").select("item_id").toArrow()["item_id"].combine_chunks()
    with in_memory(_inspected(run, [f"{folder}/{name}" for name in files], eligible=eligible, sample=sample)) as lists:
        row = only_row(
            lists.agg(
                F.count_if(F.expr(_MERGED) & (F.col("num_neighbors") > 0)).alias("num_items"),
                F.count_if("holds_itself").alias("num_self_neighbors"),
                F.count_if("repeats").alias("num_duplicate_neighbors"),
                F.count_if(~F.expr(_MERGED) & F.col("rises")).alias("num_unordered"),
                F.sum("num_nonfinite").alias("num_nonfinite"),
                F.sum("num_ineligible").alias("num_ineligible_neighbors"),
                (F.count(F.lit(1)) - F.count_distinct("item_id", "head")).alias("num_duplicate_keys"),
            )
        )
        measured = {name: float(value or 0) for name, value in row.items()}
        measured |= {"coverage": measured["num_items"] / max(1, catalog.count()), "fullness": _fullness(run, lists.where(_MERGED))}
        measured |= _refused(run) | _counted_share(run, lists.where("ids IS NOT NULL"), sample)
        return measured | _churn(run, lists.where(_MERGED), expected)


def _inspected(run: StageRun, uris: Sequence[str], *, eligible: pa.Array | None = None, sample: pa.Array | None = None) -> DataFrame:
    """LIST_SCHEMA of all lists in some files; without items that are eligible all neighbors are not."""
    nothing = pa.array([], pa.string())
    rule = run.night.spark.sparkContext.broadcast(
        ListRule(eligible=nothing if eligible is None else eligible, sample=nothing if sample is None else sample)
    )
    names = run.night.spark.createDataFrame([(number, uri) for number, uri in enumerate(uris)], "task int, uri string")
    dealt = names.repartitionById(max(1, len(uris)), F.col("task")).select("uri")
    return dealt.mapInArrow(lambda batches: inspect_files(batches, rule=rule.value), LIST_SCHEMA)


def inspect_files(batches: Iterable[pa.RecordBatch], *, rule: ListRule) -> Iterator[pa.RecordBatch]:
    """Rows of LIST_SCHEMA for all lists of some files; runs inside a Spark task.

    Args:
        batches: with a column `uri`, of Parquet files with the columns of item_neighbors.
        rule: what the lists are held against.
    """
    for batch in batches:
        for uri in batch["uri"].to_pylist():
            files, path = open_uri(uri)
            with files.open_input_file(path) as source:
                for rows in pq.ParquetFile(source).iter_batches(_ROWS, columns=_COLUMNS, use_threads=False):
                    yield inspect_lists(rows, rule=rule)


def _counted_share(run: StageRun, lists: DataFrame, sample: pa.Array) -> dict[str, float]:
    """Mean share of a trigger's strongest counted partners, of those that may be offered, that any of its lists holds; of a sample."""
    features, settings = run.read(ITEM_FEATURES), run.settings.retrieval
    triggers = run.night.spark.createDataFrame(pa.table({"item_id": sample}))
    counted = run.read(CO_ENGAGEMENT_PAIRS).withColumnsRenamed({"trigger_item_id": "item_id", "target_item_id": "neighbor_id"})
    partners = counted.select("item_id", "neighbor_id", "weight", F.lit("merged").alias("head")).join(F.broadcast(triggers), "item_id")
    partners = partners.join(features.where("eligible").select(F.col("item_id").alias("neighbor_id")), "neighbor_id", how="left_semi")
    if settings.filters:
        rows = partners.select("item_id", "head", "neighbor_id")
        refused = refused_neighbors(rows, features, filters=settings.filters, names=run.settings.list_names, run_date=run.run_date)
        partners = partners.join(refused, ["item_id", "neighbor_id"], how="left_anti")
    strongest = Window.partitionBy("item_id").orderBy(F.col("weight").desc(), "neighbor_id")
    ranked = partners.withColumn("_rank", F.row_number().over(strongest)).where(F.col("_rank") <= _NUM_PARTNERS)
    offered = lists.select("item_id", F.explode("ids").alias("neighbor_id")).distinct().withColumn("offered", F.lit(1.0))
    found = ranked.join(offered, ["item_id", "neighbor_id"], how="left").groupBy("item_id").agg(F.avg(F.coalesce("offered", F.lit(0.0))))
    share = only_row(found.toDF("item_id", "share").agg(F.avg("share").alias("share")))["share"]
    return {} if share is None else {"counted_share": share}


def _fullness(run: StageRun, merged: DataFrame) -> float:
    """Mean length of merged lists as a share of the possible length; of short ones that filters and limits leave, of a sample."""
    length = run.settings.retrieval.list_length
    size = F.col("num_neighbors")
    counted = only_row(merged.agg(F.count("*").alias("all"), F.count_if(size < length).alias("short")))
    sample = merged.where(size < length).select("item_id", size).orderBy(F.xxhash64("item_id")).limit(_MAX_SHORT_LISTS).collect()
    if not sample:
        return 1.0
    possible = possible_lengths(run, [row["item_id"] for row in sample])
    shares = [min(1.0, row[1] / max(1, min(length, most))) if most else 1.0 for row, most in zip(sample, possible, strict=True)]
    return float(1.0 - counted["short"] / counted["all"] * (1.0 - sum(shares) / len(shares)))


def _refused(run: StageRun) -> dict[str, float]:
    """Neighbors that a filter refuses, or that are beyond a limit."""
    features, settings, names = run.read(ITEM_FEATURES), run.settings.retrieval, run.settings.list_names
    if not settings.filters and not settings.limits:
        return {}
    lists = run.read_output(ITEM_NEIGHBORS_HISTORY).where(F.col("run_id") == F.lit(run.night.run_id))
    offered = lists.select("item_id", "head", F.explode("neighbors.neighbor_id").alias("neighbor_id"))  # reads this field alone
    refused = dict[str, float]()
    if settings.filters:
        rows = refused_neighbors(offered, features, filters=settings.filters, names=names, run_date=run.run_date)
        refused["num_refused_neighbors"] = float(rows.count())
    if settings.limits:
        refused["num_lists_over_limit"] = float(excess_neighbors(offered, features, limits=settings.limits, names=names).count())
    return refused


def _churn(run: StageRun, merged: DataFrame, expected: int) -> dict[str, float]:
    """1 - mean Jaccard@10 of the merged lists of items that both nights have."""
    files = run.night.lake.file_sizes(ITEM_NEIGHBORS, _published_before(run, expected))
    if not files:
        return {}
    before = _inspected(run, list(files)).where(_MERGED).select("item_id", F.col("first").alias("before"))
    both = merged.select("item_id", F.col("first").alias("now")).join(before, "item_id", how="inner")
    shared = F.size(F.array_intersect("now", "before")) / F.greatest(F.size(F.array_union("now", "before")), F.lit(1))
    jaccard = only_row(both.agg(F.avg(F.when(F.size(F.array_union("now", "before")) == 0, 1.0).otherwise(shared)).alias("mean")))["mean"]
    return {} if jaccard is None else {"churn": 1.0 - jaccard}


def _published_before(run: StageRun, expected: int) -> int:
    """The version that churn is against: not this run's own, which an attempt that was killed behind its publication has left."""
    if run.night.ledger.last_success(run_id=run.night.run_id, stage=run.stage) is not None:
        return expected  # a night that was forced is compared with what it replaces
    for commit in reversed(known_changes(run.night.lake.root, ITEM_NEIGHBORS)):
        if json.loads(commit.get("userMetadata") or "{}").get("run_id") != run.night.run_id:
            return min(expected, int(commit["version"]))
    return min(expected, 0)
