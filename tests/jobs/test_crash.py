"""A night killed at every point and finished by the same command: `make test-crash`.

One night is published, then a second one is run undisturbed, with a copy of the lake before each of its stages. From such a copy a night
is killed at the first point of the stage, started again by the same command and killed at the next point, and so on until it is left
alone: each crash meets what all crashes before it have left. Every one is a real `python -m jobs.nightly` and SIGKILL. Meanwhile a reader
looks at `item_neighbors` all the time; at the end finished stages have kept their rows of `runs`, and every table equals the undisturbed
night's.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from pyspark.sql import SparkSession

from conf.errors import MachineError, PublishError
from conf.faults import POINTS, VARIABLE
from conf.settings import Settings, load_settings
from conf.tables import ITEM_NEIGHBORS, MERGE_POLICY, RELEVANCE_FEEDBACK, RUNS, TABLES
from features import store
from jobs.ledger import Ledger, StageRecord
from jobs.nightly import STAGES, run_night
from jobs.online import open_feature_store
from jobs.progress import Display
from jobs.reader import lake_root, open_table
from jobs.stage import make_night, run_stage
from tests.conftest import ROOT
from tests.worlds import BundleWorld, write_config

pytestmark = [pytest.mark.crash, pytest.mark.timeout(1800)]
FIRST, SECOND = date(2024, 3, 30), date(2024, 3, 31)


def _writes(*tables: str) -> list[str]:
    return [f"{table}.{when}" for table in tables for when in ("writing", "written")]


INSIDE = {
    "ingest": _writes("engagements", "item_annotations", "pair_relevance", "impressions", "rejected_rows"),
    "build_pairs": _writes(
        "item_popularity", "co_engagement_daily", "co_engagement_totals", "co_engagement_pairs", "co_engagement_days", "exposure_pairs"
    ),
    "build_features": _writes("item_features", "relevance_examples"),
    "train_model": _writes("item_embeddings"),
    "publish_neighbors": ["index.written", *_writes("item_neighbors_history"), "gated", "linked", "published"],
    "publish_online": ["shard", "marked"],
    "evaluate": _writes("evaluation"),
}
DRIVER = {stage: [f"{stage}.{point}" for point in ("started", *inside, "done", "recorded")] for stage, inside in INSIDE.items()}
DRIVER["evaluate"].append("report.written")
"""Where a driver is killed in each stage, in the order in which a night comes by."""
WORKERS = {
    "train_model": ["train_model.rank.started", "train_model.rank.rehearsal", "train_model.rank.training", "train_model.rank.written"],
    "publish_neighbors": ["publish_neighbors.search"],
}


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The world, a copy of the lake before each stage of the second night, and what its tables hold at the end."""

    folder: Path
    config: Path
    copies: dict[str, Path]
    tables: dict[str, pd.DataFrame]
    run_ids: tuple[str, str]


