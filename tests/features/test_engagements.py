"""What ingest makes of the rows of a user's event table, good and bad."""

import json
from datetime import UTC, date, datetime, timedelta

import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from conf.errors import SettingsError, SourceError
from conf.settings import EventColumns, EventSource
from conf.tables import ENGAGEMENTS, REJECTED_ROWS
from features.engagements import accepted_events, check_columns, check_events, event_metrics, rejected_rows
from features.pair_kernels import keyed_hash

RUN_DATE, NOW = date(2024, 3, 2), datetime(2024, 3, 5, 12, tzinfo=UTC)
KEY = b"key of the tests"
COLUMNS = EventColumns(user_id="who", item_id="sku", engaged_at="at", action="what", weight="amount", session_id="basket")
SOURCE = EventSource(path="events", columns=COLUMNS, action_weights={"buy": 2.0, "view": 0.5})
BASE = {"who": "u1", "sku": "a", "at": "2024-03-01T10:00:00Z", "what": "buy", "amount": "1", "basket": "b1"}


def check(frame: DataFrame, *, source: EventSource = SOURCE) -> DataFrame:
    return check_events(frame, source=source, run_date=RUN_DATE, now=NOW, hash_key=KEY)


def rows_of(spark: SparkSession, *overrides: dict[str, object]) -> DataFrame:
    rows = [BASE | override for override in overrides]
    return spark.createDataFrame([tuple(row.values()) for row in rows], ", ".join(f"{name} string" for name in BASE))


REFUSED = {
    "no user": ({"who": None}, "user_id is null or empty"),
    "empty user": ({"who": ""}, "user_id is null or empty"),
    "blank item": ({"sku": " \t"}, "item_id is null or empty"),
    "no time": ({"at": None}, "engaged_at is missing or not a time"),
    "not a time": ({"at": "yesterday"}, "engaged_at is missing or not a time"),
    "a time of day would be read as today": ({"at": "12:30:00"}, "engaged_at is missing or not a time"),
    "impossible day": ({"at": "2024-02-30"}, "engaged_at is missing or not a time"),
    "future": ({"at": "2024-03-06T12:00:01Z"}, "engaged_at is in the future"),
    "before 1970": ({"at": "1969-12-31T23:59:59Z"}, "engaged_at is before 1970"),
    "no weight": ({"amount": None}, "weight is missing or not a finite number"),
    "no number": ({"amount": "many"}, "weight is missing or not a finite number"),
    "nan": ({"amount": "NaN"}, "weight is missing or not a finite number"),
    "infinite": ({"amount": "Infinity"}, "weight is missing or not a finite number"),
    "zero": ({"amount": "0"}, "weight is not above 0"),
    "several faults": ({"who": "", "amount": "-1"}, "user_id is null or empty; weight is not above 0"),
}
TAKEN = {
    "plain": ({}, datetime(2024, 3, 1, 10), 2.0),
    "zone": ({"at": "2024-03-01T10:00:00+02:00"}, datetime(2024, 3, 1, 8), 2.0),
    "no zone is UTC": ({"at": "2024-03-01 10:00:00.5"}, datetime(2024, 3, 1, 10, 0, 0, 500_000), 2.0),
    "day": ({"at": "2024-03-01"}, datetime(2024, 3, 1), 2.0),
    "last microsecond": ({"at": "2024-03-02T23:59:59.999999Z"}, datetime(2024, 3, 2, 23, 59, 59, 999_999), 2.0),
    "ids stay as they are": ({"who": " ü 1 ", "sku": "007"}, datetime(2024, 3, 1, 10), 2.0),
    "weights multiply": ({"what": "view", "amount": "3"}, datetime(2024, 3, 1, 10), 1.5),
    "no session": ({"basket": "  "}, datetime(2024, 3, 1, 10), 2.0),
}
LATER = {
    "next midnight": {"at": "2024-03-03T00:00:00Z"},
    "clock skew": {"at": "2024-03-06T11:59:59Z"},
}
OTHER = {"other action, whatever else": {"what": "return", "who": None}}


