"""Faults on purpose: named points at every boundary and inside every write, where a drill kills the process or holds it.

    MTMH_FAULT=train_model.item_embeddings.written=kill python -m jobs.nightly --run-date 2017-11-30 --config demo

ends the night there with SIGKILL, as a lost machine would; the same command without the variable then finishes it.
`=hold:FILE` writes FILE instead and goes on once it has been removed, for whatever is to happen meanwhile. Off unless the variable is set:
a point then costs one look at a dictionary. Workers of torch and of Spark inherit the variable where they are started on this machine.

Points of a stage are `<stage>.started`, `.done` (its row of `runs` not yet written) and `.recorded`; of a table that it writes
`<stage>.<table>.writing` (files are there, no commit names them) and `.written`. POINTS lists the others.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VARIABLE = "MTMH_FAULT"
POINTS = {
    "train_model.rank.started": "a torch worker, before it reads",
    "train_model.rank.rehearsal": "a torch worker, in the middle of the rehearsal's steps (not where a resumed one begins)",
    "train_model.rank.training": "a torch worker, in the middle of its steps (not where a resumed one begins)",
    "train_model.rank.written": "a torch worker, checkpoint and vectors written, its status not",
    "publish_neighbors.index.written": "the search index is on disk, no list is made",
    "publish_neighbors.search": "a Python worker of Spark, with the first lists made",
    "publish_neighbors.gated": "the history holds the lists, the gate has passed",
    "publish_neighbors.linked": "the files of item_neighbors are there, no commit names them",
    "publish_neighbors.published": "item_neighbors is committed, `runs` does not say so",
    "publish_online.shard": "a shard of items is online, its mark is not written",
    "publish_online.marked": "a shard of items is online and marked",
    "report.written": "the page lies beside its place",
}
"""Points beside those that every stage and every table have."""
_POLL_SECONDS = 0.001


def reach(point: str) -> None:
    """Fault here, if the environment names this point."""
    if (wanted := os.environ.get(VARIABLE)) and wanted.partition("=")[0] == point:
        _fault(wanted.partition("=")[2])


@contextmanager
def while_writing(point: str, folder: str) -> Iterator[None]:
    """Fault as soon as a data file appears below a local folder in this block, if the environment names this point."""
    if os.environ.get(VARIABLE, "").partition("=")[0] != point:
        yield
        return
    before, end = set(Path(folder).glob("*.parquet")), threading.Event()

    def look() -> None:
        while not end.wait(_POLL_SECONDS):
            if set(Path(folder).glob("*.parquet")) - before:
                reach(point)
                return

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def _fault(action: str) -> None:
    verb, _, argument = action.partition(":")
    if verb == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if verb != "hold" or not argument:
        raise ValueError(f"{VARIABLE} asks for {action!r}; wanted kill or hold:FILE")
    Path(argument).touch()
    while Path(argument).exists():
        time.sleep(0.05)
