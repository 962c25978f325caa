"""The search works of `make bench-neighbors`: Spark tasks against bare FAISS and the machine's matrix product, IVF against exact search.

Vectors are learned-like: unit vectors around centers of unequal size in a space of falling variances, with a popularity bias as the last
dimension of the targets, as a head with the engagement task has.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyspark.sql import functions as F

from conf.settings import RetrievalSettings, SparkSettings
from jobs.session import start_session
from models.data import Floats
from models.search import ItemIndex, estimate_search, write_index

Json = dict[str, Any]
_DIMENSION = 127  # and the bias makes 128
_K = 100
_BLOCK = 1024
_SAMPLED = 2_000


def learned_vectors(num_items: int, *, seed: int = 0) -> tuple[Floats, Floats]:
    """(N, 128) triggers and (N, 128) targets."""
    rng = np.random.default_rng(seed)
    scale = (1 / np.sqrt(1 + np.arange(_DIMENSION) / 8)).astype(np.float32)
    num_centers = max(8, num_items // 200)
    centers = rng.standard_normal((num_centers, _DIMENSION), np.float32) * scale
    group = (num_centers * rng.random(num_items) ** 2).astype(np.int64)  # unequal sizes
    base = centers[group] + np.float32(0.5) * scale * rng.standard_normal((num_items, _DIMENSION), np.float32)
    noise = np.float32(0.2) * scale * rng.standard_normal((num_items, _DIMENSION), np.float32)
    bias = 0.02 * np.log(rng.pareto(1.2, num_items) + 1e-2)
    trigger, target = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (base, base + noise))
    return (
        np.column_stack([trigger, np.ones(num_items)]).astype(np.float32),
        np.column_stack([target, bias]).astype(np.float32),
    )


def times(work: Callable[[], object], runs: int, *, warm: bool = True) -> Json:
    """Seconds of some runs, after one to warm up unless the caller has done so."""
    seconds = []
    for number in range(runs + warm):
        begin = time.perf_counter()
        work()
        if number >= warm:
            seconds.append(time.perf_counter() - begin)
    return {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds), "runs": runs}


def search(folder: Path, num_items: int) -> Iterator[Json]:
    """All triggers against all items, 100 nearest each, on the same cores: mtmh in Spark tasks, bare FAISS, a product of the same shape."""
    folder.mkdir(parents=True, exist_ok=True)
    trigger, target = learned_vectors(num_items)
    cores = len(os.sched_getaffinity(0))
    settings = RetrievalSettings(search="exact")
    write_index(folder, "flat", target, np.arange(num_items, dtype=np.int32), queries=trigger[:1], settings=settings)
    np.save(folder / "trigger.npy", trigger)
    row = {"work": f"search of all, K = {_K}, 128-d", "size": num_items}
    faiss.omp_set_num_threads(cores)
    index = faiss.IndexFlatIP(target.shape[1])
    index.add(target)
    bare = times(lambda: index.search(trigger, _K), 1)
    yield row | bare | {"method": "faiss", "note": f"{cores} threads, one process: {num_items / bare['median_s']:,.0f} queries/s"}
    product = times(lambda: _products(trigger, target), 1)
    flops = 2 * num_items**2 * target.shape[1] / product["median_s"] / 1e9
    yield row | product | {"method": "matrix product", "note": f"{flops:,.0f} GFLOP/s, nothing is selected"}
    ours = _in_spark(folder, num_items, cores)
    share = bare["median_s"] / ours["median_s"]
    yield row | ours | {"method": "mtmh", "note": f"{cores} Spark tasks of one thread, one mapped index: {share:.0%} of bare FAISS"}


def _products(trigger: Floats, target: Floats) -> None:
    out = np.empty((_BLOCK, len(target)), np.float32)
    for start in range(0, len(trigger), _BLOCK):
        block = trigger[start : start + _BLOCK]
        np.matmul(block, target.T, out=out[: len(block)])


def _in_spark(folder: Path, num_items: int, cores: int) -> Json:
    spark = start_session(SparkSettings(master=f"local[{cores}]", driver_memory="2g"), app_name="bench search")
    triggers = spark.range(num_items).select(F.col("id").cast("int").alias("item"))
    blocks = triggers.repartitionById(4 * cores, F.floor(F.col("item") * (4 * cores) / num_items).cast("int"))
    found = blocks.mapInArrow(partial(_search_batches, folder=str(folder.absolute())), "item int, neighbors array<int>")
    measured = times(lambda: found.write.format("noop").mode("overwrite").save(), 1)
    spark.stop()
    return measured


def _search_batches(batches: Iterator[pa.RecordBatch], *, folder: str) -> Iterator[pa.RecordBatch]:
    faiss.omp_set_num_threads(1)
    index, trigger = ItemIndex.open(Path(folder), "flat"), np.load(Path(folder) / "trigger.npy", mmap_mode="r")
    for batch in batches:
        items = batch.column(0).to_numpy()
        found = index.search(np.asarray(trigger[items]), _K)
        lists = pa.ListArray.from_arrays(pa.array(np.arange(len(items) + 1, dtype=np.int32) * _K), pa.array(found.ravel()))
        yield pa.record_batch([batch.column(0), lists], names=["item", "neighbors"])


def ivf(folder: Path, _: int) -> Iterator[Json]:
    """Building and searching 100 k and 1 M learned-like vectors; the searches of all are reckoned from a sample of queries."""
    small, rows = _ivf_of(folder, 100_000)
    yield from rows
    large, rows = _ivf_of(folder, 1_000_000)
    yield from rows
    note = f"{small:.0f} s for 100,000: grows as n^{np.log10(large / small):.2f}"
    row = {"work": "IVF, build and search all", "size": 1_000_000, "method": "mtmh", "runs": 1, "note": note}
    yield row | dict.fromkeys(("median_s", "min_s", "max_s"), large)


def _ivf_of(folder: Path, num_items: int) -> tuple[float, list[Json]]:
    """Seconds to build and to search all, and the rows of one size; memory is measured before the exact index is there, too."""
    trigger, target = _mapped_vectors(folder, num_items)
    sample, queries = (trigger[np.random.default_rng(seed).choice(num_items, n, replace=False)] for seed, n in ((1, 256), (2, _SAMPLED)))
    stem, cores, bare_mb = f"ivf-{num_items}", len(os.sched_getaffinity(0)), _peak_mb(from_now=True)
    begin = time.perf_counter()
    report = write_index(
        folder, stem, target, np.arange(num_items, dtype=np.int32), queries=sample, settings=RetrievalSettings(search="ivf")
    )
    built = time.perf_counter() - begin
    faiss.omp_set_num_threads(cores)
    opened = ItemIndex.open(folder, stem)
    ours, found = _all_of(num_items, times(lambda: opened.search(queries, _K), 2)), opened.search(queries, _K)
    peak, size = _peak_mb(), target.nbytes / 2**20
    index = faiss.IndexFlatIP(target.shape[1])
    index.add(np.ascontiguousarray(target))
    exact, wanted = _all_of(num_items, times(lambda: index.search(queries, _K), 1)), index.search(queries, _K)[1]
    row = {"work": f"IVF against exact search, K = {_K}, 128-d", "size": num_items}
    note = f"{report}; recall on {_SAMPLED:,} other queries {_recall(found, wanted):.4f}; built in {built:.0f} s; "
    note += f"vectors {size:,.0f} MiB, at most {(peak - bare_mb) / size:.2f} x that above the {bare_mb:,.0f} MiB of the process before"
    estimate = estimate_search(num_items, num_items, target.shape[1], num_cores=cores, settings=RetrievalSettings())
    said = f"reckoned from {_SAMPLED:,} queries; the estimate said: {estimate}"
    mine = row | ours | {"method": "mtmh", "note": note, "peak_rss_mb": peak}
    return built + ours["median_s"], [mine, row | exact | {"method": "exact", "note": said, "peak_rss_mb": _peak_mb()}]


def _mapped_vectors(folder: Path, num_items: int) -> tuple[Floats, Floats]:
    """`learned_vectors` as mapped files, made in a process of their own, whose memory is not ours."""
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(_save_vectors, folder, num_items).result()
    trigger, target = (np.asarray(np.load(folder / f"{side}-{num_items}.npy", mmap_mode="r")) for side in ("trigger", "target"))
    return trigger, target


def _save_vectors(folder: Path, num_items: int) -> None:
    for side, vectors in zip(("trigger", "target"), learned_vectors(num_items), strict=True):
        np.save(folder / f"{side}-{num_items}.npy", vectors)


def _peak_mb(*, from_now: bool = False) -> float:
    """The most memory in MiB that this process has had; from now: what it has, from which on the most is counted."""
    if from_now:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def _all_of(num_items: int, measured: Json) -> Json:
    """From a sample of the queries to all."""
    return {name: value * num_items / _SAMPLED if name.endswith("_s") else value for name, value in measured.items()}


def _recall(found: npt.NDArray[np.integer], wanted: npt.NDArray[np.integer]) -> float:
    return float(np.mean([len(np.intersect1d(mine, best)) / len(best) for mine, best in zip(found, wanted, strict=True)]))
