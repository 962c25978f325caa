"""The list works of `make bench-neighbors`: publication against a bare Parquet write, point lookups, the online stores, a changed policy.

All but the last work on made-up lists of three heads with 100 neighbors each; the policy is changed in the lake of `make demo`.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import UTC, date, datetime
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from conf.settings import Settings, load_settings
from conf.tables import CO_ENGAGEMENT_PAIRS, ITEM_ANNOTATIONS, ITEM_FEATURES, ITEM_NEIGHBORS, ITEM_POPULARITY, MERGE_POLICY, Table
from features import store
from features.sources import EPOCH
from jobs.bench_search import times
from jobs.online import feature_store_folder, open_feature_store
from jobs.processes import Processes
from jobs.progress import Display
from jobs.publish_neighbors import publish_lists
from jobs.publish_online import write_current
from jobs.reader import neighbors_of, open_table, table_exists
from jobs.session import start_session
from jobs.stage import StageRun, make_night, run_stage
from models.list_rows import ARROW_SCHEMA, list_hashes

Json = dict[str, Any]
_NIGHT = date(2024, 3, 31)
_HEADS = ("engagement", "merged", "relevance")
_LENGTH = 100
_ITEMS_PER_FILE = 4_096
_ROWS = 3_072  # of 1,024 items
_QUIET = Display(seconds_per_line=60)


def _settings(folder: Path, *assignments: str) -> Settings:
    spark = "spark.settings={spark.sql.files.openCostInBytes: '134217728'}"  # a partition a file, as the lists leave the search
    return load_settings("demo", [f"lake.root={(folder / 'lake').absolute()}", spark, *assignments])


def _made_up_lists(folder: Path, num_items: int) -> Path:
    """Parquet files of lists as the retriever gives them, each of a range of items."""
    source = folder / f"lists-{num_items}"
    if (source / "_done").exists():
        return source
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    rng, ids = np.random.default_rng(0), pa.array([f"{number:07d}" for number in range(num_items)])
    found = pa.array([["counts", "engagement"], ["engagement"], ["relevance", "content"], ["counts", "popularity"]])
    for start in range(0, num_items, _ITEMS_PER_FILE):
        items = np.arange(start, min(start + _ITEMS_PER_FILE, num_items))
        num = len(items) * len(_HEADS) * _LENGTH
        steps = rng.integers(1, max(2, (num_items - 1) // _LENGTH), (len(items) * len(_HEADS), _LENGTH))  # no item twice, never the trigger
        neighbor = ((np.repeat(items, len(_HEADS))[:, None] + steps.cumsum(axis=1)) % num_items).ravel()
        days, which = rng.integers(0, 30, num), pa.array(rng.integers(0, 4, num))
        words = pa.array(
            [f"{n} users engaged with both, together on {n} user-days; same aisle {n % 7}; found by counts, engagement" for n in range(30)]
        )
        columns = [ids.take(pa.array(neighbor)), pa.array(-np.sort(-rng.random(num))), words.take(pa.array(days)), found.take(which)]
        columns += [pa.array(days), pa.array(rng.random(num)), pa.array(np.zeros(num, bool))]
        flat = pa.StructArray.from_arrays(columns, fields=list(ARROW_SCHEMA.field("neighbors").type.value_type))
        lists = pa.ListArray.from_arrays(pa.array(np.arange(0, num + 1, _LENGTH, dtype=np.int32)), flat)
        rows = [ids.take(pa.array(np.repeat(items, len(_HEADS)))), pa.array(list(_HEADS) * len(items)), lists, pa.array(list_hashes(lists))]
        pq.write_table(pa.table(rows, schema=ARROW_SCHEMA), source / f"part-{start:08d}.parquet")
    (source / "_done").touch()
    return source


def publication(folder: Path, num_items: int) -> Iterator[Json]:
    """History, gate and commit of all lists, against writing the same rows as Parquet: by Spark, and by Arrow in as many tasks."""
    source, settings = _made_up_lists(folder, num_items), _settings(folder)
    shutil.rmtree(settings.lake.root, ignore_errors=True)
    spark = start_session(settings.spark, app_name="bench publication")
    lists, bare = spark.read.parquet(str(source)), folder / "bare"
    paths = [(number, str(path)) for number, path in enumerate(sorted(source.glob("part-*.parquet")))]
    names = spark.createDataFrame(paths, "task int, path string").repartitionById(len(paths), F.col("task")).select("path")
    row = {"work": "history, gate, commit", "size": num_items}
    few = spark.read.parquet(*(path for _, path in paths[:2]))
    few.write.mode("overwrite").parquet(str(bare))  # warms the writer up
    by_spark = times(lambda: lists.write.mode("overwrite").parquet(str(bare)), 1, warm=False)
    yield row | by_spark | {"method": "parquet by Spark", "note": f"{len(_HEADS)} heads of {_LENGTH}, the rows alone"}
    shutil.rmtree(bare)
    bare.mkdir()
    by_arrow = times(lambda: names.mapInArrow(partial(_write_bare, folder=str(bare)), "num_rows bigint").count(), 1, warm=False)
    yield row | by_arrow | {"method": "parquet by Arrow", "note": "the rows alone, in as many Spark tasks"}
    night = make_night(settings, _NIGHT, spark=spark, display=_QUIET)
    for stage, written in _before(lists).items():
        run_stage(night, stage, partial(_write, written=written))

    def publish(run: StageRun) -> None:
        run.night.lake.create(ITEM_NEIGHBORS)
        publish_lists(run, names, _read_lists, model_version="bench", expected=run.night.lake.version(ITEM_NEIGHBORS))

    ours = times(lambda: run_stage(night, "publish_neighbors", publish), 1, warm=False)
    spark.stop()
    ratios = (f"{ours['median_s'] / bare_s['median_s']:.2f} x {by}" for by, bare_s in (("Spark's", by_spark), ("Arrow's", by_arrow)))
    yield row | ours | {"method": "mtmh", "note": f"{', '.join(ratios)} bare write"}


def _read_lists(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The lists of some files, as a retriever would hand them over."""
    for batch in batches:
        for path in batch["path"].to_pylist():
            yield from pq.ParquetFile(path).iter_batches(_ROWS, use_threads=False)