@pytest.fixture(scope="module")
def reference(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("crash")
    BundleWorld(num_bundles=14, num_users=80).write(folder)  # enough triggers in the holdout for a rehearsal
    training = {"num_steps": 5, "batch_size": 32, "num_processes": 2, "max_restarts": 0}  # a killed rank ends the night; the next goes on
    config = write_config(folder, training=training, online={"shard_items": 8}, evaluation={"horizon_days": 1, "num_bootstrap": 10})
    settings = load_settings(str(config))
    night = [make_night(settings, day, spark=spark, display=Display(seconds_per_line=3600)) for day in (FIRST, SECOND)]
    run_night(night[0])
    copies = {}
    for stage, function in STAGES.items():
        copies[stage] = folder / f"before {stage}"
        shutil.copytree(folder / "lake", copies[stage])
        run_stage(night[1], stage, function)
    run_ids = (night[0].run_id, night[1].run_id)
    return Reference(folder=folder, config=config, copies=copies, tables=_contents(lake_root(settings.lake)), run_ids=run_ids)


def _contents(root: str) -> dict[str, pd.DataFrame]:
    """Rows of every table but the ledger, in the order of their keys."""
    found = {}
    for table in TABLES.values():
        if table not in (RUNS, RELEVANCE_FEEDBACK):
            frame = open_table(root, table).to_pyarrow_table().to_pandas()
            found[table.name] = frame.sort_values(list(table.key)).reset_index(drop=True)[list(table.column_names)].map(_plain)
    return found


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


@dataclass(frozen=True, kw_only=True)
class Case:
    """A lake of its own, and the command that runs its night."""

    reference: Reference
    lake: Path

    @property
    def settings(self) -> Settings:
        return load_settings(str(self.reference.config), [f"lake.root={self.lake}"])

    @property
    def command(self) -> list[str]:
        flags = ["--run-date", str(SECOND), "--config", str(self.reference.config), "--set", f"lake.root={self.lake}"]
        return [sys.executable, "-m", "jobs.nightly", *flags]

    def nightly(self, fault: str | None = None) -> subprocess.CompletedProcess[str]:
        environment = os.environ | ({VARIABLE: fault} if fault else {})
        return subprocess.run(self.command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)

    def records(self) -> list[StageRecord]:
        return Ledger(root=str(self.lake)).records(run_id=self.reference.run_ids[1])


@contextmanager
def _case(reference: Reference, folder: Path, stage: str) -> Iterator[Case]:
    """The lake as it was before a stage, readers beside it; at the end the night is whole, and equal to the undisturbed one."""
    shutil.copytree(reference.copies[stage], folder / "lake")
    case, seen, end = Case(reference=reference, lake=folder / "lake"), set[tuple[frozenset[str], int]](), threading.Event()

    def look() -> None:
        while not end.wait(0.2):
            rows = open_table(str(case.lake), ITEM_NEIGHBORS).to_pyarrow_table(columns=["run_id"])
            seen.add((frozenset(rows["run_id"].to_pylist()), rows.num_rows))

    thread = threading.Thread(target=look)
    before = case.records()
    thread.start()
    try:
        yield case
    finally:
        end.set()
        thread.join()
    after, done = _contents(str(case.lake)), case.records()
    assert [record for record in done if record.stage in {r.stage for r in before}] == before, "a finished stage was run again"
    assert [record.stage for record in done if record.status == "succeeded"] == list(STAGES)
    for name, wanted in reference.tables.items():
        pd.testing.assert_frame_equal(after[name], wanted, rtol=1e-6, obj=name)
    num_rows = {len(reference.tables[ITEM_NEIGHBORS.name])}
    assert seen <= {(frozenset({run_id}), rows) for run_id in reference.run_ids for rows in num_rows}, seen
    items = sorted(set(after[ITEM_NEIGHBORS.name]["item_id"]))
    online = store.lookup_online(open_feature_store(case.settings), items, heads=["merged"], k=5)
    assert {lists["run_id"] for lists in online.values()} == {reference.run_ids[1]}


def test_every_point_is_killed_at() -> None:
    points = [point for found in (*DRIVER.values(), *WORKERS.values()) for point in found]
    assert len(set(points)) == len(points) >= 50
    assert list(DRIVER) == list(STAGES)
    assert set(POINTS) <= set(points)
    by_others = {RUNS.name, RELEVANCE_FEEDBACK.name, MERGE_POLICY.name}  # the ledger, votes, a policy; the published lists have `linked`
    assert {table for table in TABLES if f".{table}.written" not in " ".join(points)} == {ITEM_NEIGHBORS.name, *by_others}


def _kill_and_finish(reference: Reference, folder: Path, stage: str, points: Sequence[str]) -> None:
    """Killed at the first point, started again and killed at the next one, and so on until a night is left alone."""
    with _case(reference, folder, stage) as case:
        for point in points:
            killed = case.nightly(f"{point}=kill")
            assert killed.returncode == -signal.SIGKILL, f"{point}: {killed.stderr[-3000:]}"
        again = case.nightly()
        assert again.returncode == 0, again.stderr[-3000:]


@pytest.mark.parametrize("stage", STAGES)
def test_a_driver_killed_at_every_point_of_a_stage(reference: Reference, tmp_path: Path, stage: str) -> None:
    _kill_and_finish(reference, tmp_path, stage, DRIVER[stage])


@pytest.mark.parametrize("point", ["publish_neighbors.linked", "publish_neighbors.published", "publish_neighbors.done"])
def test_a_driver_killed_around_publication(reference: Reference, tmp_path: Path, point: str) -> None:
    """Once, and finished at once: here readers could see something, and a second kill could hide it."""
    _kill_and_finish(reference, tmp_path, "publish_neighbors", [point])


@pytest.mark.parametrize("stage", WORKERS)
def test_a_worker_killed_at_every_point_of_a_stage(reference: Reference, tmp_path: Path, stage: str) -> None:
    with _case(reference, tmp_path, stage) as case:
        for point in WORKERS[stage]:
            failed = case.nightly(f"{point}=kill")
            assert failed.returncode != 0, f"{point}: {failed.stderr[-3000:]}"
            assert case.records()[-1].status == "failed"
            if stage == "train_model":
                assert re.search(r"error: training rank.* ended without a status: killed, or out of memory\?", failed.stderr), point
        again = case.nightly()
        assert again.returncode == 0, again.stderr[-3000:]


def test_two_nights_at_once(reference: Reference, tmp_path: Path) -> None:
    held = tmp_path / "held"
    with _case(reference, tmp_path, "publish_neighbors") as case:
        environment = os.environ | {VARIABLE: f"publish_neighbors.gated=hold:{held}"}
        first = subprocess.Popen(case.command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while not held.exists():
            assert first.poll() is None
            threading.Event().wait(0.2)
        try:
            loser = case.nightly()
            assert loser.returncode == PublishError.exit_code, loser.stderr[-3000:]
            assert re.search(rf"error: another night is writing this lake: {reference.run_ids[1]}, process {first.pid} on", loser.stderr)
            for table in ("item_features", "item_neighbors_history", "item_neighbors", "runs"):
                open_table(str(case.lake), TABLES[table]).optimize.compact()
                open_table(str(case.lake), TABLES[table]).vacuum(dry_run=False)
        finally:
            held.unlink()
        assert first.wait(timeout=600) == 0


@contextmanager
def _mounted(folder: Path, options: str) -> Iterator[Path]:
    """A small file system in memory."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this user may not mount a tmpfs: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def _fill(folder: Path, keep: int) -> Path:
    """Take all space of a file system but some bytes."""
    ballast = folder / "ballast"
    state = os.statvfs(folder)
    with ballast.open("wb") as file:
        file.write(b"\0" * (state.f_bavail * state.f_frsize - keep))
    return ballast


def test_a_full_disk(reference: Reference, tmp_path: Path) -> None:
    with _mounted(tmp_path / "disk", "size=64m") as disk, _case(reference, disk, "build_features") as case:
        for keep in (4_096, 40_960, 131_072):
            ballast = _fill(disk, keep)
            failed = case.nightly()
            assert failed.returncode == MachineError.exit_code, failed.stderr[-3000:]
            assert "free some space there" in failed.stderr, failed.stderr[-3000:]
            ballast.unlink()
        again = case.nightly()
        assert again.returncode == 0, again.stderr[-3000:]


def test_a_lake_that_cannot_be_written(reference: Reference, tmp_path: Path) -> None:
    with _mounted(tmp_path / "disk", "size=64m") as disk, _case(reference, disk, "publish_neighbors") as case:
        _remount(disk, "ro")
        failed = case.nightly()
        assert failed.returncode == MachineError.exit_code, failed.stderr[-3000:]
        assert "cannot write the lake" in failed.stderr
        _remount(disk, "rw")
        again = case.nightly()
        assert again.returncode == 0, again.stderr[-3000:]
