"""What filters and limits refuse, counted by Spark over finished lists: nothing of the code that made the lists is used here.

A filter speaks of the values in `item_features.filter_values` as they were known at the run date.
"""

from collections.abc import Sequence
from datetime import date
from functools import reduce

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from conf.settings import FilterSettings, LimitSettings

_HEAD_COLUMNS = ("item_id", "head", "neighbor_id")


def refused_neighbors(
    neighbors: DataFrame, features: DataFrame, *, filters: Sequence[FilterSettings], names: Sequence[str], run_date: date
) -> DataFrame:
    """Neighbors that a filter of their list refuses.

    Args:
        neighbors: item_id, head and neighbor_id, a row a neighbor.
        features: item_features.
        filters: of the settings.
        names: all lists.
        run_date: the night.

    Returns:
        The refused rows of `neighbors`.
    """
    coarsest = F.get("categories", F.lit(0)).alias("coarsest")
    mine = F.broadcast(features.select("item_id", F.col("filter_values").alias("mine"), coarsest))
    theirs = F.broadcast(features.select(F.col("item_id").alias("neighbor_id"), F.col("filter_values").alias("theirs")))
    rows = neighbors.join(mine, "item_id", how="left").join(theirs, "neighbor_id", how="left")
    refused = reduce(Column.__or__, (_refuses(rule, names, run_date) for rule in filters), F.lit(False))
    return rows.where(refused).select(*_HEAD_COLUMNS)


def excess_neighbors(neighbors: DataFrame, features: DataFrame, *, limits: Sequence[LimitSettings], names: Sequence[str]) -> DataFrame:
    """Lists that hold more of a kind than a limit allows: item_id, head, kind and how many; arguments as above."""
    counts = []
    for limit in limits:
        value = F.get(F.try_element_at("filter_values", F.lit(limit.by)), F.lit(0))
        path = F.nullif(F.array_join("categories", "\x1f"), F.lit(""))
        kind = (path if limit.by == "category" else value).alias("kind")
        kinds = F.broadcast(features.select(F.col("item_id").alias("neighbor_id"), kind).where(kind.isNotNull()))
        ruled = neighbors.where(F.col("head").isin(list(limit.heads or names))).join(kinds, "neighbor_id", how="inner")
        counts.append(ruled.groupBy("item_id", "head", "kind").count().where(F.col("count") > limit.at_most))
    return reduce(DataFrame.unionByName, counts)


def _refuses(rule: FilterSettings, names: Sequence[str], run_date: date) -> Column:
    in_scope = reduce(Column.__or__, map(_in_scope, rule.scopes)) if rule.scopes else F.lit(True)
    rules_it = F.col("head").isin(list(rule.heads or names)) & F.coalesce(in_scope, F.lit(False))
    return rules_it & ~_passes(rule, run_date)


def _in_scope(scope: str) -> Column:
    column, equals, value = scope.partition("=")
    return F.array_contains(_values("mine", column), value) if equals else F.col("coarsest") == scope


def _passes(rule: FilterSettings, run_date: date) -> Column:
    mine, theirs = _values("mine", rule.column), _values("theirs", rule.column)
    wanted = F.array(*(F.lit(value) for value in rule.values)).cast("array<string>")
    passes = {
        "any_of": F.arrays_overlap(theirs, wanted),
        "none_of": ~F.arrays_overlap(theirs, wanted),
        "released": F.exists(theirs, lambda value: F.coalesce(_day(value) <= F.lit(run_date), F.lit(False))),
        "shared": F.arrays_overlap(mine, theirs),
        "different": ~F.arrays_overlap(mine, theirs),
    }[rule.rule]
    unknown = F.size(theirs) == 0
    if rule.rule == "different":
        return passes
    return F.when(unknown | (F.size(mine) == 0) if rule.rule == "shared" else unknown, F.lit(rule.missing)).otherwise(passes)


def _day(value: Column) -> Column:
    return F.substring(value, 1, 10).try_cast("date")


def _values(side: str, column: str) -> Column:
    return F.coalesce(F.try_element_at(side, F.lit(column)), F.array().cast("array<string>"))
