"""Forty nights in a row, with house-keeping after each: time, files and bytes stay where they are. `make test-nights`, not `make test`.

A source of a fixed number of days moves on by one each night. By the clock of files and logs a week passes between two nights, so that
what house-keeping and Delta remove after a week or a month comes and goes alike after a few of them. The numbers of each night lie in
`var/bench/nights.json`; MTMH_NIGHTS asks for fewer.
"""

import json
import os
import re
import time
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from conf.settings import load_settings
from jobs.maintain import maintain
from jobs.nightly import run_night
from jobs.progress import Display
from jobs.stage import make_night
from tests.conftest import ROOT
from tests.worlds import START, BundleWorld, write_config

pytestmark = [pytest.mark.nights, pytest.mark.timeout(6 * 3600)]
NUM_NIGHTS = int(os.environ.get("MTMH_NIGHTS", "40"))
NUM_DAYS = 14  # of events in the source
KEEP_NIGHTS = 3
NUM_WARM = 8  # until files and logs, which Delta keeps for 30 days and then until its next checkpoint, come and go alike
CHECKPOINTS = "spark.databricks.delta.properties.defaults.checkpointInterval"
WEEK_SECONDS = 7 * 86_400
_MOMENTS = re.compile(r'("(?:deletionTimestamp|modificationTime|timestamp|inCommitTimestamp)":\s*)(\d{13})')


def _grow_older(lake: Path, spark: SparkSession) -> None:
    """A week passes: times of files, and those that the logs and checkpoints of Delta tables speak of, lie a week further back."""
    for path in [path for path in lake.rglob("*") if path.is_file()]:
        moment = path.stat().st_mtime - WEEK_SECONDS
        if path.parent.name == "_delta_log" and path.suffix == ".json":
            path.write_text(_MOMENTS.sub(lambda found: f"{found[1]}{int(found[2]) - WEEK_SECONDS * 1000}", path.read_text()))
            (path.parent / f".{path.name}.crc").unlink(missing_ok=True)
        if ".checkpoint." in path.name and path.suffix == ".parquet":
            _grow_older_tombstones(path)
            (path.parent / f".{path.name}.crc").unlink(missing_ok=True)
        if path.exists():
            os.utime(path, (moment, moment))
    spark._jvm.org.apache.spark.sql.delta.DeltaLog.clearCache()  # type: ignore[union-attr]


def _grow_older_tombstones(checkpoint: Path) -> None:
    table = pq.read_table(checkpoint)
    removed = table["remove"].to_pylist()
    for tombstone in filter(None, removed):
        tombstone["deletionTimestamp"] -= WEEK_SECONDS * 1000
    field = table.schema.field("remove")
    pq.write_table(table.set_column(table.schema.get_field_index("remove"), field, pa.array(removed, field.type)), checkpoint)


def _measured(lake: Path) -> dict[str, float]:
    files = [path for path in lake.rglob("*") if path.is_file()]
    logs = sum(path.parent.name == "_delta_log" for path in files)
    return {"files": len(files) - logs, "log_files": logs, "bytes": sum(path.stat().st_size for path in files)}


def _slope(rows: list[dict[str, float]], name: str) -> tuple[float, float]:
    """Change a night by least squares, and the mean, after the warm-up."""
    values = [row[name] for row in rows[NUM_WARM:]]
    return float(np.polyfit(np.arange(len(values)), values, 1)[0]), float(np.mean(values))


def _say(rows: list[dict[str, float]]) -> Mapping[str, tuple[float, float]]:
    slopes = {name: _slope(rows, name) for name in ("seconds", "files", "log_files", "bytes")}
    for name, (slope, mean) in slopes.items():
        print(f"{name}: {slope:+.3g} a night after {NUM_WARM} nights, {slope / mean:+.2%} of the mean {mean:,.1f}")
    path = ROOT / "var" / "bench" / "nights.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"nights": rows, "slopes": {name: {"slope": s, "mean": m} for name, (s, m) in slopes.items()}}, indent=1))
    return slopes


def _source(events: pd.DataFrame, folder: Path, night: date) -> None:
    """The last days up to a night, as a source that forgets holds them."""
    day = events["at"].dt.date
    chosen = events[(day > night - timedelta(days=NUM_DAYS)) & (day <= night)]
    chosen.to_parquet(folder / "events" / "part-0.parquet", index=False)


def test_time_files_and_bytes_stay_flat(spark: SparkSession, tmp_path: Path) -> None:
    assert NUM_NIGHTS >= NUM_WARM + 6, "fewer nights say nothing of a slope"
    world = BundleWorld(num_bundles=6, num_categories=4, num_users=60, sessions_per_user=25, num_days=NUM_DAYS + NUM_NIGHTS)
    world.write(tmp_path)
    events = world.events()
    training = {"num_steps": 5, "batch_size": 32}
    evaluation = {"horizon_days": 2, "num_bootstrap": 10, "cutoffs": [5]}
    lake = {"root": str(tmp_path / "lake"), "keep_nights": KEEP_NIGHTS}
    settings = load_settings(str(write_config(tmp_path, training=training, evaluation=evaluation, lake=lake)))
    spark.conf.set(CHECKPOINTS, "2")  # of ten, the logs of a table with a commit a night would rise and fall over ten nights
    rows: list[dict[str, float]] = []
    try:
        for number in range(NUM_NIGHTS):
            run_date = START.date() + timedelta(days=NUM_DAYS - 1 + number)
            _source(events, tmp_path, run_date)
            begin = time.monotonic()
            night = make_night(
                settings, run_date, spark=spark, display=Display(seconds_per_line=3600), now=datetime(2025, 1, 1, tzinfo=UTC)
            )
            run_night(night)
            seconds = time.monotonic() - begin
            maintain(settings)
            rows.append({"seconds": seconds} | _measured(tmp_path / "lake"))
            print(f"night {number + 1:2d}: " + ", ".join(f"{value:,.1f} {name}" for name, value in rows[-1].items()), flush=True)
            _grow_older(tmp_path / "lake", spark)
    finally:
        spark.conf.unset(CHECKPOINTS)
        if len(rows) > NUM_WARM + 2:
            slopes = _say(rows)
    for name in ("files", "log_files", "bytes"):
        slope, mean = slopes[name]
        assert abs(slope) < 0.01 * mean, f"{name} change by {slope:,.1f} a night, {slope / mean:.1%} of their mean"
