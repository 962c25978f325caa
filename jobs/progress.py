"""What a user sees while a night runs: the stage, and inside long stages the work done, its rate and the time left."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pyspark.sql import SparkSession
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from jobs import logs

Reading = tuple[float, float, str]
"""Work done, work in total (0: not known yet), and what the work is counted in."""


class Display:
    """Progress on the terminal: a bar where there is one, a line every `seconds_per_line` where output goes to a file or a log.

    Watches nest: the innermost one is shown, as a terminal has room for one bar.
    """

    def __init__(self, *, console: Console | None = None, seconds_per_line: float = 15.0) -> None:
        self.console = console or Console(stderr=True)
        self._seconds_per_line = seconds_per_line
        self._watches: list[_Watch] = []

    def say(self, text: str, *, level: str = "info") -> None:
        """Print or log one line; markup in square brackets is styled. Levels are those of `logging`: info, warning, error."""
        if logs.is_json():
            logs.log(text, level=level)
            return
        self.console.print(text, highlight=False, soft_wrap=True)

    @contextmanager
    def watch(self, title: str, read: Callable[[], Reading | None]) -> Iterator[None]:
        """Show what `read` returns until the block ends; `read` runs in a thread of its own."""
        self._watches.append(_Watch(title, read, time.monotonic()))
        try:
            if len(self._watches) > 1:
                yield
            else:
                with self._shown():
                    yield
        finally:
            self._watches.pop()

    @contextmanager
    def _shown(self) -> Iterator[None]:
        end = threading.Event()
        thread = threading.Thread(
            target=self._bar if self.console.is_terminal and not logs.is_json() else self._lines, args=(end,), daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join()

    def _reading(self) -> tuple["_Watch", Reading] | None:
        watch = self._watches[-1] if self._watches else None
        reading = watch.read() if watch is not None else None
        if watch is None or reading is None:
            return None
        watch.measure(reading)
        return watch, reading

    def _bar(self, end: threading.Event) -> None:
        columns = (TextColumn("  {task.description}"), BarColumn(), TextColumn("{task.fields[rate]}"), TextColumn("{task.fields[left]}"))
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task("", total=None, rate="", left="")
            while not end.wait(0.5):
                if (shown := self._reading()) is not None:
                    watch, (done, total, unit) = shown
                    rate, left = _rate(watch, done, total, unit)
                    progress.update(task, description=watch.title, completed=done, total=total or None, rate=rate, left=left)

    def _lines(self, end: threading.Event) -> None:
        while not end.wait(self._seconds_per_line):
            if (shown := self._reading()) is not None:
                watch, (done, total, unit) = shown
                self.say(f"  {watch.title}: " + ", ".join(filter(None, _rate(watch, done, total, unit))))


@dataclass
class _Watch:
    title: str
    read: Callable[[], Reading | None]
    started: float
    unit: str = ""
    looked: float = 0.0

    def measure(self, reading: Reading) -> None:
        """Work counted in another unit is another work: its rate starts anew, from when the old one was last seen."""
        if self.unit and reading[2] != self.unit:
            self.started = self.looked
        self.unit, self.looked = reading[2], time.monotonic()


def _rate(watch: _Watch, done: float, total: float, unit: str) -> tuple[str, str]:
    """Work with its rate, and the time left at that rate (empty before the first unit is done)."""
    seconds = max(time.monotonic() - watch.started, 1e-9)
    of = f"/{total:,.0f}" if total else ""
    left = f"{seconds * (total - done) / done:,.0f} s left" if done and total else ""
    return f"{done:,.0f}{of} {unit}, {done / seconds:,.1f}/s", left


def spark_tasks(spark: SparkSession) -> Callable[[], Reading | None]:
    """A reader of the running Spark stages' tasks."""
    tracker = spark.sparkContext.statusTracker()

    def read() -> Reading | None:
        stages = [info for stage in tracker.getActiveStageIds() if (info := tracker.getStageInfo(stage)) is not None]
        if not stages:
            return None
        return sum(info.numCompletedTasks for info in stages), sum(info.numTasks for info in stages), "Spark tasks"

    return read
