"""Stage 5: every item's list per head, merged, with reasons: to history, through the gate, then to `item_neighbors` in one commit.

Spark tasks share one memory-mapped index; a row that enters a task is a trigger with its counted pairs, a row that leaves is one list.
A night older than the published one goes to history only, unless `--publish` asks for more.
"""

import json
from collections.abc import Callable, Sequence

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from conf.faults import reach
from conf.tables import (
    CO_ENGAGEMENT_PAIRS,
    CONTRACT_VERSION,
    ITEM_ANNOTATIONS,
    ITEM_EMBEDDINGS,
    ITEM_FEATURES,
    ITEM_NEIGHBORS,
    ITEM_NEIGHBORS_HISTORY,
    ITEM_POPULARITY,
    MERGE_POLICY,
)
from jobs.explorer import catalog
from jobs.explorer.night import index_titles
from jobs.lake import only_row
from jobs.publication import publish_run
from jobs.reader import changes_since
from jobs.retrieval import drop_candidates, index_items, possible_lengths, retrieved_lists
from jobs.stage import StageRun, stage_main
from validation.eligibility import excess_neighbors, refused_neighbors

STAGE = "publish_neighbors"
_IDS = "neighbors.neighbor_id"  # named so, Spark reads this field alone; through a lambda it would read the reasons of all neighbors, too
_MAX_SHORT_LISTS = 2_000
"""Short lists whose possible length is counted."""
_MAX_TRIGGERS = 2_000
"""Triggers whose strongest counted partners are looked for in their lists, and how many of them."""
_NUM_PARTNERS = 10


def publish_neighbors(run: StageRun) -> None:
    """Index, retrieve, write history, gate, publish."""
    run.night.lake.create(ITEM_NEIGHBORS)
    expected = run.night.lake.version(ITEM_NEIGHBORS)
    _start_policy(run)
    version = only_row(run.read(ITEM_EMBEDDINGS).agg(F.max("model_version").alias("version")))["version"]
    index = index_items(run)
    reach("publish_neighbors.index.written")
    publish_lists(run, retrieved_lists(run, index), model_version=version, expected=expected)


def publish_lists(run: StageRun, lists: DataFrame, *, model_version: str, expected: int) -> None:
    """History, gate, commit.

    Args:
        run: of this stage.
        lists: item_id, head, neighbors, list_hash; a partition holds all lists of its items.
        model_version: behind the scores.
        expected: version of item_neighbors seen before anything was read.
    """
    lake = run.night.lake
    lists = lists.transform(_with_identity(run, model_version))
    with run.timed("history"):
        run.replace(ITEM_NEIGHBORS_HISTORY, lists, where=_this_run(run))
    with run.timed("gate"):
        run.gate(_metrics(run, expected), list_length=run.settings.retrieval.list_length)
    reach("publish_neighbors.gated")
    with run.timed("titles"):
        _index_titles(run)
    with run.timed("commit"):
        _publish(run, expected)
    lake.delete_where(ITEM_NEIGHBORS_HISTORY, f"run_date < date_sub('{run.run_date}', {run.settings.lake.keep_nights})")


def _index_titles(run: StageRun) -> None:
    """What the explorer finds items by, beside the night's other files."""
    versions = {table.name: run.version(table) for table in (ITEM_ANNOTATIONS, ITEM_FEATURES, ITEM_POPULARITY)}
    path = run.night.artifacts("explorer") / catalog.FILE
    image = run.settings.explorer.image_attribute
    index_titles(run.night.lake.root, versions, path, run_date=run.run_date, image_attribute=image)


def _start_policy(run: StageRun) -> None:
    """Write the settings' policies once; from then on the table rules."""
    lake = run.night.lake
    if not lake.exists(MERGE_POLICY) or lake.read(MERGE_POLICY).isEmpty():  # empty: a night was killed between its creation and this
        rows = [(policy.scope, policy.kind, policy.value, policy.popularity_exponent) for policy in run.settings.merge]
        run.replace(MERGE_POLICY, run.night.spark.createDataFrame(rows, MERGE_POLICY.ddl))


def _this_run(run: StageRun) -> str:
    return f"run_date = '{run.run_date}' AND run_id = '{run.night.run_id}'"


