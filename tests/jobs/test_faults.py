"""What keeps a lake whole without anybody's care: points of drills, one night at a time, leftovers of killed nights, clocks, compaction."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from pyspark.sql import DataFrame, SparkSession

from conf.errors import PublishError, machine_fault
from conf.faults import POINTS, VARIABLE, reach
from conf.settings import LakeSettings, load_settings
from conf.tables import EVALUATION, ITEM_NEIGHBORS, ITEM_POPULARITY, RUNS
from jobs.evaluate import evaluate
from jobs.lake import Lake, open_lake
from jobs.ledger import Ledger, StageRecord
from jobs.progress import Display
from jobs.publication import kept_runs, publish_run, published
from jobs.reader import changes_since, open_table
from jobs.stage import StageRun, make_night
from jobs.turns import turn
from tests.conftest import ROOT
from tests.list_world import ListWorld
from tests.worlds import BundleWorld, write_config

DAY = date(2024, 1, 2)


def test_a_point_kills_or_holds_and_all_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from conf.faults import reach\nreach('a.b')\nreach('a.c')\nprint('alive')"
    for action, wanted in (("a.c=kill", -signal.SIGKILL), ("a.d=kill", 0)):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {VARIABLE: action}, capture_output=True)
        assert done.returncode == wanted
    hold = tmp_path / "held"
    monkeypatch.setenv(VARIABLE, f"a.b=hold:{hold}")
    thread = threading.Thread(target=reach, args=("a.b",))
    thread.start()
    while not hold.exists():
        time.sleep(0.01)
    assert thread.is_alive()
    hold.unlink()
    thread.join(timeout=10)
    assert not thread.is_alive()
    monkeypatch.setenv(VARIABLE, "a.b=explode")
    with pytest.raises(ValueError, match="'explode'; wanted kill or hold:FILE"):
        reach("a.b")
    modules = (path for room in ("features", "jobs", "models") for path in (ROOT / room).rglob("*.py"))
    assert set(re.findall(r'reach\("([\w.]+)"\)', "".join(path.read_text() for path in modules))) == set(POINTS)


def test_a_second_night_leaves_at_once_and_says_who_was_first(tmp_path: Path) -> None:
    lake = LakeSettings(root=str(tmp_path / "lake"))
    with turn(lake, "2024-03-31-aaaaaaaa"), pytest.raises(PublishError, match=r"is writing this lake: 2024-03-31-aaaaaaaa, process \d+"):
        turn(lake, "2024-03-30-bbbbbbbb").__enter__()
    code = "import os\nfrom conf.settings import LakeSettings\nfrom jobs.turns import turn\n"
    code += f"turn(LakeSettings(root={str(tmp_path / 'lake')!r}), 'x').__enter__()\nos.kill(os.getpid(), 9)"
    killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    with turn(lake, "a killed night leaves no lock"):
        pass


def test_the_fault_of_a_machine_is_named_however_deep() -> None:
    deep = RuntimeError("job aborted")
    deep.__cause__ = OSError(28, "No space left on device")
    assert "free some space there" in str(machine_fault(deep, "lake"))
    assert machine_fault(ValueError("anything else"), "lake") is None


def _record(stage: str, at: datetime, **versions: int) -> StageRecord:
    numbers = {"seconds": 1.0, "input_versions": {}, "output_versions": versions, "metrics": {}}
    times = {"started_at": at, "ended_at": at}
    return StageRecord(
        run_id="r", run_date=DAY, stage=stage, attempt=1, status="succeeded", fingerprint="f", settings_fingerprint="s", **times, **numbers
    )


def test_the_newest_success_is_the_one_written_last_whatever_the_clock_said(spark: SparkSession, tmp_path: Path) -> None:
    lake = open_lake(spark, LakeSettings(root=str(tmp_path / "lake")))
    lake.create(RUNS)
    ledger, noon = Ledger(root=lake.root), datetime(2024, 1, 2, 12, tzinfo=UTC)
    for version, hours in ((1, 0), (2, -5), (3, -9)):
        ledger.append(_record("ingest", noon + timedelta(hours=hours), engagements=version))
    assert [record.output_versions["engagements"] for record in ledger.records()] == [1, 2, 3]
    open_table(lake.root, RUNS).optimize.compact()
    ledger.append(_record("ingest", noon - timedelta(days=9), engagements=4))
    found = ledger.last_success(stage="ingest")
    assert found is not None
    assert found.output_versions == {"engagements": 4}


def _popularity(lake: Lake, *items: tuple[str, float]) -> DataFrame:
    rows = [(item, weight, DAY, 1, 0.0, DAY, 1, DAY, DAY, DAY) for item, weight in items]
    return lake.spark.createDataFrame(rows, list(ITEM_POPULARITY.column_names))


def test_writes_beside_others(spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version that is ours, a compaction that is no change, and a row of somebody else that is one."""
    lake = open_lake(spark, LakeSettings(root=str(tmp_path / "lake")))
    for item in "abc":
        lake.append(ITEM_POPULARITY, _popularity(lake, (item, 1.0)))
    seen = lake.version(ITEM_POPULARITY)

    def meanwhile(act: object) -> None:
        save, table = Lake._save, open_table(lake.root, ITEM_POPULARITY)
        monkeypatch.setattr(Lake, "_save", lambda *arguments: (save(*arguments), act(table)))  # type: ignore[operator]

    meanwhile(lambda table: lake.spark.sql(f"OPTIMIZE delta.`{lake.path(ITEM_POPULARITY)}`").collect())
    assert lake.replace(ITEM_POPULARITY, _popularity(lake, ("a", 2.0)), where="item_id = 'a'") == seen + 1
    monkeypatch.undo()
    assert lake.version(ITEM_POPULARITY) > seen + 1
    assert [commit["version"] for commit in changes_since(lake.root, ITEM_POPULARITY, seen)] == [seen + 1]
    compacted = lake.version(ITEM_POPULARITY)
    lake.restore(ITEM_POPULARITY, seen + 1)
    assert lake.version(ITEM_POPULARITY) == compacted, "a restore would undo the compaction"
    meanwhile(lambda table: lake.append(ITEM_POPULARITY, _popularity(lake, ("z", 9.0))))
    mine = lake.replace(ITEM_POPULARITY, _popularity(lake, ("a", 3.0)))
    monkeypatch.undo()
    assert mine < lake.version(ITEM_POPULARITY)
    assert [row["item_id"] for row in lake.read(ITEM_POPULARITY, mine).collect()] == ["a"]


