"""A training killed in the middle and started again ends where one that nobody disturbed ends: real processes, one and two, and SIGKILL."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from conf.errors import TrainingError
from conf.faults import VARIABLE
from conf.settings import HeadSettings
from conf.tables import CO_ENGAGEMENT_PAIRS
from jobs.train_model import distribute
from models import resume
from models.data import TableRef
from models.resume import FILE, Saved
from models.spec import TrainingSpec
from tests.conftest import ROOT
from tests.models.small_world import SmallWorld, make_spec
from tests.models.test_train import free_port

KILL = "train_model.rank.training=kill"
TRAIN = "import sys; from models.train import run_rank; run_rank(sys.argv[1])"
THREADS = Path("/proc/self/task")
WENT_ON = "training was interrupted, and went on from step 6 of 12"
PHASES = {"rehearsal": f"{WENT_ON} of the rehearsal", "training": WENT_ON}


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TableRef]:
    return SmallWorld().write(tmp_path_factory.mktemp("lake"))


def start_ranks(
    spec: TrainingSpec, *, num_processes: int, fault: str | None = None, of_rank: int = 0, code: str = TRAIN, stdout: int | None = None
) -> list[subprocess.Popen[bytes]]:
    """The workers, one of which reads the fault."""
    count, port = str(num_processes), str(free_port())
    world = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = []
    for rank in range(num_processes):
        environment = os.environ | world | {"RANK": str(rank)} | ({VARIABLE: fault} if fault and rank == of_rank else {})
        command = [sys.executable, "-c", code, spec.to_json()]
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stdout, stderr=subprocess.DEVNULL))
    return started


def run_ranks(spec: TrainingSpec, *, num_processes: int, fault: str | None = None, of_rank: int = 0) -> list[int]:
    """Exit codes of the workers, one of which reads the fault."""
    return [process.wait(timeout=120) for process in start_ranks(spec, num_processes=num_processes, fault=fault, of_rank=of_rank)]


def outcome(spec: TrainingSpec) -> tuple[list[float], str, list[str]]:
    """Losses of all steps, model version, notes."""
    folder = Path(spec.folder)
    history = json.loads((folder / "history.json").read_text())
    return [step["loss"] for step in history["steps"]], history["model_version"], json.loads((folder / "notes.json").read_text())


@pytest.fixture(scope="module", params=[1, 2])
def calm(request: pytest.FixtureRequest, tables: dict[str, TableRef], tmp_path_factory: pytest.TempPathFactory) -> tuple[int, TrainingSpec]:
    """How many workers there were, and what they did undisturbed."""
    spec = make_spec(tmp_path_factory.mktemp("calm"), tables, checkpoint_seconds=0)
    assert run_ranks(spec, num_processes=request.param) == [0] * request.param
    return request.param, spec


@pytest.mark.parametrize("phase", PHASES)
def test_a_killed_training_goes_on_to_the_same_loss(
    tables: dict[str, TableRef], calm: tuple[int, TrainingSpec], tmp_path: Path, phase: str
) -> None:
    num_processes, undisturbed = calm
    disturbed = make_spec(tmp_path / "disturbed", tables, checkpoint_seconds=0)
    killed = num_processes - 1
    codes = run_ranks(disturbed, num_processes=num_processes, fault=f"train_model.rank.{phase}=kill", of_rank=killed)
    assert codes[killed] == -signal.SIGKILL
    if num_processes == 2:  # by this word the job knows that a worker is gone, and not that the training is wrong
        assert "gloo" in json.loads((tmp_path / "disturbed" / "status" / "rank-0.json").read_text())["error"]
    assert not (tmp_path / "disturbed" / "history.json").exists()
    assert run_ranks(disturbed, num_processes=num_processes) == [0] * num_processes
    losses, version, notes = outcome(disturbed)
    wanted = outcome(undisturbed)
    assert (losses, version) == wanted[:2]
    assert notes == [*wanted[2], PHASES[phase]]
    assert (tmp_path / "disturbed" / "scorer.json").read_bytes() == (Path(undisturbed.folder) / "scorer.json").read_bytes()


def test_a_killed_training_of_a_signal_goes_on_to_the_same_loss(tables: dict[str, TableRef], tmp_path: Path) -> None:
    with_buys = tables | {CO_ENGAGEMENT_PAIRS.of_signal("buy").name: tables[CO_ENGAGEMENT_PAIRS.name]}
    plain = make_spec(tmp_path, with_buys, checkpoint_seconds=0)
    heads = plain.model.heads | {"buy": HeadSettings(signals={"buy": 1.0})}
    model = plain.model.model_copy(update={"heads": heads})
    undisturbed, *disturbed = (
        replace(plain, model=model, signals={"buy": 30.0}, folder=str(tmp_path / name)) for name in ("undisturbed", *PHASES)
    )
    assert run_ranks(undisturbed, num_processes=1) == [0]
    for phase, spec in zip(PHASES, disturbed, strict=True):
        assert run_ranks(spec, num_processes=1, fault=f"train_model.rank.{phase}=kill") == [-signal.SIGKILL]
        assert run_ranks(spec, num_processes=1) == [0]
        assert outcome(spec)[:2] == outcome(undisturbed)[:2]
        assert outcome(spec)[2][-1] == PHASES[phase]


@pytest.mark.skipif(not THREADS.is_dir(), reason="names of threads are read from /proc")
def test_no_thread_between_workers_outlives_a_training(tables: dict[str, TableRef], tmp_path: Path) -> None:
    """One that did held tensors when the interpreter was gone, now and then, and aborted a worker that was done."""
    spec = make_spec(tmp_path / "run", tables)
    look = f"from pathlib import Path; print([f.read_text().strip() for f in Path('{THREADS}').glob('*/comm')])"
    started = start_ranks(spec, num_processes=2, code=f"{TRAIN}; {look}", stdout=subprocess.PIPE)
    said = [process.communicate(timeout=120)[0].decode() for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert all("python" in names and "gloo" not in names for names in said), said


def test_only_the_same_training_goes_on(tables: dict[str, TableRef], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_spec(tmp_path, tables, checkpoint_seconds=0)
    run_ranks(spec, num_processes=1, fault=KILL)
    saved = Saved.find(tmp_path, key=spec.key)
    assert saved is not None
    assert saved.num_steps == 6
    other = replace(spec, training=spec.training.model_copy(update={"learning_rate": 0.5}))
    newer = replace(spec, tables=tables | {"engagements": TableRef(uri=tables["engagements"].uri, version=1)})
    fewer = replace(spec, widths=replace(spec.widths, content=1))
    assert [Saved.find(tmp_path, key=changed.key) for changed in (other, newer, fewer)] == [None, None, None]
    assert replace(spec, folder="elsewhere").key == spec.key
    patient = spec.training.model_copy(update={"timeout_seconds": 999, "checkpoint_seconds": 7, "max_restarts": 5})
    assert replace(spec, training=patient).key == spec.key  # more patience is what a killed training needs
    with monkeypatch.context() as other_code:
        other_code.setattr(resume, "_FORMAT", 1)
        assert Saved.find(tmp_path, key=spec.key) is None
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:1000])
    assert Saved.find(tmp_path, key=spec.key) is None


def test_workers_that_were_killed_are_started_again(
    spark: SparkSession, tables: dict[str, TableRef], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, KILL)
    notes: list[str] = []
    never = make_spec(tmp_path / "never", tables, checkpoint_seconds=0, num_processes=2, max_restarts=0)
    with pytest.raises(TrainingError, match="ended without a status: killed"):
        distribute(never, anew=False, note=notes.append)
    assert not notes
    assert Saved.find(tmp_path / "never", key=never.key)
    once = make_spec(tmp_path / "once", tables, checkpoint_seconds=0, num_processes=2, max_restarts=1)
    distribute(once, anew=False, note=notes.append)
    assert len(notes) == 1
    assert "training goes on from its saved state" in notes[0]
    assert not (tmp_path / "once" / FILE).exists()
    losses, version, said = outcome(once)
    assert said[-1] == WENT_ON
    monkeypatch.delenv(VARIABLE)
    calm = make_spec(tmp_path / "calm", tables)
    run_ranks(calm, num_processes=2)
    assert outcome(calm)[:2] == (losses, version)


def test_spark_tasks_without_a_gpu_of_their_own_are_an_error_where_it_is_asked_for(spark: SparkSession, tmp_path: Path) -> None:
    spec = make_spec(tmp_path, local_mode=False, device="cuda")
    with pytest.raises(TrainingError, match=r"found spark.task.resource.gpu.amount 0, wanted 1: set it, .* or set training.device to auto"):
        distribute(spec, anew=False, note=print)