def _with_identity(run: StageRun, model_version: str) -> Callable[[DataFrame], DataFrame]:
    def transform(lists: DataFrame) -> DataFrame:
        return lists.select(
            F.lit(run.run_date).alias("run_date"),
            F.lit(run.night.run_id).alias("run_id"),
            "item_id",
            "head",
            "neighbors",
            F.lit(model_version).alias("model_version"),
            "list_hash",
            F.lit(CONTRACT_VERSION).alias("contract_version"),
        )

    return transform


def _metrics(run: StageRun, expected: int) -> dict[str, float]:
    """Numbers of the lists just written to history; the published table, if any, is what churn is against."""
    lists = run.read_output(ITEM_NEIGHBORS_HISTORY).where(_this_run(run))
    ids, scores, merged = F.col(_IDS), F.col("neighbors.score"), F.col("head") == "merged"
    rising = ~scores.eqNullSafe(F.sort_array(scores, asc=False))
    row = only_row(
        lists.agg(
            F.count_if(merged & (F.size(ids) > 0)).alias("num_items"),
            F.count_if(F.array_contains(ids, F.col("item_id"))).alias("num_self_neighbors"),
            F.count_if(F.size(F.array_distinct(ids)) < F.size(ids)).alias("num_duplicate_neighbors"),
            F.count_if(~merged & rising).alias("num_unordered"),
            F.sum(F.size(F.filter(scores, _not_finite))).alias("num_nonfinite"),
            (F.count(F.lit(1)) - F.count_distinct("item_id", "head")).alias("num_duplicate_keys"),
        )
    )
    catalog = run.read(ITEM_FEATURES).where("in_catalog").count()
    measured = {name: float(value or 0) for name, value in row.items()}
    measured |= {"coverage": row["num_items"] / max(1, catalog), "fullness": _fullness(run, lists.where(merged))}
    measured |= _refused(run, lists) | _counted_share(run, lists)
    return measured | _churn(run, lists.where(merged), expected)


def _not_finite(score: Column) -> Column:
    return score.isNull() | F.isnan(score) | (F.abs(score) == float("inf"))


def _counted_share(run: StageRun, lists: DataFrame) -> dict[str, float]:
    """Mean share of a trigger's strongest counted partners, of those that may be offered, that any of its lists holds; of a sample."""
    features, settings = run.read(ITEM_FEATURES), run.settings.retrieval
    triggers = lists.select("item_id").distinct().orderBy(F.xxhash64("item_id")).limit(_MAX_TRIGGERS)
    counted = run.read(CO_ENGAGEMENT_PAIRS).withColumnsRenamed({"trigger_item_id": "item_id", "target_item_id": "neighbor_id"})
    partners = counted.select("item_id", "neighbor_id", "weight", F.lit("merged").alias("head")).join(F.broadcast(triggers), "item_id")
    partners = partners.join(features.where("eligible").select(F.col("item_id").alias("neighbor_id")), "neighbor_id", how="left_semi")
    if settings.filters:
        rows = partners.select("item_id", "head", "neighbor_id")
        refused = refused_neighbors(rows, features, filters=settings.filters, names=run.settings.list_names, run_date=run.run_date)
        partners = partners.join(refused, ["item_id", "neighbor_id"], how="left_anti")
    strongest = Window.partitionBy("item_id").orderBy(F.col("weight").desc(), "neighbor_id")
    ranked = partners.withColumn("_rank", F.row_number().over(strongest)).where(F.col("_rank") <= _NUM_PARTNERS)
    ids = F.explode(_IDS).alias("neighbor_id")
    offered = lists.join(F.broadcast(triggers), "item_id").select("item_id", ids).distinct().withColumn("offered", F.lit(1.0))
    found = ranked.join(offered, ["item_id", "neighbor_id"], how="left").groupBy("item_id").agg(F.avg(F.coalesce("offered", F.lit(0.0))))
    share = only_row(found.toDF("item_id", "share").agg(F.avg("share").alias("share")))["share"]
    return {} if share is None else {"counted_share": share}


