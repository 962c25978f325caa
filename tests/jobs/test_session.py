"""What Spark's Python workers are spared before and in every task."""

import os
from collections.abc import Iterator

import pyarrow as pa
from pyspark.sql import SparkSession

from conf.memory import KEPT_MEMORY


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
