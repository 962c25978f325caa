"""What was offered beside an item and not taken: impressions become counts of exposures, which teach heads what co-engagement cannot.

A pair that nobody engaged may be bad, or may never have been seen. An impression says which: user u saw item j beside trigger i. It is
taken if u engages j within `engaged_within_seconds` after it, else ignored. A user counts once per pair and day, as in co-engagement, and
a day is ignored only if none of its impressions was taken.

An impression counts from the first run date by whose end its time is over: the last evening's are not known to be ignored yet.
"""

from datetime import date, datetime, timedelta

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from conf.settings import ImpressionSource
from conf.tables import EXPOSURE_PAIRS, IMPRESSIONS
from features.pairs import decay
from features.sources import check_columns, id_column, id_faults, read_columns, reasons, source_row, start_of, time_column, time_faults

_SETTING = "source.impressions.columns"
_MICROS = 1_000_000


def check_impressions(frame: DataFrame, *, source: ImpressionSource, run_date: date, now: datetime) -> DataFrame:
    """Every impression of the kept days up to the run date, and what is wrong with it.

    Returns:
        The columns of impressions, `reason` (null: accepted) and `row` (JSON of the mapped values, without the user).

    Raises:
        SourceError: a mapped column is missing or of an unusable type.
    """
    columns = source.columns
    mapped = columns.model_dump()
    check_columns(frame, wanted={f"{_SETTING}.{name}": column for name, column in mapped.items()}, table=f"impressions ({source.path})")
    ids = ("user_id", "trigger_item_id", "item_id")
    read = {name: id_column(frame, mapped[name], setting=f"{_SETTING}.{name}") for name in ids}
    read["shown_at"] = time_column(frame, columns.shown_at, setting=f"{_SETTING}.shown_at", time_format=source.time_format)
    read["row"] = source_row([mapped[name] for name in (*ids[1:], "shown_at")])
    judged = read_columns(frame, read).withColumn("reason", reasons(_faults(now)))
    first, end = start_of(run_date - timedelta(days=source.days - 1)), start_of(run_date + timedelta(days=1))
    here = F.col("shown_at").isNull() | ((F.col("shown_at") >= F.lit(first)) & (F.col("shown_at") < F.lit(end)))
    return judged.where(here).withColumn("event_date", F.to_date("shown_at")).select(*IMPRESSIONS.column_names, "reason", "row")


def _faults(now: datetime) -> list[tuple[Column, str]]:
    ids = [fault for name in ("user_id", "trigger_item_id", "item_id") for fault in id_faults(name)]
    own = (F.col("trigger_item_id") == F.col("item_id"), "item_id is the trigger itself")
    return [*ids, own, *time_faults(F.col("shown_at"), "shown_at", now=now)]


def count_exposures(
    impressions: DataFrame, engagements: DataFrame, *, source: ImpressionSource, half_life_days: float, min_users: int, run_date: date
) -> DataFrame:
    """Rows of exposure_pairs as of the run date.

    Args:
        impressions: accepted ones.
        engagements: at least those of the impressions' days and of the time to take them.
        source: how long an impression may be taken.
        half_life_days: days after which an ignored exposure counts half.
        min_users: the privacy minimum of distinct users per pair.
        run_date: the night.
    """
    seconds = source.engaged_within_seconds
    over = F.unix_micros("shown_at") + F.lit(seconds * _MICROS) < F.unix_micros(F.lit(start_of(run_date + timedelta(days=1))))
    taken = engagements.select("user_id", "item_id", F.unix_micros("engaged_at").alias("taken_at")).distinct()
    shown = impressions.where(over).withColumn("at", F.unix_micros("shown_at"))
    in_time = F.col("taken_at").between(F.col("at"), F.col("at") + F.lit(seconds * _MICROS))
    both = shown.join(taken, on=["user_id", "item_id"], how="left").withColumn("taken", F.coalesce(in_time, F.lit(False)))
    days = both.groupBy("user_id", "trigger_item_id", "item_id", "event_date").agg(F.bool_or("taken").alias("taken"))
    decayed = decay(F.col("event_date"), run_date, half_life_days)
    pairs = days.groupBy("trigger_item_id", F.col("item_id").alias("target_item_id")).agg(
        F.count(F.lit(1)).alias("num_shown"),
        F.count_if(~F.col("taken")).alias("num_ignored"),
        F.sum(F.when(~F.col("taken"), decayed).otherwise(0.0)).alias("weight"),
        F.count_distinct("user_id").alias("num_users"),
    )
    return pairs.where(F.col("num_users") >= min_users).withColumn("as_of", F.lit(run_date)).select(*EXPOSURE_PAIRS.column_names)
