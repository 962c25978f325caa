"""Feast: what an item was known to be at a time, and which neighbors it is served with. All times UTC.

Two feature views with the one key `item_id` (Feast joins two keys without a separator, so that ('1', '23') meets ('12', '3')):

* `item_annotations`, offline only, over the pinned table: a value counts from its event time and once it is known (created time).
* `item_neighbors`, one row per item and night with `<head>_ids` and `<head>_scores`: offline over the history, online the current night.
  A list of run date D published at time t exists from max(t, D+1 00:00) on, so that it never leaks into training data of its own day:
  the night of 2026-03-01, published on 2026-03-02 at 04:10, is seen by an entity row of 04:10 and not by one of 04:09.

Feast is imported inside the functions, as that costs 9 seconds.
"""

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.compute as pc
import yaml
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from conf.errors import MachineError, SettingsError, TableError
from conf.files import write_whole
from conf.settings import OnlineSettings
from conf.tables import ITEM_ANNOTATIONS
from features.sources import EPOCH

if TYPE_CHECKING:
    from feast import FeatureStore

ANNOTATIONS_VIEW = "item_annotations_view"
"""Temporary view behind the feature view item_annotations: the pinned table."""
HISTORY_VIEW = "neighbor_history_view"
"""Temporary view behind the feature view item_neighbors: `pivot_neighbors` of item_neighbors_history."""
REPOSITORY_FILE, SQLITE_FILE = "feature_store.yaml", "online.db"
_ITEMS_PER_WRITE = 1_000  # Feast makes objects of all of them before it writes, and sqlite lets nobody else write meanwhile
_TIMES = ("event_timestamp", "created_timestamp")
_MAPS = tuple(column.name for column in ITEM_ANNOTATIONS.columns if column.type.startswith("map<"))
_KNOWLEDGE = tuple(name for name in ITEM_ANNOTATIONS.column_names if name not in ("item_id", *_TIMES))


def open_store(*, folder: str, online: OnlineSettings, redis_connection: str | None) -> "FeatureStore":
    """The store whose registry, sqlite file and `feature_store.yaml` lie in the folder; `feast -c <folder> serve` reads the latter.

    The file holds relative paths, and of Redis only the name of the environment variable with the connection.

    Args:
        folder: a folder, created if missing.
        online: which online store.
        redis_connection: `host:port[,password=...]`; needed for Redis only.

    Raises:
        SettingsError: the folder is a URI, or Redis is wanted without a connection.
    """
    from feast import FeatureStore, RepoConfig

    if "://" in folder:
        raise SettingsError(f"Feast's registry needs a folder, found {folder}; mount the lake as a path and set lake.root to it")
    if online.store == "redis" and not redis_connection:
        raise SettingsError(f"online.store is redis and no connection is given; set the variable {online.redis_connection_env}")
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    file, project = place / REPOSITORY_FILE, project_of(folder) or f"mtmh_{uuid4().hex[:12]}"
    content = _repository(online, project=project, connection=f"${{{online.redis_connection_env}}}")
    _write_if_changed(file, yaml.safe_dump(content, sort_keys=False))
    config = RepoConfig(**_repository(online, project=project, connection=redis_connection or ""), repo_path=place)
    return FeatureStore(repo_path=folder, config=config)


def project_of(folder: str) -> str | None:
    """The name under which a lake's features are kept, for as long as its feature_store.yaml lies there (None: it does not). Another lake
    has another one, so that lakes may share a Redis server.
    """
    file = Path(folder, REPOSITORY_FILE)
    return str(yaml.safe_load(file.read_text(encoding="utf-8"))["project"]) if file.is_file() else None


def apply_definitions(store: "FeatureStore", *, heads: Sequence[str]) -> None:
    """Register entity, sources, views and services; repeating it changes nothing.

    Args:
        store: an open store.
        heads: names of the lists, `merged` included.
    """
    from feast import Entity, FeatureService, ValueType

    item = Entity(name="item", join_keys=["item_id"], value_type=ValueType.STRING, description="A catalog item.")
    views = [_annotations_definition(item), _neighbors_definition(item, heads)]
    services = [FeatureService(name=view.name, features=[view]) for view in views]
    with _quiet():
        store.apply([item, *views, *services])


