"""`item_features`: one row per item that the catalog holds at the run date or that was engaged with up to it.

As of run date D. An item first engaged on 2026-03-01 and annotated from 2026-02-27 on is 3 days old on run date 2026-03-02.
"""

from collections.abc import Sequence
from datetime import date

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from conf.tables import ITEM_FEATURES
from features.content import vector_length, withhold


def assemble_features(
    annotations_at: DataFrame, vectors: DataFrame, popularity: DataFrame, *, run_date: date, judge_fields: Sequence[str] = ()
) -> DataFrame:
    """Join knowledge, vectors and counts, and number the items.

    Args:
        annotations_at: `store.annotations_at`: one row per item, nulls where it is not known.
        vectors: `content.content_vectors`.
        popularity: item_popularity as of the run date.
        run_date: the night.
        judge_fields: annotation columns withheld; they are null in the result.

    Returns:
        The columns of item_features. `item_index` counts 0, 1, … in ascending order of item_id. An item unknown to the catalog has a
        zero vector and is neither in the catalog nor eligible.
    """
    counted = popularity.select("item_id", F.col("num_user_days").alias("_user_days"), "first_engaged_date")
    joined = annotations_at.join(counted, on="item_id", how="full").withColumn("in_catalog", _in_catalog())
    items = joined.where(F.col("in_catalog") | F.col("_user_days").isNotNull())
    visible = withhold(items, judge_fields)
    numbered = visible.join(_indexes(items), on="item_id", how="inner").join(vectors, on="item_id", how="left")
    zeros = F.array_repeat(F.lit(0.0).cast("float"), vector_length(vectors))
    derived = {
        "content_vector": F.coalesce(F.when(F.col("in_catalog"), F.col("content_vector")), zeros),
        "eligible": F.col("in_catalog") & F.coalesce("eligible", F.lit(False)),
        "age_days": _age_days(run_date),
        "num_user_days": F.coalesce("_user_days", F.lit(0).cast("bigint")),
        "as_of": F.lit(run_date),
    }
    return numbered.withColumns(derived).select(*ITEM_FEATURES.column_names)


def _in_catalog() -> Column:
    """Known by then and not gone: `deleted` is null for an item without annotation."""
    return F.coalesce(~F.col("deleted"), F.lit(False))


def _indexes(items: DataFrame) -> DataFrame:
    """item_id and its position from 0. The ids alone pass through one task: a million of them are some 20 MB."""
    in_order = Window.orderBy("item_id")
    return items.select("item_id").withColumn("item_index", (F.row_number().over(in_order) - 1).cast("int"))


def _age_days(run_date: date) -> Column:
    earliest = F.least(F.col("first_engaged_date"), F.col("first_event_timestamp").cast("date"))  # nulls are skipped
    return F.coalesce(F.greatest(F.date_diff(F.lit(run_date), earliest), F.lit(0)), F.lit(0)).cast("int")
