"""Night after night on one lake: its files, its bytes and its time must not grow. `make test-nights` runs forty; the tests, a few.

The world stands still: each night its source holds the last thirty days, of about as many events. House-keeping comes every fifth
night, and removes files at once that no current version names, as if each night came weeks after the one before. Logs age a day a night.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pyspark.sql import SparkSession
from rich.console import Console
from rich.table import Table as RichTable

from conf.settings import Settings, load_settings
from conf.tables import ENGAGEMENTS
from jobs.maintain import maintain
from jobs.nightly import run_night
from jobs.progress import Display
from jobs.publication import kept_runs, published
from jobs.reader import lake_root, open_table
from jobs.rollback import roll_back
from jobs.stage import make_night
from tests.worlds import START, BundleWorld, write_config

_DAYS = 30
_WORLD = BundleWorld(num_bundles=6, num_users=40, num_categories=4, num_days=80, sessions_per_user=24)


@dataclass(frozen=True, kw_only=True)
class Weight:
    """What a lake weighs after a night: seconds of the night, files of tables, of their logs, all others, and MB of all but the logs."""

    night: date
    seconds: float
    files: int
    log_files: int
    artifacts: int
    megabytes: float


def _weigh(root: Path, night: date, seconds: float) -> Weight:
    files = [path for path in root.rglob("*") if path.is_file()]
    logs = [path for path in files if "_delta_log" in path.parts]
    artifacts = sum("_artifacts" in path.parts or "_feast" in path.parts for path in files)
    return Weight(
        night=night,
        seconds=seconds,
        files=len(files) - len(logs) - artifacts,
        log_files=len(logs),
        artifacts=artifacts,
        megabytes=sum(path.stat().st_size for path in set(files) - set(logs)) / 1e6,
    )


def _nights(
    spark: SparkSession, folder: Path, *, count: int, kept: int, every: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[Settings, list[Weight]]:
    """Run so many nights, of which the lake keeps some, with house-keeping after every few; what the lake weighs after each."""
    monkeypatch.setattr("jobs.maintain._hours", lambda _: 0)
    _WORLD.write(folder)
    events = _WORLD.events()
    training = {"num_steps": 5, "batch_size": 32, "num_validation_triggers": 20, "num_threads": 1}
    lake = {"root": str(folder / "lake"), "keep_nights": kept}
    sections = {"training": training, "lake": lake, "evaluation": {"horizon_days": 1, "num_bootstrap": 10}}
    settings = load_settings(str(write_config(folder, **sections)), ["pairs.rebuild_below=1000000"])
    found = []
    for number in range(count):
        day = START.date() + timedelta(days=_DAYS + number)
        age = (pd.Timestamp(day, tz="UTC") - events["at"].dt.floor("D")).dt.days
        events[(age >= 0) & (age < _DAYS)].to_parquet(folder / "events" / "part-0.parquet", index=False)
        begin = time.monotonic()
        now = datetime(day.year, day.month, day.day, 2, tzinfo=UTC) + timedelta(days=1)
        run_night(make_night(settings, day, spark=spark, display=Display(seconds_per_line=3600), now=now))
        seconds = time.monotonic() - begin
        _age_logs(folder / "lake")
        if number % every == every - 1:
            maintain(settings)
        found.append(_weigh(folder / "lake", day, seconds))
    return settings, found


def _age_logs(lake: Path) -> None:
    """A day goes by: Delta takes the time of a log file for that of its version."""
    for path in lake.glob("*/_delta_log/*"):
        if path.is_file():
            then = path.stat().st_mtime - timedelta(days=1).total_seconds()
            os.utime(path, (then, then))


def _slope(values: Sequence[float]) -> tuple[float, float]:
    """Growth per night in percent of the mean, and half of its 95 % interval (least squares)."""
    y = np.array(values) / np.mean(values) * 100
    x = np.arange(len(y)) - (len(y) - 1) / 2
    slope = float(x @ y / (x @ x))
    residual = y - y.mean() - slope * x
    return slope, float(1.96 * np.sqrt(residual @ residual / (len(y) - 2) / (x @ x)))


def _show(weights: Sequence[Weight], settled: int) -> RichTable:
    table = RichTable("night", "seconds", "files", "files of logs", "other files", "MB", title=f"{len(weights)} nights on one lake")
    for weight in weights:
        numbers = [weight.files, weight.log_files, weight.artifacts]
        table.add_row(str(weight.night), f"{weight.seconds:.1f}", *map(str, numbers), f"{weight.megabytes:.1f}")
    later = weights[settled:]
    names = ("seconds", "files", "log_files", "artifacts", "megabytes")
    slopes = [_slope([getattr(weight, name) for weight in later]) for name in names]
    table.add_section()
    table.add_row(f"% a night, from {later[0].night}", *(f"{slope:+.2f} ± {half:.2f}" for slope, half in slopes))
    return table


@pytest.mark.night
@pytest.mark.timeout(1200)
def test_a_few_nights_leave_what_they_need_and_nothing_else(spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, weights = _nights(spark, tmp_path, count=3, kept=1, every=1, monkeypatch=monkeypatch)
    root = lake_root(settings.lake)
    kept = sorted(kept_runs(root))
    assert len(kept) == 2, "the night, and the one before it"
    assert weights[-1].files <= weights[-2].files + 3
    named = {Path(uri).name for uri in open_table(root, ENGAGEMENTS).file_uris()}
    there = {path.name for path in Path(root, ENGAGEMENTS.name).iterdir() if path.is_file()}
    assert there == named | {f".{name}.crc" for name in named}, "nor what no commit ever named"
    roll_back(settings, kept[0], display=Display(seconds_per_line=3600))
    assert published(root).run_id == kept[0]


@pytest.mark.nights
@pytest.mark.timeout(7200)
def test_forty_nights_stay_flat(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files and bytes at the end of each run of five nights; the first ten nights fill what is kept.

    Delta shortens the log of a table with each of its checkpoints, one in ten commits or in a hundred.
    """
    _, weights = _nights(spark, tmp_path, count=40, kept=3, every=5, monkeypatch=monkeypatch)
    with capsys.disabled():
        Console(width=110).print(_show(weights, settled=10))
    kept_house = weights[4::5][2:]
    for name in ("files", "artifacts", "megabytes"):
        values = [getattr(weight, name) for weight in kept_house]
        assert values[-1] <= 1.1 * values[0], f"{name}: {values}"
    logs = [weight.log_files for weight in weights]
    assert np.mean(logs[30:]) <= 1.2 * np.mean(logs[20:30]), logs
