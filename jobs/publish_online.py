"""Stage 6: the current lists go to the Feast online store, a shard of items at a time.

Publication is atomic per item, not across items: `run_id` beside each list shows which night it is from. An item that left the catalog
gets empty lists, since an online store never deletes. A killed publication goes on at the shard where it stopped.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from conf.tables import ITEM_NEIGHBORS, ITEM_NEIGHBORS_HISTORY
from features import store
from jobs.online import open_feature_store
from jobs.stage import StageRun, stage_main

STAGE = "publish_online"


def publish_online(run: StageRun) -> None:
    """Pivot to one row an item, write shard by shard, gate."""
    if not run.settings.online.enabled:
        run.note("online.enabled is false: nothing was written online")
        return
    rows = _rows(run)
    num_items = rows.count()
    folder = run.night.artifacts(f"online-{run.inputs[ITEM_NEIGHBORS.name]}")
    shards = _stage_shards(run, rows, folder, num_items)
    written = _Written(folder / "written.json")
    feature_store = open_feature_store(run.night)
    with run.night.display.watch("publish online", lambda: (written.num_items, num_items, "items")):
        store.write_online(feature_store, written.remaining(shards), on_shard=written.add)
    run.gate({"num_items_written": written.num_items, "num_items_expected": num_items})


def _rows(run: StageRun) -> DataFrame:
    """One row an item of the current night, and one with empty lists for each item that only earlier nights had."""
    heads = run.settings.list_names
    current = run.read(ITEM_NEIGHBORS)
    published = store.pivot_neighbors(current, heads, published_at=run.night.now)
    gone = run.read(ITEM_NEIGHBORS_HISTORY).select("item_id").distinct().join(published.select("item_id"), "item_id", how="left_anti")
    return published.unionByName(store.empty_lists(gone, heads, like=published))


def _stage_shards(run: StageRun, rows: DataFrame, folder: Path, num_items: int) -> list[Path]:
    """Parquet shards of about `shard_items` items, written once; a resumed publication finds them."""
    staged = folder / "shards"
    if not (staged / "_SUCCESS").is_file():
        num_shards = max(1, -(-num_items // run.settings.online.shard_items))
        rows.repartition(num_shards, F.xxhash64("item_id")).write.mode("overwrite").parquet(str(staged))
    return sorted(staged.glob("part-*.parquet"))


class _Written:
    """Which shards are online already, kept in a file beside them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._shards: dict[str, int] = json.loads(path.read_text()) if path.is_file() else {}
        self._current = ""

    @property
    def num_items(self) -> int:
        return sum(self._shards.values())

    def remaining(self, shards: Sequence[Path]) -> Iterator[pa.Table]:
        for shard in shards:
            if shard.name not in self._shards:
                self._current = shard.name
                yield pq.read_table(shard)

    def add(self, num_items: int) -> None:
        self._shards[self._current] = num_items
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(self._shards))
        partial.replace(self._path)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage alone."""
    stage_main(STAGE, publish_online, description="current lists to the Feast online store", argv=argv)


if __name__ == "__main__":
    main()
