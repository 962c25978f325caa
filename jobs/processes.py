"""Pieces of work dealt to processes of this machine, for what runs beside Spark. Imports no Spark, so that a process starts in a second."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from itertools import islice
from multiprocessing import get_context, parent_process
from threading import Thread
from types import TracebackType
from typing import Self, TypeVar

from conf.errors import MachineError
from conf.memory import KEPT_MEMORY

Piece = TypeVar("Piece")
Result = TypeVar("Result")


class Processes:
    """Processes that start with the first work for more than one of them, and end with the `with` block.

    Args:
        most: processes; None: as many as cores.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = most or os.cpu_count() or 1
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def deal(self, work: Callable[[Piece], Result], pieces: Sequence[Piece], *, most: int | None = None) -> Iterator[Result]:
        """What becomes of each piece, as it comes, in any order. A single piece is worked on here, as a process takes seconds to start.

        Pieces that have not begun when one fails are left.

        Args:
            work: importable, as are the values it holds.
            pieces: one at a time in each process.
            most: pieces at once; None: as many as there are processes.

        Raises:
            MachineError: a process was killed.
        """
        at_once = min(len(pieces), self._most, most or self._most)
        if at_once <= 1:
            yield from map(work, pieces)
            return
        left = iter(pieces)
        try:
            running = {self._started().submit(work, piece) for piece in islice(left, at_once)}
            while running:
                ended, running = wait(running, return_when=FIRST_COMPLETED)
                running |= {self._started().submit(work, piece) for piece in islice(left, len(ended))}
                yield from (future.result() for future in ended)
        except BrokenProcessPool as error:
            raise MachineError(
                f"one of {self._most} processes ended while it worked: killed, perhaps for want of memory, or started by a script that "
                "calls this outside of `if __name__ == '__main__':`; correct that, then run the same command again"
            ) from error

    def prepare(self, *modules: str) -> None:
        """Let processes that run already import what the next work needs, as soon as they have nothing else to do."""
        for _ in range(self._most if self._pool is not None else 0):
            self._started().submit(import_modules, modules)

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            os.environ.update(KEPT_MEMORY)  # for the processes to be started
            context = get_context("spawn")  # a fork would copy threads of FAISS and Arrow
            self._pool = ProcessPoolExecutor(self._most, mp_context=context, initializer=_end_with_parent)
        return self._pool


def import_modules(names: Iterable[str]) -> None:
    """Import modules that take seconds."""
    for name in names:
        import_module(name)


def _end_with_parent() -> None:
    """A process whose parent was killed would wait for work for ever."""

    def watch() -> None:
        if (parent := parent_process()) is not None:
            parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()
