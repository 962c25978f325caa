"""What Spark's Python workers are spared before and in every task."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pyarrow as pa
from pyspark.sql import SparkSession

from conf.memory import KEPT_MEMORY
from tests.conftest import ROOT


def _probe(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Which lists of files a worker reads anew when Spark has it forget its import caches, and what its memory is set to."""
    import importlib
    import zipimport

    import features.pair_kernels  # noqa: F401 - as every task of ours imports something of ours

    list(batches)
    archives = list(zipimport._zip_directory_cache)
    read: list[str] = []
    original = zipimport._read_directory
    zipimport._read_directory = lambda archive: read.append(archive) or original(archive)
    importlib.invalidate_caches()
    zipimport._read_directory = original
    memory = [f"{name}={os.environ.get(name)}" for name in KEPT_MEMORY]
    kinds = ["archive"] * len(archives) + ["read"] * len(read) + ["memory"] * len(memory)
    yield pa.RecordBatch.from_pydict({"kind": kinds, "text": [*archives, *read, *memory]})


def test_a_worker_reads_no_archive_again_and_keeps_its_memory(spark: SparkSession) -> None:
    rows = spark.range(1, numPartitions=1).mapInArrow(_probe, "kind string, text string").collect()
    found = {kind: [row["text"] for row in rows if row["kind"] == kind] for kind in ("archive", "read", "memory")}
    assert any(name.endswith(".jar") for name in found["archive"]), "Spark no longer has workers look for Python in its jar"
    assert found["read"] == []
    assert found["memory"] == [
        "ARROW_DEFAULT_MEMORY_POOL=system",
        f"MALLOC_MMAP_THRESHOLD_={32 << 20}",
        f"MALLOC_TRIM_THRESHOLD_={1 << 30}",
        "GLIBC_TUNABLES=glibc.malloc.hugetlb=1",
    ]


def _looked_at(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Objects that a worker looks through for garbage after each task, those that it does not, and how it talks with Spark."""
    import gc

    import features.swing  # noqa: F401 - with it scipy, which no first task has imported

    list(batches)
    sockets = ["unix" if os.environ.get("PYTHON_UNIX_DOMAIN_ENABLED", "").lower() == "true" else "tcp"]
    yield pa.RecordBatch.from_pydict({"looked_at": [len(gc.get_objects())], "frozen": [gc.get_freeze_count()], "socket": sockets})


def test_a_worker_looks_for_garbage_only_in_what_is_no_import(spark: SparkSession) -> None:
    tasks = spark.range(8, numPartitions=8)
    tasks.mapInArrow(_looked_at, "looked_at long, frozen long, socket string").collect()  # the first tasks of all workers
    rows = tasks.mapInArrow(_looked_at, "looked_at long, frozen long, socket string").collect()
    assert all(row["frozen"] > 10_000 and row["looked_at"] < row["frozen"] / 2 for row in rows), rows
    assert {row["socket"] for row in rows} == {"unix"}


def test_the_end_of_a_session_leaves_no_traceback() -> None:
    code = (
        "from conf.settings import SparkSettings\n"
        "from jobs.session import start_session\n"
        "spark = start_session(SparkSettings(), app_name='ends')\n"
        "print(spark.range(4).mapInArrow(lambda batches: batches, 'id long').count())\n"
        "spark.stop()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "4"
    assert "Traceback" not in done.stderr, done.stderr
