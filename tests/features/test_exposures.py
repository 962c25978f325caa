"""Impressions: which rows are taken, and what counts as shown and ignored, against DuckDB."""

import random
from datetime import UTC, date, datetime, timedelta

import duckdb
import pandas as pd
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from conf.errors import SourceError
from conf.settings import ImpressionColumns, ImpressionSource
from conf.tables import EXPOSURE_PAIRS, IMPRESSIONS
from features.exposures import check_impressions, count_exposures
from tests.features.test_pairs import FIRST, LAST, to_spark, world

SOURCE = ImpressionSource(path="somewhere", columns=ImpressionColumns(user_id="who", item_id="offer"), engaged_within_seconds=7200, days=5)
NOW = datetime(2024, 6, 1, tzinfo=UTC)


def offers(seed: int, *, num: int = 900) -> pd.DataFrame:
    """Offers on half hours, as in the world of engagements, so that many are taken and many are ignored."""
    rng = random.Random(seed)
    rows = []
    for _ in range(num):
        trigger, offer = rng.sample(range(9), 2)
        at = datetime(2024, 2, 29, 12, tzinfo=UTC) + timedelta(minutes=30 * rng.randrange(12 + 6 * 48))
        rows.append((f"u{rng.randrange(6)}", f"i{trigger}", f"i{offer}", at))
    return pd.DataFrame(rows, columns=["who", "trigger_item_id", "offer", "shown_at"])


def checked(spark: SparkSession, frame: pd.DataFrame, *, run_date: date = LAST) -> DataFrame:
    return check_impressions(spark.createDataFrame(frame), source=SOURCE, run_date=run_date, now=NOW)


def test_shown_and_ignored_equal_duckdb(spark: SparkSession) -> None:
    events, shown = world(seed=3, num_events=700), offers(1)
    impressions = checked(spark, shown).where("reason IS NULL").select(*IMPRESSIONS.column_names).distinct()
    rule = {"source": SOURCE, "half_life_days": 3.0, "min_users": 3, "run_date": LAST}
    found = count_exposures(impressions, to_spark(spark, events), **rule)
    assert found.columns == list(EXPOSURE_PAIRS.column_names)
    connection = duckdb.connect()
    connection.execute("set TimeZone = 'UTC'")
    connection.register("raw", shown.assign(shown_at=shown.shown_at.dt.tz_localize(None)))
    connection.register("events", events)
    first = LAST - timedelta(days=4)
    expected = connection.execute(f"""
        with s as (select distinct who, trigger_item_id i, offer j, shown_at t from raw
            where t >= '{first}' and t + interval 7200 second < '{LAST + timedelta(days=1)}'),
        f as (select *, exists (select 1 from events e where e.user_id = who and e.item_id = j
            and e.engaged_at between t and t + interval 7200 second) taken from s),
        d as (select who, i, j, t::date d, bool_or(taken) taken from f group by all)
        select i, j, count(*), count(*) filter (not taken), sum(if(taken, 0, pow(2, -date_diff('day', d, date '{LAST}') / 3.0))),
            count(distinct who) from d group by all having count(distinct who) >= 3 order by all""").fetchall()
    rows = sorted(tuple(row) for row in found.collect())
    assert len(expected) > 20
    assert [(*row[:4], row[5]) for row in rows] == [(*row[:4], row[5]) for row in expected]
    assert [row[4] for row in rows] == pytest.approx([row[4] for row in expected])
    assert {row[6] for row in rows} == {LAST}
    assert 0 < sum(row[3] for row in rows) < sum(row[2] for row in rows)


def test_rows_that_cannot_be_meant_are_refused(spark: SparkSession) -> None:
    at = datetime(2024, 3, 3, tzinfo=UTC)
    rows = [
        ("u", "i", "j", at),
        (None, "i", "j", at),
        ("u", "", "j", at),
        ("u", "i", None, at),
        ("u", "i", "i", at),
        ("u", "i", "j\ufffd", at),  # what bytes that are no UTF-8 were read as
        ("u", "i", "j", None),
        ("u", "i", "j", datetime(2024, 2, 1, tzinfo=UTC)),  # before the kept days
        ("u", "i", "j", datetime(2024, 3, 7, tzinfo=UTC)),  # after the run date
    ]
    frame = spark.createDataFrame(rows, "who string, trigger_item_id string, offer string, shown_at timestamp")
    found = check_impressions(frame, source=SOURCE, run_date=LAST, now=NOW).collect()
    assert sorted(row["reason"] or "" for row in found) == [
        "",
        "item_id is not the UTF-8 it was read as",
        "item_id is null or empty",
        "item_id is the trigger itself",
        "shown_at is missing or not a time",
        "trigger_item_id is null or empty",
        "user_id is null or empty",
    ]
    assert all('"who"' not in row["row"] for row in found)
    with pytest.raises(SourceError, match=r"source\.impressions\.columns\.item_id"):
        check_impressions(frame.drop("offer"), source=SOURCE, run_date=LAST, now=NOW)


def test_times_in_epochs(spark: SparkSession) -> None:
    at = datetime(2024, 3, 3, tzinfo=UTC)
    frame = spark.createDataFrame([("u", "i", "j", int(at.timestamp()))], "who string, trigger_item_id string, offer string, shown_at long")
    epochs = SOURCE.model_copy(update={"time_format": "epoch_seconds"})
    (row,) = (
        check_impressions(frame, source=epochs, run_date=LAST, now=NOW).select("reason", F.unix_seconds("shown_at").alias("at")).collect()
    )
    assert (row["reason"], row["at"]) == (None, int(at.timestamp()))
    with pytest.raises(SourceError, match=r"'shown_at' is bigint; .*set source\.impressions\.time_format \(epoch_seconds"):
        check_impressions(frame, source=SOURCE, run_date=LAST, now=NOW)


def test_the_last_evening_waits_for_its_answer(spark: SparkSession) -> None:
    rows = [(f"u{n}", "i", "j", datetime(2024, 3, 1, 23, tzinfo=UTC)) for n in range(3)]
    shown = pd.DataFrame(rows, columns=["who", "trigger_item_id", "offer", "shown_at"])
    engagements = to_spark(spark, world(seed=1, num_events=5))
    rule = {"source": SOURCE, "half_life_days": 3.0, "min_users": 2}
    nights = {day: checked(spark, shown, run_date=day).select(*IMPRESSIONS.column_names) for day in (FIRST, FIRST + timedelta(days=1))}
    assert [count_exposures(frame, engagements, run_date=day, **rule).count() for day, frame in nights.items()] == [0, 1]
