"""Sizes that no user and no basket has, through the code that counts real ones: nothing grows with their square."""

from datetime import date, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from conf.settings import WindowSettings
from features.pairs import Counting, all_items, count_daily_pairs, measure_days
from tests.features.test_pairs import event_files

FIRST, NUM_DAYS, CAP = date(2024, 3, 1), 30, 50
SESSION = WindowSettings(kind="session", symmetric=True)
HOUR = WindowSettings(kind="time", window_seconds=3600)
PAIRS = CAP * (CAP - 1) // 2  # of a symmetric window: each pair once
TEXT = "string"


def _events(spark: SparkSession, num: int, *, user: Column, item: Column, session: Column, second: Column) -> DataFrame:
    """`num` engagements from columns over `id`, spread over NUM_DAYS by `second`."""
    at = F.timestamp_seconds(F.unix_timestamp(F.lit(FIRST)) + second)
    named = {"user_id": user.cast(TEXT), "item_id": item.cast(TEXT), "session_id": session.cast(TEXT), "engaged_at": at}
    return (
        spark.range(num).select(*(column.alias(name) for name, column in named.items())).withColumn("event_date", F.to_date("engaged_at"))
    )


def _counted(events: DataFrame, window: WindowSettings, *, min_users: int = 1) -> tuple[dict[str, Any], int]:
    """Rows of co_engagement_daily in sum, and how many items the caps cut."""
    days = {FIRST + timedelta(days=number): 1 for number in range(NUM_DAYS)}
    counting = Counting(window=window, max_items_per_user_day=CAP, max_triggers_per_target=CAP, min_users=min_users, hash_key=b"key")
    daily = events.transform(count_daily_pairs(counting, days=days))
    row = daily.agg(F.count(F.lit(1)).alias("rows"), F.max("num_users").alias("most"), F.count_distinct("event_date").alias("days")).first()
    assert row is not None
    with TemporaryDirectory() as folder:
        files = event_files(events, Path(folder, "events"))
        cut = measure_days(events.sparkSession, files, counting, days=days, items=all_items(events)).agg(F.sum("num_cut_items")).first()
    return row.asDict(), int((cut and cut[0]) or 0)


def test_a_million_events_of_one_user(spark: SparkSession) -> None:
    number = F.col("id")
    spread = (number * NUM_DAYS * 86_400 / 1_000_000).cast("bigint")
    events = _events(spark, 1_000_000, user=F.lit("one"), item=number % 20_011, session=F.floor(spread / 86_400), second=spread)
    found, cut = _counted(events, SESSION)
    assert found == {"rows": NUM_DAYS * PAIRS, "most": 1, "days": NUM_DAYS}
    assert cut == NUM_DAYS * (20_011 - CAP)
    in_time, _ = _counted(events, HOUR)
    assert 0 < in_time["rows"] <= 2 * NUM_DAYS * PAIRS


def test_a_session_of_fifty_thousand_items(spark: SparkSession) -> None:
    number = F.col("id")
    events = _events(spark, 50_000, user=F.lit("one"), item=number, session=F.lit("s"), second=number % 3600)
    assert _counted(events, SESSION) == ({"rows": PAIRS, "most": 1, "days": 1}, 50_000 - CAP)


def test_one_item_in_every_session(spark: SparkSession) -> None:
    """20,000 users, each with the one item and one of their own."""
    number = F.col("id")
    user = F.floor(number / 2)
    item = F.when(number % 2 == 0, F.lit("everywhere")).otherwise(F.concat(F.lit("own "), user.cast(TEXT)))
    events = _events(spark, 40_000, user=user, item=item, session=user, second=F.lit(0))
    found, cut = _counted(events, SESSION)
    assert (found["rows"], found["most"], cut) == (20_000, 1, 0)


def test_events_that_are_all_equal_and_a_single_item_make_no_pair(spark: SparkSession) -> None:
    number = F.col("id")
    equal = _events(spark, 100_000, user=F.lit("one"), item=F.lit("it"), session=F.lit("s"), second=F.lit(0))
    single = _events(spark, 100_000, user=number % 100, item=F.lit("it"), session=number % 100, second=number % 3600)
    for events in (equal, single):
        assert _counted(events, SESSION, min_users=2) == ({"rows": 0, "most": None, "days": 0}, 0)