def _write_bare(batches: Iterator[pa.RecordBatch], *, folder: str) -> Iterator[pa.RecordBatch]:
    """The same lists, and nothing else."""
    name = f"{folder}/{uuid4()}.parquet"
    with pq.ParquetWriter(name, ARROW_SCHEMA, compression="snappy") as writer:
        for rows in _read_lists(batches):
            writer.write_table(pa.table(rows).cast(ARROW_SCHEMA))
            yield pa.record_batch({"num_rows": pa.array([rows.num_rows])})


def _write(run: StageRun, *, written: Mapping[Table, DataFrame]) -> None:
    for table, frame in written.items():
        run.replace(table, frame)


def _before(lists: DataFrame) -> dict[str, dict[Table, DataFrame]]:
    """What the gate and the index of titles read, by the stage that writes it: five partners of each item, and a title."""
    items = lists.where("head = 'merged'")
    partners = items.select("item_id", F.explode(F.slice("neighbors.neighbor_id", 1, 5)).alias("partner"))
    item = {"item_id": F.col("item_id"), "title": F.concat(F.lit("title of "), "item_id")}
    index = {"item_index": F.col("item_id").cast("int"), "content_vector": F.array(F.lit(0.0))}
    pair = {"trigger_item_id": F.col("item_id"), "target_item_id": F.col("partner")}
    return {
        "ingest": {ITEM_ANNOTATIONS: _filled(items, ITEM_ANNOTATIONS, item | {"deleted": F.lit(False)})},
        "build_pairs": {
            CO_ENGAGEMENT_PAIRS: _filled(partners, CO_ENGAGEMENT_PAIRS, pair),
            ITEM_POPULARITY: _filled(items, ITEM_POPULARITY, item),
        },
        "build_features": {ITEM_FEATURES: _filled(items, ITEM_FEATURES, item | index)},
    }


def _filled(frame: DataFrame, table: Table, given: Mapping[str, Column]) -> DataFrame:
    """Rows of a table: given columns, ones where a value must be, and nothing elsewhere."""
    ones = {"double": F.lit(1.0), "bigint": F.lit(1), "int": F.lit(1), "date": F.lit(_NIGHT), "boolean": F.lit(True)}
    ones["timestamp"] = F.lit(EPOCH)
    return frame.select([given.get(c.name, ones.get(c.type, F.lit(None))).cast(c.type).alias(c.name) for c in table.columns])


