"""`make bench-pairs`: counting pairs side by side with DuckDB, Polars, the plain Spark self-join and scipy, on the same cores.

Every method runs in a process of its own, once to warm up and then `--runs` times; its answer is compared with ours. Rows are kept in
`var/bench/pairs.json` and replaced one by one, so that a long benchmark can be run in parts: `ARGS="--works clicks-64m --methods mtmh"`.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table as RichTable

from conf.errors import MachineError
from conf.settings import SparkSettings
from features.event_files import EventFiles
from features.pairs import Counting, write_pairs
from jobs.arguments import report_errors
from jobs.bench_night import bench_night
from jobs.bench_peers import HALF_LIFE_DAYS, answers_differ, duckdb_pairs, duckdb_state, polars_pairs, scipy_pairs, self_join_pairs
from jobs.bench_picture import draw_times
from jobs.bench_rows import FOLDER, Json, keep_row, kept_rows
from jobs.bench_worlds import NUM_DAYS, START, Work, open_work
from jobs.session import start_session

_PATH = FOLDER / "pairs.json"
WORKS = ("clicks-1m", "clicks-4m", "clicks-16m", "grocery", "ifdb_games")
METHODS = ("mtmh", "mtmh_answer", "duckdb", "duckdb_state", "polars", "scipy", "self_join", "radix_sort", "simd_sort")
_PEERS: Mapping[str, Callable[[Work, Path], None]] = {
    "duckdb": duckdb_pairs,
    "duckdb_state": duckdb_state,
    "polars": polars_pairs,
    "scipy": scipy_pairs,
}
_SUITABLE: Mapping[str, Callable[[Work], bool]] = {
    "scipy": lambda work: work.one_session_a_day,
    "radix_sort": lambda work: work.window.kind == "session",
    "simd_sort": lambda work: work.window.kind == "session",
}
_PHASES = ("read_and_pack", "windows", "count_and_write")  # stages of `write_pairs`
_NO_CAP = 1_000_000  # peers cannot draw the items that a cap would keep


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is asked for, print the table, write the numbers and the picture."""

    def run() -> None:
        values = _arguments(argv)
        if values.one:
            print(json.dumps(_measure(values.one, open_work(values.works[0], FOLDER / "work"), values.runs)))
            return
        FOLDER.mkdir(parents=True, exist_ok=True)
        for name in values.works:
            work = open_work(name, FOLDER / "work")
            for method in values.methods:
                if method in _SUITABLE and not _SUITABLE[method](work):
                    continue
                keep_row(_run(method, work, runs=values.runs, limit=values.limit), _PATH)
        for name in values.nights:
            found, peak = _child("night", name, runs=1, limit=10 * values.limit)
            for row in found.get("rows", [{"work": f"night of {name}", "size": 0, "method": "mtmh", "runs": 0, **found}]):
                keep_row(row | {"peak_rss_mb": peak}, _PATH)
        _show(Console())

    report_errors(run)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="the benchmark of pair counting")
    parser.add_argument("--works", nargs="*", default=list(WORKS), help="clicks-<millions>m, grocery, ifdb_games")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS, help="which of the methods")
    parser.add_argument("--nights", nargs="*", default=[], help="works whose last day is added by an incremental night, and by a rebuild")
    parser.add_argument("--runs", type=int, default=3, help="timed runs after the first")
    parser.add_argument("--limit", type=int, default=900, help="seconds after which a method is given up")
    parser.add_argument("--one", choices=[*METHODS, "night"], help=argparse.SUPPRESS)
    return parser.parse_args(argv)


# --- One method in its own process ---------------------------------------------------------------------------------------------


def _measure(method: str, work: Work, runs: int) -> Json:
    if method == "night":
        return {"rows": list(bench_night(work, FOLDER / "night"))}
    if method.endswith("_sort"):
        return _limit(method, work, runs)
    out = _answer(work, method)
    out.parent.mkdir(parents=True, exist_ok=True)
    if method in _PEERS:
        return {"seconds": [_timed(lambda: _PEERS[method](work, out)) for _ in range(1 + runs)]}
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as log:
        logged = {"spark.eventLog.enabled": "true", "spark.eventLog.dir": f"file://{log}", "spark.eventLog.compress": "false"}
        spark = start_session(SparkSettings(settings=logged | {"spark.eventLog.rolling.enabled": "false"}), app_name=f"bench {method}")
        found: Json = {"session_s": time.monotonic() - begin}
        count = self_join_pairs if method == "self_join" else partial(_our_pairs, with_days=method == "mtmh")
        found["seconds"] = [_timed(lambda: count(spark, work, out)) for _ in range(1 + runs)]
        if method == "mtmh":
            found |= _emitted(out)
        spark.stop()
        found["tasks"] = _task_times(Path(log))
    return found


def _timed(work: Callable[[], object]) -> float:
    begin = time.monotonic()
    work()
    return time.monotonic() - begin


