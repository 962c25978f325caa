"""Stage 3: annotations, fetched through Feast as they were known at the run date, become `item_features` and `relevance_examples`.

Feast is asked once per night for one row per distinct item at D+1 00:00 UTC minus a microsecond; every join per pair is native.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, time, timedelta

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from conf.tables import (
    CO_ENGAGEMENT_PAIRS,
    ITEM_ANNOTATIONS,
    ITEM_FEATURES,
    ITEM_POPULARITY,
    PAIR_RELEVANCE,
    RELEVANCE_EXAMPLES,
)
from features import assembly, content, examples, store
from jobs.lake import in_memory, only_row
from jobs.online import open_feature_store
from jobs.stage import StageRun, stage_main

STAGE = "build_features"


def build_features(run: StageRun) -> None:
    """Fetch, fit the content vector, assemble, mine examples, gate."""
    popularity = run.read(ITEM_POPULARITY)
    judged = run.settings.features.judge_fields
    with in_memory(_annotations(run, popularity)) as known:
        vectors = content.content_vectors(known, settings=run.settings.features)
        run.replace(ITEM_FEATURES, assembly.assemble_features(known, vectors, popularity, run_date=run.run_date, judge_fields=judged))
    mined = examples.mine_examples(
        run.read_output(ITEM_FEATURES),
        run.read(CO_ENGAGEMENT_PAIRS),
        run.read(PAIR_RELEVANCE),
        settings=run.settings.features,
        run_date=run.run_date,
    )
    run.replace(RELEVANCE_EXAMPLES, mined)
    run.gate(_feature_metrics(run) | _example_metrics(run))


def _annotations(run: StageRun, popularity: DataFrame) -> DataFrame:
    annotations = run.read(ITEM_ANNOTATIONS)
    items = annotations.select("item_id").union(popularity.select("item_id")).distinct()
    as_of = datetime.combine(run.run_date + timedelta(days=1), time(), UTC) - timedelta(microseconds=1)
    feature_store = open_feature_store(run.night.settings)
    return store.annotations_at(run.night.spark, feature_store, annotations=annotations, item_ids=items, as_of=as_of)


def _feature_metrics(run: StageRun) -> dict[str, float]:
    vector = F.col("content_vector")
    features = run.read_output(ITEM_FEATURES)
    row = only_row(
        features.agg(
            F.count("*").alias("num_items"),
            F.count_if("in_catalog").alias("num_catalog_items"),
            F.avg(F.exists(vector, lambda x: x != 0).cast("double")).alias("content_share"),
            F.count_if(F.exists(vector, lambda x: x.isNull() | F.isnan(x))).alias("num_nonfinite"),
        )
    )
    duplicates = row["num_items"] - features.select("item_id").distinct().count()
    return row | {"num_duplicate_keys": duplicates}


def _example_metrics(run: StageRun) -> dict[str, float]:
    written = run.read_output(RELEVANCE_EXAMPLES)
    row = only_row(
        written.agg(
            F.count("*").alias("num_examples"),
            F.coalesce(F.min("target"), F.lit(0.0)).alias("min_target"),
            F.coalesce(F.max("target"), F.lit(0.0)).alias("max_target"),
        )
    )
    return row | {"num_duplicate_examples": row["num_examples"] - written.select(*RELEVANCE_EXAMPLES.key).distinct().count()}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage alone."""
    stage_main(STAGE, build_features, description="annotations to features and relevance examples", argv=argv)


if __name__ == "__main__":
    main()
