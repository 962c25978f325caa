"""`make bench-neighbors`: search, publication, lookup and a changed policy, each beside what it is to be compared with.

Every work runs in a process of its own. Rows are kept in `var/bench/neighbors.json` and replaced one by one, so that a benchmark can be
run in parts: `ARGS="--works search ivf"`. The ratio is to `mtmh` on the same work.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from conf.errors import MachineError
from jobs.arguments import report_errors
from jobs.bench_filters import filters
from jobs.bench_lists import lookups, online, policy, publication
from jobs.bench_rows import FOLDER, Json, keep_row, kept_rows
from jobs.bench_search import ivf, search

WORKS: Mapping[str, Callable[[Path, int], Iterator[Json]]] = {
    "search": search,
    "ivf": ivf,
    "filters": filters,
    "publication": publication,
    "lookups": lookups,
    "online": online,
    "policy": policy,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is asked for, print the table, write the numbers."""

    def run() -> None:
        parser = argparse.ArgumentParser(description="the benchmark of neighbor lists")
        parser.add_argument("--works", nargs="*", default=list(WORKS), choices=list(WORKS), help="which parts")
        parser.add_argument("--items", type=int, default=100_000, help="items of all works but ivf and policy")
        parser.add_argument("--one", choices=list(WORKS), help=argparse.SUPPRESS)
        values = parser.parse_args(argv)
        FOLDER.mkdir(parents=True, exist_ok=True)
        if values.one:
            for row in WORKS[values.one](FOLDER / "neighbors", values.items):
                print(json.dumps(row), flush=True)
            return
        for work in values.works:
            for row in _run(work, values.items):
                keep_row(row, _path())
        _show(Console())

    report_errors(run)


def _run(work: str, num_items: int) -> list[Json]:
    """The rows of one work, with the largest memory that its process group had."""
    command = [sys.executable, "-m", "jobs.bench_neighbors", "--one", work, "--items", str(num_items)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:  # noqa: S603 - our own command
        peak = _Peak(process.pid)
        out, _ = process.communicate()
    if process.returncode:
        raise MachineError(f"the work {work} of the benchmark failed with status {process.returncode}; see above")
    rows: list[Json] = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return [{"peak_rss_mb": peak.stop(), **row} for row in rows]


class _Peak(threading.Thread):
    """The largest memory of a session of processes in MB; pages that they share count once."""

    def __init__(self, session: int) -> None:
        super().__init__(daemon=True)
        self._session, self._end, self._peak = session, threading.Event(), 0.0
        self.start()

    def run(self) -> None:
        while not self._end.wait(0.3):
            self._peak = max(self._peak, self._now())

    def stop(self) -> float:
        """End, and say what was the most."""
        self._end.set()
        return round(self._peak, 1)

    def _now(self) -> float:
        total = 0
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if os.getsid(int(folder.name)) == self._session:
                    lines = (folder / "smaps_rollup").read_text().splitlines()
                    total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
            except OSError:
                continue  # it has ended meanwhile
        return total / 1024


def _path() -> Path:
    return FOLDER / "neighbors.json"


def _show(console: Console) -> None:
    rows = kept_rows(_path())
    ours = {(row["work"], row["size"]): row["median_s"] for row in rows if row["method"] == "mtmh"}
    table = RichTable(
        "work", "items", "method", "median s", "ratio", "runs", "peak MB", "note", title="neighbor lists", title_justify="left"
    )
    for row in rows:
        mine = ours.get((row["work"], row["size"]))
        ratio = f"{row['median_s'] / mine:.2f}" if mine else "-"
        shown = [f"{row['median_s']:.4g}", ratio, str(row["runs"]), f"{row['peak_rss_mb']:,.0f}", row.get("note", "")]
        table.add_row(row["work"], f"{row['size']:,}", row["method"], *shown)
    console.print(table)


if __name__ == "__main__":
    main()