def _fullness(run: StageRun, merged: DataFrame) -> float:
    """Mean length of merged lists as a share of the possible length; of short ones that filters and limits leave, of a sample."""
    length = run.settings.retrieval.list_length
    sizes = merged.select("item_id", F.size(_IDS).alias("size"))
    counted = only_row(sizes.agg(F.count("*").alias("all"), F.count_if(F.col("size") < length).alias("short")))
    sample = sizes.where(F.col("size") < length).orderBy(F.xxhash64("item_id")).limit(_MAX_SHORT_LISTS).collect()
    if not sample:
        return 1.0
    possible = possible_lengths(run, [row["item_id"] for row in sample])
    shares = [min(1.0, row["size"] / max(1, min(length, most))) if most else 1.0 for row, most in zip(sample, possible, strict=True)]
    return float(1.0 - counted["short"] / counted["all"] * (1.0 - sum(shares) / len(shares)))


def _refused(run: StageRun, lists: DataFrame) -> dict[str, float]:
    """Neighbors that may not be offered: by the catalog's eligibility, by a filter, beyond a limit."""
    features, settings, names = run.read(ITEM_FEATURES), run.settings.retrieval, run.settings.list_names
    offered = lists.select("item_id", "head", F.explode(_IDS).alias("neighbor_id"))
    allowed = features.where("eligible").select(F.col("item_id").alias("neighbor_id"))
    forbidden = offered.groupBy("neighbor_id").count().join(allowed, "neighbor_id", how="left_anti")
    refused = {"num_ineligible_neighbors": float(only_row(forbidden.agg(F.sum("count").alias("total")))["total"] or 0)}
    if settings.filters:
        rows = refused_neighbors(offered, features, filters=settings.filters, names=names, run_date=run.run_date)
        refused["num_refused_neighbors"] = float(rows.count())
    if settings.limits:
        refused["num_lists_over_limit"] = float(excess_neighbors(offered, features, limits=settings.limits, names=names).count())
    return refused


def _churn(run: StageRun, merged: DataFrame, expected: int) -> dict[str, float]:
    """1 - mean Jaccard@10 of the merged lists of items that both nights have."""
    first_ten = F.slice(_IDS, 1, 10)
    before = (
        run.night.lake.read(ITEM_NEIGHBORS, _published_before(run, expected))
        .where(F.col("head") == "merged")
        .select("item_id", first_ten.alias("before"))
    )
    both = merged.select("item_id", first_ten.alias("now")).join(before, "item_id", how="inner")
    shared = F.size(F.array_intersect("now", "before")) / F.greatest(F.size(F.array_union("now", "before")), F.lit(1))
    jaccard = only_row(both.agg(F.avg(F.when(F.size(F.array_union("now", "before")) == 0, 1.0).otherwise(shared)).alias("mean")))["mean"]
    return {} if jaccard is None else {"churn": 1.0 - jaccard}


def _published_before(run: StageRun, expected: int) -> int:
    """The version that churn is against: not this run's own, which an attempt that was killed behind its publication has left."""
    if run.night.ledger.last_success(run_id=run.night.run_id, stage=STAGE) is not None:
        return expected  # a night that was forced is compared with what it replaces
    for commit in reversed(changes_since(run.night.lake.root, ITEM_NEIGHBORS, 0)):
        if json.loads(commit.get("userMetadata") or "{}").get("run_id") != run.night.run_id:
            return min(expected, int(commit["version"]))
    return min(expected, 0)


def _publish(run: StageRun, expected: int) -> None:
    """One commit, fenced on the version seen at the start; an older night stays in history."""
    lake, night = run.night.lake, run.night
    current = only_row(lake.read(ITEM_NEIGHBORS, expected).agg(F.max("run_date").alias("date"), F.max("run_id").alias("run_id")))
    if current["date"] is not None and current["date"] > run.run_date and not night.publish:
        run.note(f"the lists of {current['date']} are published; this older night went to history only (--publish overrides)")
        return
    run.outputs[ITEM_NEIGHBORS.name] = publish_run(lake.root, night.run_id, expected=expected, inputs=run.inputs)
    reach("publish_neighbors.published")
    night.display.say(f"  published item_neighbors version {run.outputs[ITEM_NEIGHBORS.name]}")
    drop_candidates(run.settings.lake, keep=night.run_id)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage alone."""
    stage_main(STAGE, publish_neighbors, description="lists per head, merged, published", argv=argv)


if __name__ == "__main__":
    main()
