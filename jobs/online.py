"""Where a night's Feast store lies, the secret that opens its online store, and what that store serves."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from redis import Redis
from redis.exceptions import RedisError, ResponseError

from conf.errors import MachineError, TableError
from conf.files import write_whole
from conf.settings import LakeSettings, OnlineSettings, Settings
from conf.tables import ITEM_NEIGHBORS, ITEM_NEIGHBORS_HISTORY
from features import store
from jobs.publication import published
from jobs.reader import changes_since, lake_root, shared_folder
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
    """A hash that tells one online store from another: where it is, and which one there. A lost file is made anew at its place, and a
    Redis server that was started again may have lost what it was told last.

    Raises:
        MachineError: Redis does not answer.
    """
    connection, folder = redis_connection(settings.online), feature_store_folder(settings.lake)
    file = Path(folder, store.SQLITE_FILE)
    if connection is None:
        which = str(file.stat().st_ino) if file.is_file() else ""
    else:
        with reaching_redis(settings.online):
            which = _redis_start(connection)
    described = [settings.online.store, store.project_of(folder), connection or str(file), which]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _redis_start(connection: str) -> str:
    """Which start of the server answers, by a connection string that is read as Feast reads it: host:port[,option=value,...]."""
    address, *rest = connection.split(",")
    host, _, port = address.partition(":")
    options: dict[str, Any] = {}
    for name, value in (part.split("=", 1) for part in rest if "=" in part):
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    with Redis(host=host, port=int(port), **options) as server:
        try:
            return str(server.info("server")["run_id"])
        except ResponseError:  # it may not be asked
            return ""


@dataclass(frozen=True, kw_only=True)
class Served:
    """What an online store was last brought to.

    Attributes:
        store: its identity.
        version: of item_neighbors.
        run_id: of the lists.
    """

    store: str
    version: int
    run_id: str

    def keep(self, lake: LakeSettings) -> None:
        """Beside the registry."""
        write_whole(_served_file(lake), json.dumps(asdict(self)))


def _served_file(lake: LakeSettings) -> Path:
    return Path(feature_store_folder(lake), "served.json")


def forget_served(lake: LakeSettings) -> None:
    """From now on some items may have other lists than the rest."""
    _served_file(lake).unlink(missing_ok=True)


def serves_published(settings: Settings) -> bool:
    """Whether the online store has all lists that item_neighbors has; a store that is another one, or was lost, does not.

    Raises:
        MachineError: Redis does not answer.
        PublishError: nothing is published.
    """
    root, file = lake_root(settings.lake), _served_file(settings.lake)
    if not file.is_file():
        return False
    current, served = published(root), Served(**json.loads(file.read_text(encoding="utf-8")))
    if served.run_id != current.run_id or served.store != store_identity(settings):
        return False
    try:
        return not changes_since(root, ITEM_NEIGHBORS, served.version)
    except TableError:  # so long ago that the log does not say
        return False


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