@contextmanager
def feast_session(spark: SparkSession) -> Iterator[SparkSession]:
    """A session of its own for Feast's calls, active inside the block.

    Feast sets `spark.sql.parser.quotedRegexColumnNames` on the active session and leaves it, after which back-quoted names in SQL are
    regular expressions. The new session shares context, cache and catalog with the given one; its settings and views end with it.
    """
    own = spark.newSession()
    sessions: Any = spark._jvm.org.apache.spark.sql.classic.SparkSession  # type: ignore[union-attr]  # py4j: no types
    before = SparkSession._activeSession
    _activate(own, sessions, own)
    try:
        yield own
    finally:
        _activate(before, sessions, spark)


def annotations_at(
    spark: SparkSession, store: "FeatureStore", *, annotations: DataFrame, item_ids: DataFrame, as_of: datetime
) -> DataFrame:
    """What was known about each item at a time, by Feast's point-in-time join.

    Args:
        spark: the session of both frames.
        store: a store with definitions applied.
        annotations: item_annotations at a pinned version.
        item_ids: column item_id; repeated and null ids count once and not at all.
        as_of: aware time; rows with event and created time up to it count.

    Returns:
        One lazy row per item: item_id, the annotation columns without times (all null for an item not known by then; a deletion marker has
        `deleted` true) and `first_event_timestamp`: since when the item has annotations, null where the catalog has no times.

    Raises:
        MachineError: the session or the process is not in UTC, in which Feast loses the newest values.
    """
    items = item_ids.select("item_id").where(F.col("item_id").isNotNull()).distinct()
    known = _one_row_a_time(annotations)
    entities = items.withColumn("event_timestamp", F.lit(as_of))
    found = _point_in_time(spark, store, "item_annotations", source=known, view=ANNOTATIONS_VIEW, entities=entities)
    since = known.where(_known_by(as_of) & ~F.col("deleted") & (F.col("event_timestamp") > F.lit(EPOCH)))
    first = since.groupBy("item_id").agg(F.min("event_timestamp").alias("first_event_timestamp"))
    return found.join(first, on="item_id", how="left").select("item_id", *_KNOWLEDGE, "first_event_timestamp")


def neighbors_at(spark: SparkSession, store: "FeatureStore", *, history: DataFrame, entities: DataFrame) -> DataFrame:
    """Which lists were served when, e.g. to build a ranker's training set.

    Args:
        spark: the session of both frames.
        store: a store with definitions applied.
        history: `pivot_neighbors` of the published nights, each with its time of publication.
        entities: columns item_id and event_timestamp.

    Returns:
        `entities` with `<head>_ids` and `<head>_scores` per head, run_id and as_of; null where nothing was published by then.

    Raises:
        MachineError: the session or the process is not in UTC.
    """
    rows = entities.select("item_id", "event_timestamp")
    return _point_in_time(spark, store, "item_neighbors", source=history, view=HISTORY_VIEW, entities=rows)


def pivot_neighbors(neighbors: DataFrame, heads: Sequence[str], *, published_at: str) -> DataFrame:
    """Lists by item and head as one row per item and publication: what stands behind the offline view of `item_neighbors`.

    Args:
        neighbors: rows of item_neighbors_history, once for every publication of their run.
        heads: the lists wanted; a head without a row gives an empty list.
        published_at: the column with the time of publication.

    Returns:
        item_id, `<head>_ids` array<string> and `<head>_scores` array<double> per head, run_id, as_of (run date as text),
        event_timestamp = max(published_at, run date + 1 day 00:00), created_timestamp = published_at.
    """
    lists = [F.first(F.when(F.col("head") == head, F.col("neighbors")), ignorenulls=True).alias(head) for head in heads]
    pivoted = neighbors.groupBy("run_date", "run_id", "item_id", F.col(published_at).alias("created_timestamp")).agg(*lists)
    day_after = F.date_add("run_date", 1).cast("timestamp")
    return pivoted.select(
        "item_id",
        *(column for head in heads for column in _list_columns(head)),
        "run_id",
        F.col("run_date").cast("string").alias("as_of"),
        F.greatest("created_timestamp", day_after).alias("event_timestamp"),
        "created_timestamp",
    )


