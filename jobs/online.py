"""Where a night's Feast store lies, and the secret that opens its online store."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from redis.exceptions import RedisError

from conf.errors import MachineError
from conf.settings import LakeSettings, OnlineSettings, Settings
from conf.tables import ITEM_NEIGHBORS, ITEM_NEIGHBORS_HISTORY
from features import store
from jobs.reader import shared_folder
from jobs.stage import Night


def redis_connection(online: OnlineSettings) -> str | None:
    """The Redis connection string from the environment; None for sqlite.

    Raises:
        MachineError: Redis is wanted and the environment does not say where it is.
    """
    if online.store != "redis":
        return None
    connection = os.environ.get(online.redis_connection_env)
    if not connection:
        raise MachineError(
            f"online.store is redis, but the environment variable {online.redis_connection_env} is not set; "
            "set it to host:port[,password=...], or set online.store to sqlite"
        )
    return connection


@contextmanager
def reaching_redis(online: OnlineSettings) -> Iterator[None]:
    """Say what to do where Redis does not answer.

    Raises:
        MachineError: it does not; what is online stays, and lists in Delta are published all the same.
    """
    try:
        yield
    except RedisError as error:
        raise MachineError(
            f"the Redis server that {online.redis_connection_env} names does not answer: {error}; start it, or correct the variable, "
            "then run the same command again: a publication goes on with the items that are not online yet"
        ) from error


def feature_store_folder(lake: LakeSettings) -> str:
    """Folder of the Feast registry and of the sqlite online store."""
    return str(shared_folder(lake) / "_feast")


def store_identity(settings: Settings) -> str:
    """A hash that tells one online store from another: where it is, and of a file which one, as a lost one is made anew at its place."""
    connection = redis_connection(settings.online)
    file = Path(feature_store_folder(settings.lake), store.SQLITE_FILE)
    where = f"{file} {file.stat().st_ino if file.is_file() else ''}" if connection is None else connection
    return hashlib.sha256(f"{settings.online.store} {where}".encode()).hexdigest()


def open_feature_store(settings: Settings) -> Any:
    """The Feast store of the settings with all definitions applied."""
    folder = feature_store_folder(settings.lake)
    feature_store = store.open_store(folder=folder, online=settings.online, redis_connection=redis_connection(settings.online))
    store.apply_definitions(feature_store, heads=settings.list_names)
    return feature_store


def published_history(night: Night) -> DataFrame:
    """One row per item and publication with its time: what Feast's offline view of the lists reads.

    A run may be published more than once: by a rollback, or by a night that was forced.
    """
    records = [record for record in night.ledger.records(status="succeeded") if ITEM_NEIGHBORS.name in record.output_versions]
    rows = [(record.run_id, record.ended_at) for record in records]
    publications = night.spark.createDataFrame(rows, "run_id string, published_at timestamp")
    history = night.lake.read(ITEM_NEIGHBORS_HISTORY).join(F.broadcast(publications), "run_id", how="inner")
    return store.pivot_neighbors(history, night.settings.list_names, published_at="published_at")


def lists_served_at(night: Night, entities: DataFrame) -> DataFrame:
    """Which lists were served at each (item_id, event_timestamp) of `entities`, by Feast's point-in-time join.

    A list of run date D exists from its publication on, and not before D+1 00:00 UTC, so that a ranker never trains on a list that could
    not have been shown yet.
    """
    return store.neighbors_at(night.spark, open_feature_store(night.settings), history=published_history(night), entities=entities)
