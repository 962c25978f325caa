"""Pieces of work in processes of their own: real ones, also killed ones."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conf.errors import MachineError, PublishError
from jobs.processes import Processes


def _square(number: int) -> tuple[int, int]:
    time.sleep(0.2)  # so that one process does not do both
    return number * number, os.getpid()


def _fail(number: int) -> int:
    if number == 1:
        raise PublishError("number 1 is bad")
    return number


def _die(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL if number == 1 else 0)
    return number


def _sleep(folder: str) -> None:
    Path(folder, str(os.getpid())).touch()
    time.sleep(600)


def test_pieces_are_dealt_to_processes_and_one_alone_is_not() -> None:
    with Processes(2) as processes:
        processes.prepare("json")  # nobody is there yet
        assert list(processes.deal(_square, [3])) == [(9, os.getpid())]
        assert dict(processes.deal(_square, [2, 3], most=1)) == {4: os.getpid(), 9: os.getpid()}
        assert list(processes.deal(_square, [])) == []
        found = dict(processes.deal(_square, range(2, 9)))
        assert sorted(found) == [number**2 for number in range(2, 9)]
        assert os.getpid() not in found.values()
        assert len(set(found.values())) == 2
        processes.prepare("json")
        assert set(dict(processes.deal(_square, range(4))).values()) == set(found.values()), "the same ones go on"


def test_an_error_of_a_piece_is_ours_and_a_killed_process_is_told() -> None:
    with pytest.raises(PublishError, match="number 1 is bad"), Processes(2) as processes:
        list(processes.deal(_fail, [1, 2, 3]))
    with Processes(2) as processes:
        for _ in range(2):  # also the work after it
            with pytest.raises(MachineError, match="one of 2 processes ended while it worked"):
                list(processes.deal(_die, [1, 2]))


def test_processes_end_with_their_parent(tmp_path: Path) -> None:
    code = f"""
from jobs.processes import Processes
from {__name__} import _sleep
with Processes(2) as processes:
    list(processes.deal(_sleep, {[str(tmp_path)] * 2!r}))
"""
    parent = subprocess.Popen([sys.executable, "-c", code])
    while len(list(tmp_path.iterdir())) < 2:
        assert parent.poll() is None
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    children = [int(path.name) for path in tmp_path.iterdir()]
    assert len(children) == 2
    deadline = time.monotonic() + 60
    while any(_runs(child) for child in children):
        assert time.monotonic() < deadline, "children outlive a killed parent"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"  # nobody may be there to reap it
    except FileNotFoundError:
        return False