def test_what_a_killed_night_left_does_not_stay_beside_new_rows(spark: SparkSession, tmp_path: Path) -> None:
    BundleWorld(num_users=4).write(tmp_path)
    settings = load_settings(str(write_config(tmp_path)))
    night = make_night(settings, date(2024, 3, 31), spark=spark, display=Display(seconds_per_line=3600))
    night.lake.create(RUNS)
    columns = [column.name for column in EVALUATION.columns]

    def rows(run_id: str) -> DataFrame:
        values = [(run_id, DAY, "mtmh", "merged", "recall@5", "all", 0.5, 0.4, 0.6, 9, 7)]
        return spark.createDataFrame(values, ", ".join(f"{c.name} {c.type}" for c in EVALUATION.columns)).select(columns)

    def write(run_id: str) -> dict[str, int]:
        run = StageRun(night=night, stage="evaluate")
        run.replace(EVALUATION, rows(run_id), where=f"run_id = '{run_id}'")
        return run.outputs

    night.ledger.append(_record("evaluate", datetime.now(UTC), **write("good")))
    write("killed before its row in runs")
    write("next")
    assert {row["run_id"] for row in night.lake.read(EVALUATION).collect()} == {"good", "next"}
    night.lake.delete_where(EVALUATION, "run_id = 'good'")  # by hand, e.g. for privacy
    write("after a deletion by hand")
    assert "good" not in {row["run_id"] for row in night.lake.read(EVALUATION).collect()}
    open_table(night.lake.root, EVALUATION).create_checkpoint()
    for number in range(night.lake.version(EVALUATION)):  # long ago
        Path(night.lake.path(EVALUATION), "_delta_log", f"{number:020d}.json").unlink()
    run = StageRun(night=night, stage="evaluate")
    run.replace(EVALUATION, rows("behind a gap"), where="run_id = 'behind a gap'")
    assert "behind a gap" in {row["run_id"] for row in night.lake.read(EVALUATION).collect()}
    assert "what a killed night may have left in evaluation is not looked for: the log of evaluation under" in run.notes[0]


def test_lists_that_are_kept_no_longer_are_not_judged(spark: SparkSession, tmp_path: Path) -> None:
    config = str(write_config(tmp_path))
    settings = load_settings(config, ["lake.keep_nights=3", "evaluation.horizon_days=4"])
    night = make_night(settings, DAY + timedelta(days=4), spark=spark, display=Display(seconds_per_line=3600))
    night.lake.create(RUNS)
    night.ledger.append(_record("publish_neighbors", datetime.now(UTC), item_neighbors=1))
    run = StageRun(night=night, stage="evaluate")
    evaluate(run)
    assert run.outputs == {}
    assert "are kept no longer, nothing was evaluated: lake.keep_nights is 3, evaluation.horizon_days 4; raise the first" in run.notes[0]


def test_a_compaction_between_the_look_and_the_publication_publishes_nothing_else(tmp_path: Path) -> None:
    world = ListWorld(folder=tmp_path)
    first = world.night(date(2024, 3, 30), seed=1)
    world.night(date(2024, 3, 31), seed=2)
    seen = published(world.root).version
    open_table(world.root, ITEM_NEIGHBORS).optimize.compact()
    assert published(world.root).version > seen
    version = publish_run(world.root, first, expected=seen, inputs={})
    assert published(world.root, version).run_id == first
    with pytest.raises(PublishError, match="another run was published in between"):
        publish_run(world.root, [*kept_runs(world.root)][-1], expected=seen, inputs={})
