"""Stage 6: the current lists go to the Feast online store, a shard of items at a time; without Spark.

Publication is atomic per item, not across items: `run_id` beside each list shows which night it is from. An item that left the catalog
gets empty lists, since an online store never deletes. A killed publication goes on at the shard where it stopped.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from conf.faults import reach
from conf.files import write_whole
from conf.settings import LakeSettings, OnlineSettings, Settings
from conf.tables import ITEM_NEIGHBORS, ITEM_NEIGHBORS_HISTORY
from features import store
from features.pair_files import ends_in, open_uri
from jobs.ledger import Ledger, StageRecord, recorded
from jobs.online import (
    Served,
    feature_store_folder,
    forget_served,
    open_feature_store,
    reaching_redis,
    redis_connection,
    serves_published,
    store_identity,
)
from jobs.processes import Processes
from jobs.progress import Display
from jobs.publication import Published, item_ids_ever, published
from jobs.reader import artifacts_of, changes_since, lake_root, open_table
from jobs.stage import Night, StageRun, stage_main
from jobs.turns import online_turn
from validation.gates import run_gate
from validation.suites import GateContext, rules_for

STAGE = "publish_online"
_MOST_WRITERS = {"sqlite": 2, "redis": 4}  # sqlite lets one write at a time, a third of the work, and others wait for some seconds only
_LISTS = pa.schema([("item_id", pa.string()), ("head", pa.string()), ("ids", pa.list_(pa.string())), ("scores", pa.list_(pa.float64()))])


def publish_online(run: StageRun) -> None:
    """Write the current lists online, gate."""
    if not run.settings.online.enabled:
        run.note("online.enabled is false: nothing was written online")
        return
    version = run.version(ITEM_NEIGHBORS)
    run.version(ITEM_NEIGHBORS_HISTORY)
    with Processes() as processes:
        current, metrics = write_current(run.settings, now=run.night.now, display=run.night.display, processes=processes)
    if changes_since(run.night.lake.root, ITEM_NEIGHBORS, version):
        run.note(f"run {current.run_id} was published meanwhile (item_neighbors version {current.version}): its lists are online")
    run.gate(metrics)


def online_stands(night: Night) -> bool:
    """Whether the online store serves what is published, where one is wanted; it may be another one, or lost, since the night wrote it."""
    return not night.settings.online.enabled or serves_published(night.settings)


def write_current(settings: Settings, *, now: datetime, display: Display, processes: Processes) -> tuple[Published, dict[str, float]]:
    """Write all published lists, and empty ones for items that only other kept nights had, in several processes.

    What is published is looked at once nobody else writes the store: whoever published last also has the last word online.

    Returns:
        What was written; num_items_written and num_items_expected, which of a resumed publication both count what was written before.
    """
    root = lake_root(settings.lake)
    with online_turn(settings.lake, say=display.say):
        current = published(root)
        shards, folder = _Shards(root, current.version, settings.online.shard_items), artifacts_of(settings.lake, current.run_id)
        folder.mkdir(parents=True, exist_ok=True)
        write = partial(_write_shard, settings=settings, run_id=current.run_id, as_of=current.run_date.isoformat(), written_at=now)
        open_feature_store(settings)  # with its definitions, before anybody writes
        identity = store_identity(settings)
        written = _Written(folder / f"online-{current.version}.json", identity)
        forget_served(settings.lake)
        with display.watch("publish online", lambda: (written.num_items, shards.num_items, "items")):
            for name, num_items in processes.deal(write, written.remaining(shards), most=_MOST_WRITERS[settings.online.store]):
                written.add(name, num_items)
        Served(store=identity, version=current.version, run_id=current.run_id).keep(settings.lake)
        written.finish()
    return current, {"num_items_written": written.num_items, "num_items_expected": shards.num_items}


@dataclass(frozen=True, kw_only=True)
class _Shard:
    """Some items of a file of lists (path or URI; None: such that have left). Its name stays when a killed publication goes on."""

    name: str
    uri: str | None
    items: pa.Array

    def lists(self) -> pa.Table:
        """As `store.online_rows` wants them."""
        if self.uri is None:
            nothing = [pa.nulls(len(self.items), field.type) for field in list(_LISTS)[1:]]
            return pa.table([self.items, *nothing], schema=_LISTS)
        files, path = open_uri(self.uri)
        with files.open_input_file(path) as source:
            return _ids_and_scores(pq.ParquetFile(source), self.items)


def _write_shard(shard: _Shard, *, settings: Settings, run_id: str, as_of: str, written_at: datetime) -> tuple[str, int]:
    """Its name and how many items it has, once they are online."""
    rows = store.online_rows(shard.lists(), settings.list_names, run_id=run_id, as_of=as_of, written_at=written_at)
    with reaching_redis(settings.online):
        store.write_online(_defined_store(settings.lake, settings.online, written_at), rows)
    return shard.name, rows.num_rows


@lru_cache(maxsize=1)
def _defined_store(lake: LakeSettings, online: OnlineSettings, _: datetime) -> Any:
    """The Feast store, whose definitions somebody has applied: one for each process and publication, as it remembers them."""
    return store.open_store(folder=feature_store_folder(lake), online=online, redis_connection=redis_connection(online))


def follow_online(settings: Settings, *, like: StageRecord, display: Display, now: datetime, processes: Processes) -> None:
    """Bring the online store to the published version, unless it is there, with a row in `runs`; after a kill it goes on.

    Args:
        settings: where.
        like: the row of the run whose lists are published.
        display: progress.
        now: aware time of this publication.
        processes: that write.
    """
    root = lake_root(settings.lake)
    ledger, current = Ledger(root=root), published(root)
    if not settings.online.enabled or serves_published(settings):
        return
    with recorded(ledger, STAGE, run_id=current.run_id, run_date=current.run_date, like=like) as attempt:
        attempt.inputs[ITEM_NEIGHBORS.name] = current.version
        current, metrics = write_current(settings, now=now, display=display, processes=processes)
        attempt.inputs[ITEM_NEIGHBORS.name] = current.version  # somebody may have published while this waited
        attempt.metrics |= metrics
        report = run_gate(STAGE, attempt.metrics, rules_for(STAGE, GateContext(gates=settings.gates, source=settings.source)))
        attempt.gates = report.to_json()
    display.say(f"the online store serves run {current.run_id}: {attempt.metrics['num_items_written']:,.0f} items")


class _Shards:
    """The items of one version, at most `most` at a time; a file of the table holds all lists of its items."""

    def __init__(self, root: str, version: int, most: int) -> None:
        table = open_table(root, ITEM_NEIGHBORS, version)
        self._files = {uri: _items_of(uri) for uri in table.file_uris()}
        self._most = most
        current = pc.unique(pa.chunked_array([*self._files.values()], pa.string()))
        ever = item_ids_ever(root)
        self._gone = ever.filter(pc.invert(pc.is_in(ever, current)))
        self.num_items = len(current) + len(self._gone)

    def __iter__(self) -> Iterator[_Shard]:
        for uri, items in [*self._files.items(), (None, self._gone)]:
            for start in range(0, len(items), self._most):
                some = pa.concat_arrays([items.slice(start, self._most)])  # a slice would travel whole
                name = f"{'gone' if uri is None else uri.rsplit('/', 1)[-1]} {start} {len(some)}"
                yield _Shard(name=name, uri=uri, items=some)


def _items_of(uri: str) -> pa.Array:
    files, path = open_uri(uri)
    return pc.unique(pq.read_table(path, filesystem=files, columns=["item_id"], partitioning=None)["item_id"].cast(pa.string()))


def _ids_and_scores(file: pq.ParquetFile, items: pa.Array) -> pa.Table:
    """Item, head, neighbor ids and scores of some items of a file; nothing else of a neighbor is read."""
    paths = [file.metadata.schema.column(number).path for number in range(file.metadata.num_columns)]
    wanted = [path for path in paths if path in ("item_id", "head") or path.endswith((".neighbor_id", ".score"))]
    low, high = pc.min_max(items).as_py().values()
    ends = [ends_in(file.metadata.row_group(number), "item_id") for number in range(file.num_row_groups)]
    groups = [number for number, found in enumerate(ends) if found is None or (found[0] <= high and found[1] >= low)]
    rows = file.read_row_groups(groups, columns=wanted)
    rows = rows.filter(pc.is_in(rows["item_id"].cast(pa.string()), items)).combine_chunks()
    neighbors = rows["neighbors"].chunk(0) if rows.num_rows else pa.array([], rows.schema.field("neighbors").type)
    flat, lengths = neighbors.flatten(), pc.fill_null(pc.list_value_length(neighbors), 0).to_numpy(zero_copy_only=False)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    lists = [pa.ListArray.from_arrays(offsets, flat.field(name)) for name in ("neighbor_id", "score")]
    return pa.table([rows["item_id"], rows["head"], *lists], names=_LISTS.names).cast(_LISTS)


class _Written:
    """Which shards are online already, kept in a file until all of them are; those in another store do not count."""

    def __init__(self, path: Path, store_is: str) -> None:
        self._path, self._store = path, store_is
        kept = json.loads(path.read_text()) if path.is_file() else {}
        self._shards: dict[str, int] = kept["shards"] if kept.get("store") == store_is else {}

    @property
    def num_items(self) -> int:
        return sum(self._shards.values())

    def remaining(self, shards: _Shards) -> list[_Shard]:
        return [shard for shard in shards if shard.name not in self._shards]

    def add(self, name: str, num_items: int) -> None:
        reach("publish_online.shard")
        self._shards[name] = num_items
        write_whole(self._path, json.dumps({"store": self._store, "shards": self._shards}))
        reach("publish_online.marked")

    def finish(self) -> None:
        """From here on a repeated publication writes everything anew."""
        self._path.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage alone."""
    stage_main(STAGE, publish_online, description="current lists to the Feast online store", stands=online_stands, argv=argv)


if __name__ == "__main__":
    main()