def online_rows(lists: pa.Table, heads: Sequence[str], *, run_id: str, as_of: str, written_at: datetime) -> pa.Table:
    """Lists by item and head as the online store holds them, one row an item.

    Args:
        lists: item_id, head, ids list<string> and scores list<double>; an item without a row of a head has an empty list, and one whose
            head is null none at all: a tombstone of an item that has left, since an online store never deletes.
        heads: all lists.
        run_id: night that wrote the lists.
        as_of: its run date as text.
        written_at: aware time. It is the event time online.

    Returns:
        item_id in order of first appearance, `<head>_ids` and `<head>_scores` per head, run_id, as_of, event_timestamp, created_timestamp.
    """
    items = pc.unique(lists["item_id"])
    columns: dict[str, pa.Array] = {"item_id": items}
    for head in heads:
        mine = lists.filter(pc.equal(lists["head"], head)).combine_chunks()
        at = pc.index_in(items, mine["item_id"].combine_chunks())
        for part in ("ids", "scores"):
            empty = pa.array([[]], mine.schema.field(part).type)  # behind the lists, for items without one
            values = pa.concat_arrays([*mine[part].chunks, empty])
            columns[f"{head}_{part}"] = values.take(pc.fill_null(at, mine.num_rows))
    moment = pa.scalar(written_at, pa.timestamp("us", tz="UTC"))
    same = {"run_id": run_id, "as_of": as_of, "event_timestamp": moment, "created_timestamp": moment}
    return pa.table(columns | {name: pa.repeat(value, len(items)) for name, value in same.items()})


def write_online(store: "FeatureStore", rows: pa.Table) -> None:
    """Write `online_rows`; the last write of an item wins.

    Args:
        store: a store with definitions applied.
        rows: any number.
    """
    for start in range(0, rows.num_rows, _ITEMS_PER_WRITE):
        store.write_to_online_store("item_neighbors", df=rows.slice(start, _ITEMS_PER_WRITE).to_pandas())


def lookup_online(store: "FeatureStore", item_ids: Sequence[str], *, heads: Sequence[str], k: int) -> dict[str, dict[str, Any]]:
    """The served lists of some items.

    Args:
        store: a store with definitions applied.
        item_ids: triggers; an unknown one is no error.
        heads: lists wanted.
        k: neighbors per list at most.

    Returns:
        Per item: `run_id` and `as_of` (None for an unknown item), and per head `ids` and `scores`, best first, empty where there are none.

    Raises:
        TableError: no list has been published online yet.
    """
    if not item_ids:
        return {}
    from feast.errors import FeatureViewNotFoundException

    names = ["run_id", "as_of", *(f"{head}_{part}" for head in heads for part in ("ids", "scores"))]
    rows = [{"item_id": item_id} for item_id in item_ids]
    try:
        found = store.get_online_features(features=[f"item_neighbors:{name}" for name in names], entity_rows=rows).to_dict()
    except FeatureViewNotFoundException as error:
        raise TableError(
            f"no lists are online yet: the registry in {store.repo_path} has no item_neighbors; run `python -m jobs.nightly`, and not with "
            "online.enabled set to false"
        ) from error
    return {item_id: _lists_of(found, position, heads, k) for position, item_id in enumerate(item_ids)}


def _repository(online: OnlineSettings, *, project: str, connection: str) -> dict[str, Any]:
    """Content of feature_store.yaml."""
    # without skip_dedup Redis silently refuses a write that is older than what it holds: a rollback meanwhile, or a clock that went back
    redis = {"type": "redis", "connection_string": connection, "skip_dedup": True}
    return {
        "project": project,
        "provider": "local",
        "registry": "registry.db",
        "offline_store": {"type": "spark"},  # without spark_conf: Feast would apply that to our session
        "online_store": redis if online.store == "redis" else {"type": "sqlite", "path": SQLITE_FILE},
        "entity_key_serialization_version": 3,
    }


