"""How fast the explorer answers: `make bench-explorer` lays a made-up night of a million items and asks a real server, as a browser would.

Titles are of Zipf-distributed made-up words; lists hold random neighbors, `--list-length` a head. The lake is laid once per size and
kept below var/bench. Times are those of whole requests over loopback, in seconds; the index is built once, as a night does at publish.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, date, datetime
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import yaml
from deltalake import WriterProperties, write_deltalake
from rich.console import Console
from rich.table import Table as RichTable

from conf.settings import load_settings
from conf.tables import ITEM_ANNOTATIONS, ITEM_FEATURES, ITEM_NEIGHBORS, ITEM_POPULARITY, RUNS
from jobs.arguments import report_errors
from jobs.explorer.night import PublishedNight
from jobs.session import ROOT

_NIGHT, _RUN = date(2024, 3, 31), "2024-03-31-bench"
_HEADS = ("engagement", "merged", "relevance")
_PORT = 8764
_NUM_WORDS = 60_000
_LISTS_PER_GROUP = 300  # of a row group, which a lookup reads whole
_REASONS = pa.array([f"{days} users engaged with both, together on {days} user-days; found by counts" for days in range(60)])


def lay_lake(folder: Path, *, num_items: int, list_length: int) -> Path:
    """Write the tables that the explorer reads, unless they are there, and a settings file that names them."""
    config = folder / "bench.yaml"
    if config.is_file():
        return config
    root, rng = folder / "lake", np.random.default_rng(17)
    ids = pa.array([f"item-{number:08d}" for number in range(num_items)])
    days = np.sort(rng.zipf(1.3, num_items).clip(max=1_000_000))
    titles = pa.array(_titles(rng, num_items))
    nothing = {"tags": pa.nulls(num_items, pa.list_(pa.string())), "attributes": pa.nulls(num_items, pa.map_(pa.string(), pa.string()))}
    paths = pa.array([[f"department {number % 20}", f"category {number % 700}"] for number in range(num_items)])
    true = pa.array(np.ones(num_items, bool))
    features = {"item_id": ids, "title": titles, "categories": paths} | nothing
    features |= {"in_catalog": true, "eligible": true, "age_days": pa.array(np.full(num_items, 99, np.int32)), "num_user_days": days}
    write_deltalake(str(root / ITEM_FEATURES.name), pa.table(features))
    dates = pa.array(np.full(num_items, np.datetime64(_NIGHT)))
    popularity = {"item_id": ids, "num_users": days, "first_engaged_date": dates, "last_engaged_date": dates}
    write_deltalake(str(root / ITEM_POPULARITY.name), pa.table(popularity))
    first = pa.array(np.zeros(num_items, np.int64), pa.timestamp("us", "UTC"))
    annotations = {"item_id": ids, "event_timestamp": first, "created_timestamp": first, "text": titles}
    write_deltalake(str(root / ITEM_ANNOTATIONS.name), pa.table(annotations))
    groups = WriterProperties(max_row_group_size=_LISTS_PER_GROUP, compression="SNAPPY")
    write_deltalake(str(root / ITEM_NEIGHBORS.name), _lists(rng, ids, list_length), writer_properties=groups)
    _write_runs(root)
    content = {"lake": {"root": str(root)}, "source": {name: {"path": "none"} for name in ("events", "items")}}
    config.write_text(yaml.safe_dump(content | {"pairs": {"window": {"kind": "session"}}}))
    return config


def _titles(rng: np.random.Generator, num_items: int) -> list[str]:
    """Two to eight words each; frequent words are short and common, as in a real catalog."""
    letters = np.array(list("aaabcdeeefghiiklmnnoooprrsstttuvwy"))
    words = np.array(["".join(rng.choice(letters, int(length))) for length in rng.integers(3, 11, _NUM_WORDS)])
    chosen = words[(rng.zipf(1.2, (num_items, 8)) - 1) % _NUM_WORDS]
    return [" ".join(row[:length]) for row, length in zip(chosen.tolist(), rng.integers(2, 9, num_items).tolist(), strict=True)]


def _lists(rng: np.random.Generator, ids: pa.Array, list_length: int) -> pa.RecordBatchReader:
    """Rows of item_neighbors by item and head, a row group at a time: a night of this size does not fit memory."""
    first = _batch(rng, ids.slice(0, 1), ids, list_length)

    def batches() -> Iterator[pa.RecordBatch]:
        for start in range(0, len(ids), 2_000):
            yield _batch(rng, ids.slice(start, 2_000), ids, list_length)

    return pa.RecordBatchReader.from_batches(first.schema, batches())


def _batch(rng: np.random.Generator, triggers: pa.Array, ids: pa.Array, list_length: int) -> pa.RecordBatch:
    num_rows = len(triggers) * len(_HEADS)
    num = num_rows * list_length
    offsets = pa.array(np.arange(0, num + 1, list_length, dtype=np.int32))
    sources = pa.ListArray.from_arrays(pa.array(np.arange(num + 1, dtype=np.int32)), pa.array(["counts"] * num))
    user_days = rng.integers(1, 60, num)
    fields: dict[str, pa.Array] = {
        "neighbor_id": ids.take(pa.array(rng.integers(0, len(ids), num))),
        "score": pa.array(rng.random(num)),
        "reason": _REASONS.take(pa.array(user_days)),
        "sources": sources,
        "num_user_days": pa.array(user_days),
        "relevance": pa.array(rng.random(num)),
        "filled": pa.array(np.zeros(num, bool)),
    }
    neighbors = pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(list(fields.values()), list(fields)))
    of = np.repeat(np.arange(len(triggers)), len(_HEADS))
    columns = {
        "run_date": pa.array(np.full(num_rows, np.datetime64(_NIGHT))),
        "run_id": pa.array([_RUN] * num_rows),
        "item_id": triggers.take(pa.array(of)),
        "head": pa.array(list(_HEADS) * len(triggers)),
        "neighbors": neighbors,
    }
    return pa.RecordBatch.from_arrays(list(columns.values()), list(columns))


def _write_runs(root: Path) -> None:
    versions = [(table.name, 0) for table in (ITEM_ANNOTATIONS, ITEM_FEATURES, ITEM_POPULARITY, ITEM_NEIGHBORS)]
    row = {"run_id": _RUN, "run_date": _NIGHT, "stage": "publish_neighbors", "status": "succeeded", "sequence": 1}
    row |= {"ended_at": datetime(2024, 4, 1, tzinfo=UTC), "input_versions": [], "output_versions": versions}
    maps, at = pa.map_(pa.string(), pa.int64()), pa.timestamp("us", "UTC")
    types = {"run_id": pa.string(), "run_date": pa.date32(), "stage": pa.string(), "status": pa.string(), "sequence": pa.int64()}
    schema = pa.schema(types | {"ended_at": at, "input_versions": maps, "output_versions": maps})
    written = pa.Table.from_pylist([row], schema=schema)
    write_deltalake(str(root / RUNS.name), written)


def measure(config: Path, *, num_items: int, num_requests: int) -> list[dict[str, Any]]:
    """Start a server, wait for its first page, then time each kind of request."""
    command = [sys.executable, "-m", "jobs.explore", "--config", str(config), "--set", f"explorer.port={_PORT}"]
    begun = time.perf_counter()
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)  # noqa: S603 - our own command
    try:
        while not _answers():
            if server.poll() is not None:
                raise RuntimeError(f"the explorer ended with status {server.returncode}")
            time.sleep(0.02)
        rows = [_row("start to first page", num_items, np.array([time.perf_counter() - begun]))]
        rng = np.random.default_rng(5)
        for work, path in _works(config, rng, num_items):
            seconds = np.array([_seconds(path()) for _ in range(num_requests)])
            rows.append(_row(work, num_items, seconds))
    finally:
        server.terminate()
        server.wait()
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return [row | {"peak_rss_mb": round(peak)} for row in rows]


def _answers() -> bool:
    try:
        _seconds("/")
    except OSError:
        return False
    return True


def _works(config: Path, rng: np.random.Generator, num_items: int) -> list[tuple[str, Callable[[], str]]]:
    catalog = PublishedNight.open(load_settings(str(config))).catalog
    titles = [item.title for item in catalog.items([_id(number) for number in rng.integers(0, num_items, 500)]).values()]

    def words() -> list[str]:
        return str(rng.choice(titles)).split()[:2]

    def search(text: str) -> str:
        return "/search?" + urlencode({"q": text})

    def misspelled() -> str:
        first, *rest = words()
        place = int(rng.integers(1, len(first)))
        return " ".join([first[:place] + "q" + first[place:], *rest])

    return [
        ("lists of an item", lambda: f"/?item={_id(int(rng.integers(num_items)))}"),
        ("search: two words", lambda: search(" ".join(words()))),
        ("search: first three letters", lambda: search(words()[0][:3])),
        ("search: misspelled", lambda: search(misspelled())),
    ]


def _id(number: int) -> str:
    return f"item-{number:08d}"


def _seconds(path: str) -> float:
    begun = time.perf_counter()
    connection = HTTPConnection("127.0.0.1", _PORT, timeout=60)
    connection.request("GET", path)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    if answer.status != 200:
        raise RuntimeError(f"{path} was answered with status {answer.status}")
    return time.perf_counter() - begun


def _row(work: str, size: int, seconds: npt.NDArray[np.float64]) -> dict[str, Any]:
    low, middle, p95, high = (float(value) for value in np.quantile(seconds, [0, 0.5, 0.95, 1]))
    times = {"median_s": middle, "p95_s": p95, "min_s": low, "max_s": high}
    return {"work": work, "size": size, "method": "mtmh"} | times | {"runs": len(seconds)}


def main(argv: Sequence[str] | None = None) -> None:
    """Lay, measure, print, write var/bench/explorer.json."""
    parser = argparse.ArgumentParser(description="times of the explorer on a made-up night")
    parser.add_argument("--items", type=int, default=1_000_000, help="items of the catalog")
    parser.add_argument("--list-length", type=int, default=100, help="neighbors per list; a million items with 100 take 8 GB of disk")
    parser.add_argument("--requests", type=int, default=200, help="requests of each kind")

    def run() -> None:
        values = parser.parse_args(argv)
        folder = Path("var/bench") / f"explorer-{values.items}-{values.list_length}"
        folder.mkdir(parents=True, exist_ok=True)
        config = lay_lake(folder.absolute(), num_items=values.items, list_length=values.list_length)
        begun = time.perf_counter()
        PublishedNight.open(load_settings(str(config)))
        built = _row("build the index (once a night)", values.items, np.array([time.perf_counter() - begun]))
        rows = [built, *measure(config, num_items=values.items, num_requests=values.requests)]
        table = RichTable("work", "items", "median ms", "p95 ms", "runs", title="explorer", title_justify="left")
        for row in rows:
            times = (f"{1000 * row[name]:,.0f}" for name in ("median_s", "p95_s"))
            table.add_row(row["work"], f"{row['size']:,}", *times, str(row["runs"]))
        Console().print(table)
        content = {"machine": f"{os.cpu_count()} cores, {platform.machine()}", "list_length": values.list_length, "rows": rows}
        Path("var/bench/explorer.json").write_text(json.dumps(content, indent=1) + "\n")

    report_errors(run)


if __name__ == "__main__":
    main()
