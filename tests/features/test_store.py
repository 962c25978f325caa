"""Feast for real: point-in-time joins against a native join and by hand, the online store on sqlite and on a Redis server."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import StructType

from conf.errors import MachineError, SettingsError
from conf.settings import OnlineSettings
from conf.tables import ITEM_ANNOTATIONS, ITEM_NEIGHBORS_HISTORY
from features import store
from features.annotations import annotations_as_of
from tests.conftest import ROOT

HEADS = ["engagement", "merged"]
RUN_DATE = date(2026, 3, 2)
AS_OF = datetime(2026, 3, 3, tzinfo=UTC) - timedelta(microseconds=1)
FLAG = "spark.sql.parser.quotedRegexColumnNames"


def at(day: int, *time: int) -> datetime:
    return datetime(2026, 3, day, *time, tzinfo=UTC)


def annotation(item_id: str, event: datetime, created: datetime | None = None, **change: Any) -> dict[str, Any]:
    valid = dict.fromkeys(ITEM_ANNOTATIONS.column_names) | {"eligible": True, "deleted": False}
    return valid | {"item_id": item_id, "event_timestamp": event, "created_timestamp": created or event} | change


def annotations_frame(spark: SparkSession, rows: list[dict[str, Any]]) -> DataFrame:
    return spark.createDataFrame(rows, StructType.fromDDL(ITEM_ANNOTATIONS.ddl.replace(" NOT NULL", "")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("feast")


@pytest.fixture(scope="module")
def feature_store(folder: Path) -> Any:
    opened = store.open_store(folder=str(folder), online=OnlineSettings(), redis_connection=None)
    store.apply_definitions(opened, heads=HEADS)
    return opened


def test_annotations_are_those_known_at_the_run_date(spark: SparkSession, feature_store: Any) -> None:
    full = annotation("full", at(1), title="t", text="x", categories=["a", "b"], tags=["q"], tag_weights=[0.5], attributes={"k": "v"})
    rows = [
        full | {"embedding": [1.0, -2.0]},
        annotation("corrected", at(1), title="first"),
        annotation("corrected", at(1), at(2, 5), title="corrected in time"),
        annotation("corrected", at(1), at(3), title="corrected too late"),
        annotation("late", at(1), at(4), title="known later"),
        annotation("last moment", AS_OF, title="counts"),
        annotation("last moment", at(3), title="next day"),
        annotation("twice", at(1), title="same"),
        annotation("twice", at(1), title="same"),  # Feast would multiply the output row
        annotation("contradiction", at(1), title="a"),
        annotation("contradiction", at(1), title="b"),
        annotation("gone", at(1), title="was here"),
        annotation("gone", at(2), eligible=False, deleted=True),
        annotation("no creation", at(1), title="kept") | {"created_timestamp": None},  # Feast would return nulls
        annotation("timeless", datetime(1970, 1, 1, tzinfo=UTC), title="no history"),
        annotation("not asked for", at(1)),
    ]
    asked = ["full", "corrected", "late", "last moment", "twice", "contradiction", "gone", "no creation", "timeless", "unknown"]
    item_ids = spark.createDataFrame([(i,) for i in [*asked, "full", None]], "item_id string")
    annotations = annotations_frame(spark, rows)

    known = store.annotations_at(spark, feature_store, annotations=annotations, item_ids=item_ids, as_of=AS_OF)
    found = {row["item_id"]: row for row in known.collect()}
    assert known.count() == len(found) == len(asked)
    assert {item: row["title"] for item, row in found.items() if item != "contradiction"} == {
        "full": "t",
        "corrected": "corrected in time",
        "late": None,
        "last moment": "counts",
        "twice": "same",
        "gone": None,
        "no creation": "kept",
        "timeless": "no history",
        "unknown": None,
    }
    assert found["contradiction"]["title"] in {"a", "b"}
    assert [found[item]["deleted"] for item in ("gone", "full", "unknown")] == [True, False, None]
    assert found["full"]["first_event_timestamp"].replace(tzinfo=UTC) == at(1)
    assert found["timeless"]["first_event_timestamp"] is None

    # the native join is the oracle, of whole rows
    columns = [c for c in ITEM_ANNOTATIONS.column_names if not c.endswith("_timestamp")]
    clean = annotations.withColumn("created_timestamp", F.coalesce("created_timestamp", "event_timestamp"))
    native = {row["item_id"]: row for row in annotations_as_of(clean, run_date=RUN_DATE).select(*columns).collect()}
    for item in set(asked) & set(native) - {"contradiction"}:
        assert known.select(*columns).schema.names == list(columns)
        assert [found[item][c] for c in columns] == list(native[item]), item


def test_feast_leaves_the_session_as_it_was(spark: SparkSession, feature_store: Any) -> None:
    spark.conf.set("spark.sql.shuffle.partitions", "2")
    item_ids = spark.createDataFrame([("a",)], "item_id string")
    annotations = annotations_frame(spark, [annotation("a", at(1))])
    known = store.annotations_at(spark, feature_store, annotations=annotations, item_ids=item_ids, as_of=AS_OF)
    assert known.sparkSession is spark
    assert spark.conf.get(FLAG, "false") == "false"
    assert spark.conf.get("spark.sql.shuffle.partitions") == "2"
    assert SparkSession.getActiveSession() is spark
    assert not spark.catalog.tableExists(store.ANNOTATIONS_VIEW)
    spark.createDataFrame([(1,)], "k int").createOrReplaceTempView("flagged")
    assert spark.sql("select `k` from flagged join flagged as other using (`k`)").count() == 1  # a regex here with the flag on
    with store.feast_session(spark) as own:
        assert SparkSession.getActiveSession() is own
        own.conf.set(FLAG, "true")
    assert spark.conf.get(FLAG, "false") == "false"


def test_other_time_zones_are_refused(spark: SparkSession, feature_store: Any) -> None:
    item_ids = spark.createDataFrame([("a",)], "item_id string")
    spark.conf.set("spark.sql.session.timeZone", "Asia/Tokyo")
    try:
        with pytest.raises(MachineError, match="found time zone Asia/Tokyo in the Spark session and UTC"):
            store.annotations_at(spark, feature_store, annotations=annotations_frame(spark, []), item_ids=item_ids, as_of=AS_OF)
    finally:
        spark.conf.set("spark.sql.session.timeZone", "UTC")


def test_a_process_started_in_new_york_sees_the_same(tmp_path: Path) -> None:
    code = f"""