def _write_if_changed(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_whole(path, text)


def _annotations_definition(item: Any) -> Any:
    from feast import FeatureView, Field
    from feast.infra.offline_stores.contrib.spark_offline_store.spark_source import SparkSource
    from feast.types import Array, Bool, Float32, Float64, Map, String

    types: dict[str, Any] = {
        "string": String,
        "array<string>": Array(String),
        "array<double>": Array(Float64),
        "array<float>": Array(Float32),
        "map<string,string>": Map,
        "map<string,array<string>>": Map,
        "boolean": Bool,
    }
    source = SparkSource(name=ANNOTATIONS_VIEW, table=ANNOTATIONS_VIEW, timestamp_field=_TIMES[0], created_timestamp_column=_TIMES[1])
    features = [Field(name=c.name, dtype=types[c.type], description=c.comment) for c in ITEM_ANNOTATIONS.columns if c.name in _KNOWLEDGE]
    return FeatureView(
        name="item_annotations",
        entities=[item],
        ttl=timedelta(0),  # an annotation holds until the next one
        schema=features,
        source=source,
        online=False,
        description="What is known about an item, with history.",
    )


def _neighbors_definition(item: Any, heads: Sequence[str]) -> Any:
    from feast import FeatureView, Field
    from feast.infra.offline_stores.contrib.spark_offline_store.spark_source import SparkSource
    from feast.types import Array, Float64, String

    lists = [
        field
        for head in heads
        for field in (
            Field(name=f"{head}_ids", dtype=Array(String), description=f"Neighbors of the {head} list, best first."),
            Field(name=f"{head}_scores", dtype=Array(Float64), description=f"Scores parallel to {head}_ids."),
        )
    ]
    identity = [
        Field(name="run_id", dtype=String, description="Night that wrote the lists."),
        Field(name="as_of", dtype=String, description="Its run date, YYYY-MM-DD."),
    ]
    return FeatureView(
        name="item_neighbors",
        entities=[item],
        ttl=timedelta(0),
        schema=lists + identity,
        source=SparkSource(name=HISTORY_VIEW, table=HISTORY_VIEW, timestamp_field=_TIMES[0], created_timestamp_column=_TIMES[1]),
        description="Neighbor lists of every head, one row per item and night.",
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that Feast's Spark store is experimental, which it repeats at each call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def _point_in_time(
    spark: SparkSession, store: "FeatureStore", service: str, *, source: DataFrame, view: str, entities: DataFrame
) -> DataFrame:
    """Feast's point-in-time join of a feature service over a frame that stands behind its view."""
    _check_utc(spark)
    with feast_session(spark) as own, _quiet():
        _in_session(source, own).createOrReplaceTempView(view)
        rows: Any = _in_session(entities, own)  # Feast's signature knows pandas frames only
        job: Any = store.get_historical_features(
            entity_df=rows,
            features=store.get_feature_service(service),
            filter_by_created_timestamp=True,  # the default lets a late correction leak into the time before it
        )
        return _in_session(job.to_spark_df(), spark)


def _activate(session: SparkSession | None, sessions: Any, java: SparkSession) -> None:
    """Make a session the active one on both sides of the bridge; Feast asks the Python side, Spark the other."""
    SparkSession._activeSession = session
    sessions.setActiveSession(java._jsparkSession)


def _in_session(frame: DataFrame, session: SparkSession) -> DataFrame:
    """The same plan as a frame of another session of the same context, so that views and settings stay where they belong."""
    datasets: Any = session._jvm.org.apache.spark.sql.classic.Dataset  # type: ignore[union-attr]  # py4j: no types
    return DataFrame(datasets.ofRows(session._jsparkSession, frame._jdf.queryExecution().analyzed()), session)


def _check_utc(spark: SparkSession) -> None:
    session, process = spark.conf.get("spark.sql.session.timeZone"), time.tzname[0]
    if (session, process) != ("UTC", "UTC"):
        raise MachineError(
            f"found time zone {session} in the Spark session and {process} in the process, wanted UTC in both: Feast builds its bound "
            "on event times from naive times and would lose the newest values; start the session with jobs.session.start_session"
        )


def _known_by(as_of: datetime) -> Column:
    return (F.col("event_timestamp") <= F.lit(as_of)) & (F.col("created_timestamp") <= F.lit(as_of))


def _one_row_a_time(annotations: DataFrame) -> DataFrame:
    """One row per item, event time and created time, the latter never null.

    Feast multiplies output rows when both times repeat, and returns nulls where the created time is null.
    """
    created = F.coalesce("created_timestamp", "event_timestamp").alias("created_timestamp")
    rows = annotations.select("item_id", "event_timestamp", created, *_KNOWLEDGE)
    comparable = [F.to_json(name) if name in _MAPS else F.col(name) for name in _KNOWLEDGE]  # maps have no order
    latest = F.max_by(F.struct(*_KNOWLEDGE), F.struct(F.xxhash64(*comparable))).alias("known")
    return rows.groupBy("item_id", *_TIMES).agg(latest).select("item_id", *_TIMES, "known.*")


def _list_columns(head: str) -> tuple[Column, Column]:
    neighbors = F.col(head)
    ids = F.coalesce(F.transform(neighbors, lambda n: n["neighbor_id"]), F.array().cast("array<string>"))
    scores = F.coalesce(F.transform(neighbors, lambda n: n["score"]), F.array().cast("array<double>"))
    return ids.alias(f"{head}_ids"), scores.alias(f"{head}_scores")


def _lists_of(found: dict[str, list[Any]], position: int, heads: Sequence[str], k: int) -> dict[str, Any]:
    lists = {
        head: {"ids": list(found[f"{head}_ids"][position] or [])[:k], "scores": list(found[f"{head}_scores"][position] or [])[:k]}
        for head in heads
    }
    return {"run_id": found["run_id"][position], "as_of": found["as_of"][position], **lists}