def lookups(folder: Path, num_items: int) -> Iterator[Json]:
    """All lists of one item from Delta without Spark; needs the lake of the work `publication`."""
    root = _settings(folder).lake.root
    ids = [f"{number:07d}" for number in np.random.default_rng(3).integers(0, num_items, 60)]
    row = {"work": "point lookup in Delta", "size": num_items}
    yield row | _each(ids, lambda item: neighbors_of(root, [item])) | {"method": "mtmh"}
    files = open_table(root, ITEM_NEIGHBORS).file_uris()
    query = "SELECT * FROM read_parquet(?) WHERE item_id = ?"
    yield row | _each(ids, lambda item: duckdb.execute(query, [files, item]).fetchall()) | {"method": "duckdb over the file list"}


def _each(ids: Sequence[Any], ask: Any) -> Json:
    """Seconds of one question: median, least, most, and p99 in the note."""
    ask(ids[0])
    seconds = []
    for item in ids:
        begin = time.perf_counter()
        ask(item)
        seconds.append(time.perf_counter() - begin)
    p50, p99 = np.quantile(seconds, [0.5, 0.99])
    return {"median_s": float(p50), "min_s": min(seconds), "max_s": max(seconds), "runs": len(seconds)} | {
        "note": f"p50 {1000 * p50:.2f} ms, p99 {1000 * p99:.2f} ms"
    }


def online(folder: Path, num_items: int) -> Iterator[Json]:
    """Publication online and lookups there, on sqlite and on Redis; needs the lake of the work `publication`."""
    for kind in ("sqlite", "redis"):
        with _redis() if kind == "redis" else nullcontext("") as connection:
            if connection is None:
                continue
            os.environ["MTMH_REDIS"] = connection
            settings = _settings(folder, f"online.store={kind}")
            shutil.rmtree(feature_store_folder(settings.lake), ignore_errors=True)
            yield from _online(settings, num_items, kind)


def _online(settings: Settings, num_items: int, kind: str) -> Iterator[Json]:
    for most, work in ((1, "publish online, one process"), (None, "publish online again, a process a core")):
        begin = time.perf_counter()
        with Processes(most) as processes:
            write_current(settings, now=datetime.now(UTC), display=_QUIET, processes=processes)
        seconds = time.perf_counter() - begin
        rate = {"median_s": seconds, "min_s": seconds, "max_s": seconds, "runs": 1, "note": f"{num_items / seconds:,.0f} items/s"}
        yield {"work": work, "size": num_items, "method": "mtmh" if kind == "sqlite" else f"mtmh, {kind}"} | rate
    feature_store, rng = open_feature_store(settings), np.random.default_rng(4)
    for num_asked, runs in ((1, 1000), (100, 50)):
        asked = [[f"{number:07d}" for number in rng.integers(0, num_items, num_asked)] for _ in range(runs)]

        def ask(ids: list[str]) -> None:
            store.lookup_online(feature_store, ids, heads=settings.list_names, k=_LENGTH)

        row = {"work": f"online lookup of {num_asked}", "size": num_items, "method": "mtmh" if kind == "sqlite" else f"mtmh, {kind}"}
        yield row | _each(asked, ask)


@contextmanager
def _redis() -> Iterator[str | None]:
    """host:port of a server on a free port of the loopback; None where there is no redis-server."""
    program = shutil.which("redis-server")
    if program is None:
        print("no redis-server on PATH: its rows are left out", file=sys.stderr)
        yield None
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [program, "--port", port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:  # noqa: S603 - found above
        time.sleep(1)
        yield f"127.0.0.1:{port}"
        server.terminate()


def policy(_: Path, __: int) -> Iterator[Json]:
    """A changed policy in the lake of the demo, from the statement to lists that Delta and the online store serve."""
    settings = load_settings("demo")
    root = str(Path(settings.lake.root).absolute())
    if not table_exists(root, ITEM_NEIGHBORS):
        print("no lists in the lake of the demo: run `make demo` first; the work policy is left out", file=sys.stderr)
        return
    table = open_table(root, MERGE_POLICY)
    value = table.to_pyarrow_table().to_pylist()[0]["value"]
    begin = time.perf_counter()
    table.update(predicate="scope = 'default'", updates={"value": str(value + 0.01)})
    subprocess.run([sys.executable, "-m", "jobs.remerge", "--config", "demo"], check=True, stdout=sys.stderr)
    seconds = time.perf_counter() - begin
    num_items = open_table(root, ITEM_NEIGHBORS).to_pyarrow_dataset().count_rows() // len(settings.list_names)
    yield {"work": "policy to visible lists, online included", "size": num_items, "method": "mtmh", "runs": 1} | {
        "median_s": seconds,
        "min_s": seconds,
        "max_s": seconds,
        "note": "UPDATE of one row by delta-rs, then `python -m jobs.remerge`, start of the process included",
    }