def _our_pairs(spark: Any, work: Work, out: Path, *, with_days: bool) -> None:
    """Count as build_pairs does when it starts from nothing: with the daily table, which later nights build on, or the answer alone."""
    folders = {"totals": out} | ({"daily": out.with_name("days")} if with_days else {})
    for folder in folders.values():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    files = {str(path.absolute()): path.stat().st_size for path in work.folder.glob("*.parquet")}
    items, days = _items_and_days(work.folder)
    counting = Counting(window=work.window, max_items_per_user_day=_NO_CAP, max_triggers_per_target=_NO_CAP, min_users=2, hash_key=b"bench")
    decay: Json = {"landmark": START.date(), "half_life_days": HALF_LIFE_DAYS, "holdout_from": START.date()}
    uris = {kind: str(folder.absolute()) for kind, folder in folders.items()}
    write_pairs(spark, EventFiles(sizes=files), counting, days=days, items=items, folders=uris, **decay).collect()


def _items_and_days(folder: Path) -> tuple[pa.Array, dict[date, int]]:
    """What build_pairs knows before it counts: all items, ascending, and the engagements of each day."""
    columns = ds.dataset(folder).to_table(columns=["item_id", "event_date"])
    days = columns["event_date"].value_counts().to_pylist()
    return columns["item_id"].unique().sort(), {day["values"]: day["counts"] for day in days}


def _emitted(out: Path) -> Json:
    """Pairs and days of users that were counted, and the rows that this made."""
    users = pa.table({"users": ds.dataset(out.with_name("days")).to_table(columns=["num_users"])["num_users"]})
    return {"emitted": pc.sum(users["users"]).as_py(), "daily_rows": users.num_rows}


def _task_times(log: Path) -> Json:
    """Of all stages that took over a second of task time: the longest task against the median one. Seconds of tasks in the last stages."""
    times: dict[tuple[int, int], list[float]] = {}
    for line in (line for path in log.iterdir() for line in path.read_text().splitlines() if "SparkListenerTaskEnd" in line):
        event = json.loads(line)
        info = event["Task Info"]
        stage = (event["Stage ID"], event["Stage Attempt ID"])
        times.setdefault(stage, []).append((info["Finish Time"] - info["Launch Time"]) / 1000)
    heavy = [sorted(tasks) for tasks in times.values() if len(tasks) > 2 and sum(tasks) > 1]
    seconds = sorted(task for tasks in heavy for task in tasks)
    phases = dict(zip(_PHASES, (sum(times[stage]) for stage in sorted(times)[-len(_PHASES) :]), strict=False))
    edges = [0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, float("inf")]
    histogram = {f"<{high}": sum(low <= task < high for task in seconds) for low, high in pairwise(edges)}
    worst = max((tasks[-1] / max(statistics.median(tasks), 0.01) for tasks in heavy if tasks[-1] > 1), default=1.0)
    return {"histogram": histogram, "longest_s": seconds[-1] if seconds else 0.0, "worst_skew": worst, "phases": phases}


# --- All of them ---------------------------------------------------------------------------------------------------------------


def _run(method: str, work: Work, *, runs: int, limit: int) -> Json:
    """A row of the benchmark: one method on one piece of work, its answer compared with ours."""
    row: Json = {"work": work.name, "size": work.size, "method": method}
    found, peak = _child(method, work.name, runs=runs, limit=limit)
    if "fault" in found:
        _forget(work, method)
        return row | {"runs": 0, "peak_rss_mb": peak} | found
    first, *seconds = found.pop("seconds")
    row |= {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds), "runs": len(seconds)}
    if method in _PEERS or method in ("self_join", "mtmh_answer"):
        _compare(method, work)
    return row | {"first_s": first, "peak_rss_mb": peak} | found


def _answer(work: Work, method: str) -> Path:
    """Where a method leaves its answer: a file or a folder."""
    return FOLDER / "answers" / work.name / f"{method}.parquet"


def _forget(work: Work, method: str) -> None:
    """Remove what a method that failed has left of its answer: nobody's may be compared with it."""
    left = _answer(work, method)
    if left.is_dir():
        shutil.rmtree(left)
    left.unlink(missing_ok=True)


def _compare(method: str, work: Work) -> None:
    mine, other = (_answer(work, name) for name in ("mtmh", method))
    if not mine.exists():
        raise MachineError(f"no answer of mtmh on {work.name} to compare {method} with: it failed, or does not come first in --methods")
    if difference := answers_differ(mine, other, other_has_more=method == "scipy"):
        raise MachineError(f"{method} and mtmh answer differently on {work.name}: {difference}")


def _child(method: str, name: str, *, runs: int, limit: int) -> tuple[Json, float]:
    """What a method in a process of its own says, or its `fault`; and its peak memory in MB."""
    command = [sys.executable, "-m", "jobs.bench_pairs", "--one", method, "--works", name, "--runs", str(runs)]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)  # noqa: S603 - our own command
        peak = _watch(process, limit)
        output.seek(0)
        said = output.read().splitlines()
    if process.returncode:
        return {"fault": _cause(said) if process.returncode > 0 else f"given up after {limit} s"}, peak
    return json.loads(said[-1]), peak