def test_every_row_is_taken_refused_or_later(spark: SparkSession) -> None:
    overrides = [*(row for row, _ in REFUSED.values()), *(row for row, *_ in TAKEN.values()), *LATER.values(), *OTHER.values()]
    numbered = [row | {"basket": row.get("basket", f"n{number}")} for number, row in enumerate(overrides)]
    checked = check(rows_of(spark, *numbered))
    assert checked.columns == [*ENGAGEMENTS.column_names, "reason", "row", "later"]
    found = {json.loads(row["row"])["basket"]: row for row in checked.collect()}
    for (name, (_, reason)), row in zip(REFUSED.items(), [found[f"n{n}"] for n in range(len(REFUSED))], strict=True):
        assert (row["reason"], row["later"]) == (reason, False), name
    for (name, (override, moment, weight)), number in zip(TAKEN.items(), range(len(REFUSED), 99), strict=False):
        row = found[override.get("basket", f"n{number}")]
        assert (row["reason"], row["later"], row["engaged_at"], row["weight"]) == (None, False, moment, weight), name
        assert row["event_date"] == moment.date(), name
        assert row["user_id"] == override.get("who", "u1"), name
    assert found["  "]["session_id"] is None
    later = range(len(REFUSED) + len(TAKEN), len(overrides) - 1)
    assert [(found[f"n{n}"]["reason"], found[f"n{n}"]["later"]) for n in later] == [(None, True)] * 2
    assert event_metrics(checked, source=SOURCE) == {
        "num_source_events": len(overrides),
        "num_rejected_events": len(REFUSED),
        "num_later_events": 2,
        "num_other_action_events": 1,
        "num_taken_events": len(TAKEN),
    }


def test_one_row_per_key_whatever_the_order(spark: SparkSession) -> None:
    copies = [{}, {"amount": "3", "basket": "b2"}, {"basket": None}, {"what": "view"}, LATER["next midnight"], {"what": "return"}]
    frames = [rows_of(spark, *copies), rows_of(spark, *reversed(copies)).repartition(3)]
    union = frames[0].withColumn("copy", F.lit(0)).unionByName(frames[1].withColumn("copy", F.lit(1)))
    moment = datetime(2024, 3, 1, 10)
    wanted = [
        ("u1", "a", "buy", moment, "b1", 6.0, moment.date()),
        ("u1", "a", "view", moment, "b1", 0.5, moment.date()),
    ]
    for copy in (0, 1):
        accepted = accepted_events(check(union.where(F.col("copy") == copy)), source=SOURCE)
        assert accepted.columns == list(ENGAGEMENTS.column_names)
        assert sorted(tuple(row) for row in accepted.collect()) == wanted


def test_rejected_rows_are_counted_and_hide_users(spark: SparkSession) -> None:
    checked = check(rows_of(spark, {"amount": "0"}, {"amount": "0"}, {"amount": "0", "who": "u2"}, {"who": ""}, {}))
    rejected = rejected_rows(checked, run_id="r", source="events")
    assert rejected.columns == list(REJECTED_ROWS.column_names)
    rows = rejected.collect()
    assert sorted((row["run_id"], row["source"], row["reason"], row["num_rows"]) for row in rows) == [
        ("r", "events", "user_id is null or empty", 1),
        ("r", "events", "weight is not above 0", 1),
        ("r", "events", "weight is not above 0", 2),
    ]
    users = {json.loads(row["row"])["who"] for row in rows}
    assert users == {"", f"{keyed_hash('u1', key=KEY) % 2**64:016x}", f"{keyed_hash('u2', key=KEY) % 2**64:016x}"}
    assert json.loads(rows[0]["row"]).keys() == BASE.keys()
    plan = rejected._jdf.queryExecution().toString()
    assert KEY.decode() not in plan
    assert KEY.hex() not in plan