import json
from datetime import datetime, timezone, timedelta
from pyspark.sql.types import StructType
from conf.settings import OnlineSettings, SparkSettings
from conf.tables import ITEM_ANNOTATIONS
from features import store
from jobs.session import start_session
spark = start_session(SparkSettings(driver_memory="1g", master="local[1]", shuffle_partitions=1), app_name="zone")
opened = store.open_store(folder={str(tmp_path)!r}, online=OnlineSettings(), redis_connection=None)
store.apply_definitions(opened, heads=["merged"])
end = datetime(2026, 3, 3, tzinfo=timezone.utc)
base = dict.fromkeys(ITEM_ANNOTATIONS.column_names) | {{"item_id": "a", "eligible": True, "deleted": False}}
times = {{"before": end - timedelta(hours=7), "last": end - timedelta(microseconds=1), "next": end}}
rows = [base | {{"title": name, "event_timestamp": at, "created_timestamp": at}} for name, at in times.items()]
annotations = spark.createDataFrame(rows, StructType.fromDDL(ITEM_ANNOTATIONS.ddl))
ids = annotations.select("item_id")
known = store.annotations_at(spark, opened, annotations=annotations, item_ids=ids, as_of=end - timedelta(microseconds=1))
print(json.dumps([[row["title"], str(row["first_event_timestamp"])] for row in known.collect()]))
spark.stop()
"""
    environment = os.environ | {"TZ": "America/New_York", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [["last", "2026-03-02 17:00:00"]]


def neighbor(item_id: str, score: float) -> dict[str, Any]:
    return {"neighbor_id": item_id, "score": score, "reason": "", "sources": [], "num_user_days": 0, "relevance": 0.0, "filled": False}


def listed(run: str, run_date: date, item_id: str, head: str, *neighbors: tuple[str, float]) -> dict[str, Any]:
    found = [neighbor(*each) for each in neighbors]
    row = {"run_date": run_date, "run_id": run, "item_id": item_id, "head": head, "neighbors": found}
    return row | {"model_version": "m", "list_hash": "h", "contract_version": 1}


def history_frame(spark: SparkSession, rows: list[dict[str, Any]]) -> DataFrame:
    return spark.createDataFrame(rows, StructType.fromDDL(ITEM_NEIGHBORS_HISTORY.ddl))


def test_history_gives_each_time_the_lists_published_by_then(spark: SparkSession, feature_store: Any) -> None:
    rows = [
        listed("n1", date(2026, 3, 1), "a", "merged", ("b", 0.9), ("c", 0.5)),
        listed("n1", date(2026, 3, 1), "a", "engagement", ("c", 2.0)),
        listed("n2", date(2026, 3, 2), "a", "merged", ("d", 0.7)),
        # published on its own day, then again before the day was over: only the day after can know it, and then the second
        listed("n5", date(2026, 3, 5), "a", "merged", ("early", 1.0)),
        listed("n5-again", date(2026, 3, 5), "a", "merged", ("again", 1.0)),
    ]
    # on the 7th the night of the 1st was rolled back to
    published = [("n1", at(2, 4, 10)), ("n2", at(4, 9)), ("n5", at(5, 12)), ("n5-again", at(5, 13)), ("n1", at(7, 9))]
    runs = spark.createDataFrame(published, "run_id string, published_at timestamp")
    history = store.pivot_neighbors(history_frame(spark, rows).join(runs, on="run_id"), HEADS, published_at="published_at")
    expected = {
        at(2, 4, 9): (None, None),
        at(2, 4, 10): ("n1", ["b", "c"]),
        at(4, 8): ("n1", ["b", "c"]),  # the night of the 2nd came late
        at(4, 9): ("n2", ["d"]),
        at(5, 23): ("n2", ["d"]),
        at(6): ("n5-again", ["again"]),
        at(7, 8): ("n5-again", ["again"]),
        at(7, 9): ("n1", ["b", "c"]),
    }
    entities = spark.createDataFrame([("a", time) for time in expected], "item_id string, event_timestamp timestamp")
    found = store.neighbors_at(spark, feature_store, history=history, entities=entities).collect()
    assert {row["event_timestamp"].replace(tzinfo=UTC): (row["run_id"], row["merged_ids"]) for row in found} == expected
    first = next(row for row in found if row["event_timestamp"].replace(tzinfo=UTC) == at(2, 4, 10))
    assert (first["engagement_ids"], first["engagement_scores"], first["as_of"]) == (["c"], [2.0], "2026-03-01")


def lists_table(*rows: tuple[str, str | None, list[str], list[float]]) -> pa.Table:
    types = [("item_id", pa.string()), ("head", pa.string()), ("ids", pa.list_(pa.string())), ("scores", pa.list_(pa.float64()))]
    return pa.Table.from_pylist([dict(zip(("item_id", "head", "ids", "scores"), row, strict=True)) for row in rows], pa.schema(types))


def check_online_lists(feature_store: Any, *, elsewhere: Callable[[], Any]) -> None:
    """What any online store must do; `elsewhere` opens it from its folder alone."""

    def publish(lists: pa.Table, run_id: str, as_of: str, written_at: datetime) -> None:
        rows = store.online_rows(lists, HEADS, run_id=run_id, as_of=as_of, written_at=written_at)
        assert len(rows) == 2
        for part in (rows.slice(0, 1), rows.slice(1), rows.slice(0, 0)):
            store.write_online(feature_store, part)

    lists = [("a", "merged", ["b", "c"], [0.9, 0.1]), ("a", "engagement", ["c"], [2.0]), ("b", "merged", ["a"], [0.9])]
    first = lists_table(*lists, ("b", "engagement", [], []))
    publish(first, "n1", "2026-03-01", at(2))
    # a second later, still before the day after the run date; b has left
    second = lists_table(("a", "merged", ["c", "b"], [1 / 3, 0.2]), ("b", None, [], []))
    publish(second, "n2", "2026-03-02", at(2, 0, 0, 1))
    for opened in (feature_store, elsewhere()):
        found = store.lookup_online(opened, ["a", "b", "nobody"], heads=HEADS, k=1)
        assert found["a"] == {
            "run_id": "n2",
            "as_of": "2026-03-02",
            "engagement": {"ids": [], "scores": []},
            "merged": {"ids": ["c"], "scores": [1 / 3]},
        }
        assert found["b"] == found["a"] | {"merged": {"ids": [], "scores": []}}  # a tombstone of that night
        assert found["nobody"] == found["b"] | {"run_id": None, "as_of": None}
    assert store.lookup_online(feature_store, [], heads=HEADS, k=1) == {}


def test_online_lists_are_those_written_last(feature_store: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from feast import FeatureStore

    monkeypatch.chdir("/")  # paths in the file are relative to it
    check_online_lists(feature_store, elsewhere=lambda: FeatureStore(str(folder)))


def test_online_lists_in_redis(redis_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from feast import FeatureStore

    monkeypatch.setenv("MTMH_REDIS", redis_server)
    opened = store.open_store(folder=str(tmp_path), online=OnlineSettings(store="redis"), redis_connection=redis_server)
    store.apply_definitions(opened, heads=HEADS)
    check_online_lists(opened, elsewhere=lambda: FeatureStore(str(tmp_path)))


def test_secrets_stay_out_of_the_settings_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from feast import FeatureStore

    online = OnlineSettings(store="redis", redis_connection_env="MY_REDIS")
    opened = store.open_store(folder=str(tmp_path), online=online, redis_connection="localhost:6379,password=secret")
    store.apply_definitions(opened, heads=HEADS)
    assert opened.config.online_store.connection_string == "localhost:6379,password=secret"
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"secret" in path.read_bytes()]
    monkeypatch.setenv("MY_REDIS", "elsewhere:1")
    assert FeatureStore(str(tmp_path)).config.online_store.connection_string == "elsewhere:1"
    with pytest.raises(SettingsError, match="MY_REDIS"):
        store.open_store(folder=str(tmp_path), online=online, redis_connection=None)
    with pytest.raises(SettingsError, match="needs a folder, found s3://bucket"):
        store.open_store(folder="s3://bucket/lake", online=OnlineSettings(), redis_connection=None)
