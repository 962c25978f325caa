"""A small night by `spark-submit --py-files --archives` on a standalone cluster: a master and two workers, all on loopback.

The night runs from an empty folder, so that every module comes from the zip; training and FAISS run in the executors' Python workers,
whose interpreter comes from an archive that Spark unpacks beside each executor. The archive finds its packages where the tests have
them: 7 GB of them packed would say no more about mtmh.
"""

import os
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import pytest

from conf.settings import load_settings
from conf.tables import ITEM_NEIGHBORS
from jobs.ledger import Ledger
from jobs.nightly import STAGES
from jobs.reader import lake_root, neighbors_of, open_table
from tests.conftest import ROOT
from tests.worlds import BundleWorld, write_config

pytestmark = pytest.mark.night
_BIN = Path(sys.executable).parent
_ROOMS = ("conf", "features", "models", "validation", "jobs")
_WORLD = BundleWorld(num_bundles=6, num_users=40)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@dataclass(kw_only=True)
class Cluster:
    """A standalone master and its workers of two cores; each is the leader of a process group that its executors belong to."""

    folder: Path
    port: int = field(default_factory=_free_port)
    master: "subprocess.Popen[bytes] | None" = None
    workers: "list[subprocess.Popen[bytes]]" = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"spark://127.0.0.1:{self.port}"

    def start(self, num_workers: int) -> None:
        self.master = self._start("master.Master", "--host", "127.0.0.1", "--port", str(self.port))
        deadline = time.monotonic() + 60
        while not _listens(self.port) and time.monotonic() < deadline:
            time.sleep(0.2)
        for _ in range(num_workers):
            self.add_worker()

    def add_worker(self) -> None:
        self.workers.append(self._start("worker.Worker", "-c", "2", "-m", "2g", "-h", "127.0.0.1", self.url))

    def kill_worker(self) -> None:
        """SIGKILL the oldest worker and its executors, as when a machine goes, and put a new one beside those left."""
        _end(self.workers.pop(0), signal.SIGKILL)
        self.add_worker()

    def _start(self, main: str, *arguments: str) -> "subprocess.Popen[bytes]":
        loopback = os.environ | {"SPARK_LOCAL_IP": "127.0.0.1", "SPARK_WORKER_DIR": str(self.folder / "work"), "TZ": "UTC"}
        loopback |= {"PYSPARK_PYTHON": sys.executable}  # which spark-class finds Spark by
        command = [str(_BIN / "spark-class"), f"org.apache.spark.deploy.{main}", *arguments, "--webui-port", str(_free_port())]
        with (self.folder / "cluster.log").open("a") as log:
            return subprocess.Popen(command, env=loopback, stdout=log, stderr=log, start_new_session=True)


def _end(process: "subprocess.Popen[bytes]", number: int) -> None:
    os.killpg(process.pid, number)
    process.wait(timeout=30)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Two workers."""
    cluster = Cluster(folder=tmp_path / "cluster")
    cluster.folder.mkdir()
    try:
        cluster.start(2)
        yield cluster
    finally:
        for process in [*cluster.workers, *([cluster.master] if cluster.master else [])]:
            _end(process, signal.SIGTERM)


def _zip(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for room in _ROOMS:
            for file in sorted((ROOT / room).rglob("*")):
                if file.suffix in (".py", ".yaml", ".html", ".css", ".js"):  # as `make zip`
                    archive.write(file, file.relative_to(ROOT).as_posix())
    return path


def _packed_environment(folder: Path) -> Path:
    """A virtual environment as an archive, as venv-pack makes them."""
    venv.create(folder / "environment", symlinks=True)
    (packages,) = (folder / "environment" / "lib").glob("python*/site-packages")
    (packages / "packages.pth").write_text(str(Path(pytest.__file__).parent.parent))
    path = folder / "environment.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder / "environment", arcname=".")
    return path


def _submit(cluster: Cluster, folder: Path, config: Path) -> "subprocess.Popen[str]":
    """The night, submitted from an empty folder."""
    command = [str(_BIN / "spark-submit"), "--master", cluster.url, "--py-files", str(_zip(folder / "mtmh.zip"))]
    command += ["--archives", f"{_packed_environment(folder)}#environment"]
    command += ["--jars", ",".join(map(str, sorted((ROOT / ".jars").glob("*.jar")))), "--driver-memory", "1g"]
    settings = {
        "spark.executor.memory": "1g",
        "spark.pyspark.python": "./environment/bin/python",
        "spark.pyspark.driver.python": sys.executable,
        "spark.driver.host": "127.0.0.1",
        "spark.ui.enabled": "false",
    }
    for key, value in settings.items():
        command += ["--conf", f"{key}={value}"]
    night = ["--run-date", str(date(2024, 3, 31)), "--config", str(config)]
    (folder / "elsewhere").mkdir()
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "SPARK_LOCAL_IP")}
    environment |= {"PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"}
    return subprocess.Popen(
        [*command, str(ROOT / "jobs" / "nightly.py"), *night],
        cwd=folder / "elsewhere",
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _config(folder: Path) -> Path:
    _WORLD.write(folder)
    training = {"num_steps": 5, "batch_size": 32, "num_processes": 2, "num_threads": 1, "local_mode": False}
    return write_config(folder, training=training, online={"shard_items": 8})  # so that the driver deals them to processes


def _check_lists(config: Path) -> None:
    root = lake_root(load_settings(str(config)).lake)
    item_id = _WORLD.item_id(1, 1)
    lists = neighbors_of(root, [item_id])
    assert _WORLD.bundle_of(item_id) == {n["neighbor_id"] for n in lists[(item_id, "engagement")][: _WORLD.num_categories - 1]}
    assert open_table(root, ITEM_NEIGHBORS).to_pyarrow_dataset().count_rows() == 3 * len(_WORLD.items())


def test_a_night_by_spark_submit(cluster: Cluster, tmp_path: Path) -> None:
    config = _config(tmp_path)
    night = _submit(cluster, tmp_path, config)
    said, _ = night.communicate(timeout=540)
    assert night.returncode == 0, said[-6000:]
    _check_lists(config)
    assert list((tmp_path / "cluster" / "work").glob("app-*/*/environment")), "executors unpacked the archive"


@pytest.mark.crash
@pytest.mark.timeout(1800)
def test_a_night_that_loses_a_worker_in_each_stage(cluster: Cluster, tmp_path: Path) -> None:
    """A second after a stage has begun, one of the two workers dies with its executor; the night finishes, and no stage was begun twice."""
    config, killed = _config(tmp_path), dict[str, float]()
    night = _submit(cluster, tmp_path, config)
    lines = list[str]()

    def kill(stage: str) -> None:
        cluster.kill_worker()
        killed[stage] = time.time()

    assert night.stdout is not None
    for line in night.stdout:
        lines.append(line)
        if line.startswith("▶ ") and (stage := line.split()[1]) in STAGES:
            threading.Timer(1.0, kill, [stage]).start()
    assert night.wait(timeout=60) == 0, "".join(lines)[-6000:]
    _check_lists(config)
    records = Ledger(root=lake_root(load_settings(str(config)).lake)).records()
    assert [(record.stage, record.status) for record in records] == [(stage, "succeeded") for stage in STAGES]
    inside = {record.stage for record in records if killed[record.stage] < record.ended_at.timestamp()}
    assert {"ingest", "build_pairs", "build_features", "train_model", "publish_neighbors"} <= inside