def test_time_formats_and_column_types(spark: SparkSession) -> None:
    moment = datetime(2024, 3, 1, 10, 0, 0, 250_000)
    seconds = (moment - datetime(1970, 1, 1)).total_seconds()
    columns = {
        "bigint": (F.lit(int(seconds)), "epoch_seconds", moment.replace(microsecond=0)),
        "double": (F.lit(seconds), "epoch_seconds", moment),
        "text of a number": (F.lit(str(seconds)), "epoch_seconds", moment),
        "milliseconds": (F.lit(int(seconds * 1000)), "epoch_milliseconds", moment),
        "text of milliseconds": (F.lit(str(int(seconds * 1000))), "epoch_milliseconds", moment),
        "milliseconds read as seconds": (F.lit(int(seconds * 1000)), "epoch_seconds", "not a time"),
        "largest bigint": (F.lit(2**63 - 1), "epoch_milliseconds", "not a time"),
        "nan": (F.lit(float("nan")), "epoch_seconds", "not a time"),
        "no number": (F.lit("x"), "epoch_seconds", "not a time"),
        "timestamp": (F.lit(moment.replace(tzinfo=UTC)), "timestamp", moment),
        "without zone": (F.lit("2024-03-01 10:00:00.25").cast("timestamp_ntz"), "timestamp", moment),
        "date": (F.lit(date(2024, 3, 1)), "date", datetime(2024, 3, 1)),
        "date as text": (F.lit("2024-03-01"), "date", datetime(2024, 3, 1)),
    }
    base = spark.range(1).select(F.lit(12).alias("user_id"), F.lit(2**40).alias("item_id"))
    union = None
    for name, (column, time_format, _) in columns.items():
        source = EventSource(path="events", time_format=time_format)
        checked = check(base.withColumn("engaged_at", column), source=source).withColumn("case", F.lit(name))
        union = checked if union is None else union.unionByName(checked)
    assert union is not None
    for row in union.drop("row").collect():
        wanted = columns[row["case"]][2]
        if isinstance(wanted, str):
            assert wanted in row["reason"], row["case"]
        else:
            assert (row["reason"], row["engaged_at"]) == (None, wanted), row["case"]
        assert (row["user_id"], row["item_id"], row["action"], row["weight"]) == ("12", str(2**40), "engage", 1.0), row["case"]


def test_unusable_tables_name_column_type_and_setting(spark: SparkSession) -> None:
    good = spark.range(1).select(F.lit("u").alias("who"), F.lit("a").alias("sku"), F.current_timestamp().alias("at"))
    source = EventSource(path="events", columns=EventColumns(user_id="who", item_id="sku", engaged_at="at", weight="amount"))
    with pytest.raises(SourceError, match=r"missing columns \['amount', 'who'\] in events .*have \['sku', 'at'\]; set .*user_id, .*weight"):
        check(good.drop("who"), source=source)
    good = good.withColumn("amount", F.lit(1.0))
    check_columns(good.withColumnRenamed("sku", "SKU"), wanted={"x": "sku"}, table="events")
    epoch = source.model_copy(update={"time_format": "epoch_seconds"})
    for name, column, settings, message in [
        ("who", F.array(F.lit("u")), source, r"'who' is array<string>; wanted text or an integer; .*columns.user_id"),
        ("sku", F.lit(1.0), source, r"'sku' is double; wanted .*store float ids as text or integer"),
        ("at", F.lit(True), source, r"'at' is boolean; wanted timestamp"),
        ("at", F.lit(1), source, r"'at' is int; .*time_format \(epoch_seconds"),
        ("at", F.current_timestamp(), epoch, r"'at' is timestamp; wanted a number"),
        ("amount", F.array(F.lit(1)), source, r"'amount' is array<int>; wanted a number"),
    ]:
        with pytest.raises(SourceError, match=message):
            check(good.withColumn(name, column), source=settings)
    with pytest.raises(SettingsError, match="key of the user hashes is empty"):
        check_events(good, source=source, run_date=RUN_DATE, now=NOW + timedelta(days=1), hash_key=b"")
