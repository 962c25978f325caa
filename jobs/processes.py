"""Pieces of work dealt to processes of this machine, for what runs beside Spark. Imports no Spark, so that a process starts in a second."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import TypeVar

from conf.errors import MachineError
from conf.memory import KEPT_MEMORY

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def in_processes(work: Callable[[Piece], Result], pieces: Sequence[Piece], *, most: int | None = None) -> Iterator[Result]:
    """What becomes of each piece, as it comes, in any order. A single piece is worked on here, as a process takes seconds to start.

    The first piece that fails ends the others that have not begun.

    Args:
        work: importable, as are the values it holds.
        pieces: one at a time in each process.
        most: processes; None: as many as cores.

    Raises:
        MachineError: a process was killed.
    """
    number = min(len(pieces), os.cpu_count() or 1, most or len(pieces))
    if number <= 1:
        yield from map(work, pieces)
        return
    os.environ.update(KEPT_MEMORY)  # for the processes to be started
    pool = ProcessPoolExecutor(number, mp_context=get_context("spawn"), initializer=_end_with_parent)  # a fork would copy Arrow's threads
    try:
        for future in as_completed([pool.submit(work, piece) for piece in pieces]):
            yield future.result()
    except BrokenProcessPool as error:
        raise MachineError(
            f"one of {number} processes ended while it worked: killed, perhaps for want of memory, or started by a script that calls this "
            "outside of `if __name__ == '__main__':`; correct that, then run the same command again"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """A process whose parent was killed would wait for work for ever."""

    def wait() -> None:
        if (parent := parent_process()) is not None:
            parent.join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()