def _cause(said: Sequence[str]) -> str:
    """The last line that names an error, of a process that may go on to print a stack of Java's."""
    named = [line.strip() for line in said if "rror" in line or "xception" in line]
    return (named or [line.strip() for line in said] or ["it ended without a word"])[-1]


def _watch(process: "subprocess.Popen[bytes]", limit: int) -> float:
    """Wait for the process, and return the largest memory of its process group in MB; shared pages count once."""
    peak, end = 0.0, time.monotonic() + limit
    while process.poll() is None:
        peak = max(peak, _memory_mb(process.pid))
        if time.monotonic() > end:
            os.killpg(process.pid, 9)
        threading.Event().wait(0.3)
    return peak


def _memory_mb(group: int) -> float:
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(folder.name)) == group:
                lines = (folder / "smaps_rollup").read_text().splitlines()
                total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        except OSError:
            continue  # it has ended meanwhile
    return total / 1024


def _limit(method: str, work: Work, runs: int) -> Json:
    """What the machine could do at best: sorting the keys of all pairs of sessions, and moving memory."""
    keys = _pair_keys(work)
    sort: Callable[[], object] = (lambda: _radix_sort(keys)) if method == "radix_sort" else (lambda: np.sort(keys))
    buffer = np.zeros(50_000_000)
    copied = min(_timed(lambda: np.copyto(buffer[:25_000_000], buffer[25_000_000:])) for _ in range(5))
    seconds = [_timed(sort) for _ in range(1 + runs)]
    return {"seconds": seconds, "num_keys": len(keys), "bandwidth_gb_s": 2 * 25_000_000 * 8 / copied / 1e9}


def _pair_keys(work: Work) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(i << 32) | j of every two different items of a session, once per session, smaller code first."""
    table = pq.read_table(work.folder, columns=["session_id", "item_id"])
    session, item = (table[name].combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64) for name in table.column_names)
    rows = np.unique((session << 32) | item)
    session, item = rows >> 32, rows & 0xFFFFFFFF
    found = []
    for gap in range(1, int(np.bincount(session).max())):
        same = session[gap:] == session[:-gap]
        found.append((item[:-gap][same] << 32) | item[gap:][same])
    return np.random.default_rng(0).permutation(np.concatenate(found))


def _radix_sort(keys: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Least significant digit first, 16 bits at a time: numpy's stable sort of 16-bit integers is a radix sort."""
    for shift in range(0, max(1, int(keys.max()).bit_length()), 16):
        keys = keys[np.argsort(((keys >> shift) & 0xFFFF).astype(np.uint16), kind="stable")]
    return keys


# --- What is known so far ------------------------------------------------------------------------------------------------------


def _show(console: Console) -> None:
    rows = kept_rows(_PATH)
    table = RichTable("work", "events", "method", "median s", "ratio", "runs", "peak MB", "note", title=f"counting pairs, {NUM_DAYS} days")
    ours = {row["work"]: row.get("median_s") for row in rows if row["method"] == "mtmh"}
    for row in sorted(rows, key=lambda row: (row["size"], row["work"], row.get("median_s", 1e9))):
        mine, median = ours.get(row["work"]), row.get("median_s")
        ratio = f"{median / mine:.2f}" if mine and median else "-"
        shown = [f"{median:.1f}" if median else "-", ratio, str(row["runs"]), f"{row.get('peak_rss_mb', 0):,.0f}", _note(row)]
        table.add_row(row["work"], f"{row['size']:,}", row["method"], *shown)
    console.print(table)
    draw_times(rows, FOLDER / "pairs.svg")
    for line in _slope(rows):
        console.print(line)


def _note(row: Json) -> str:
    if "fault" in row:
        return str(row["fault"])
    if "num_keys" in row:
        return f"{row['num_keys']:,} keys, {row['num_keys'] / row['median_s']:,.0f}/s, one thread; memory {row['bandwidth_gb_s']:.1f} GB/s"
    if "emitted" in row:
        tasks = row["tasks"]
        speed = row["emitted"] / row["median_s"]
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in tasks["phases"].items())
        skew = f"longest task {tasks['longest_s']:.1f} s, {tasks['worst_skew']:.1f} x its stage's median"
        return f"session {row['session_s']:.1f} s; {row['emitted']:,} pairs, {speed:,.0f}/s; seconds of tasks: {parts}; {skew}"
    return str(row.get("note", f"session {row['session_s']:.1f} s" if "session_s" in row else ""))


def _slope(rows: Sequence[Json]) -> list[str]:
    """How time grows with emitted pairs, between the click logs of 4 million events and more."""
    ours = sorted((row["size"], row) for row in rows if row["method"] == "mtmh" and row["work"].startswith("clicks-") and "emitted" in row)
    ours = [(size, row) for size, row in ours if size >= 4_000_000]
    if len(ours) < 2:
        return []
    (_, small), (_, large) = ours[0], ours[-1]
    slope = np.log(large["median_s"] / small["median_s"]) / np.log(large["emitted"] / small["emitted"])
    return [f"time grows as emitted pairs to the power {slope:.2f} from {small['work']} to {large['work']}"]


if __name__ == "__main__":
    main()
