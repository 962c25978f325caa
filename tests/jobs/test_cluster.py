"""A small night by `spark-submit --py-files` on a standalone cluster: master and worker are processes of their own on loopback.

The night runs from an empty folder, so that every module comes from the zip; training and FAISS run in the executors' Python workers.
"""

import os
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest

from conf.settings import load_settings
from conf.tables import ITEM_NEIGHBORS
from jobs.reader import lake_root, neighbors_of, open_table
from tests.conftest import ROOT
from tests.worlds import BundleWorld, write_config

pytestmark = pytest.mark.night
_BIN = Path(sys.executable).parent
_ROOMS = ("conf", "features", "models", "validation", "jobs")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a standalone master with one worker of two cores."""
    folder = tmp_path_factory.mktemp("cluster")
    port = _free_port()
    loopback = os.environ | {"SPARK_LOCAL_IP": "127.0.0.1", "SPARK_WORKER_DIR": str(folder / "work"), "TZ": "UTC"}
    spark_class = [str(_BIN / "spark-class")]
    deploy = "org.apache.spark.deploy"
    master_args = [f"{deploy}.master.Master", "--host", "127.0.0.1", "--port", str(port), "--webui-port", str(_free_port())]
    worker_args = [f"{deploy}.worker.Worker", "-c", "2", "-m", "3g", "-h", "127.0.0.1", "--webui-port", str(_free_port())]
    url = f"spark://127.0.0.1:{port}"
    processes = []
    with (folder / "cluster.log").open("w") as log:
        try:
            for arguments in (master_args, [*worker_args, url]):
                processes.append(subprocess.Popen([*spark_class, *arguments], env=loopback, stdout=log, stderr=log, start_new_session=True))
                deadline = time.monotonic() + 60
                while not _listens(port) and time.monotonic() < deadline:
                    time.sleep(0.2)
            yield url
        finally:
            for process in processes:
                os.killpg(process.pid, 15)
                process.wait(timeout=30)


def _zip(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for room in _ROOMS:
            for file in sorted((ROOT / room).rglob("*")):
                if file.suffix in (".py", ".yaml", ".html", ".css", ".js"):  # as `make zip`
                    archive.write(file, file.relative_to(ROOT).as_posix())
    return path


def test_a_night_by_spark_submit(master: str, tmp_path: Path) -> None:
    world = BundleWorld(num_bundles=6, num_users=40)
    world.write(tmp_path)
    training = {"num_steps": 5, "batch_size": 32, "num_processes": 2, "local_mode": False}
    config = write_config(tmp_path, training=training)
    jars = sorted((ROOT / ".jars").glob("*.jar"))
    command = [str(_BIN / "spark-submit"), "--master", master, "--py-files", str(_zip(tmp_path / "mtmh.zip"))]
    command += ["--jars", ",".join(map(str, jars)), "--driver-memory", "1g"]
    settings = {
        "spark.executor.memory": "1g",
        "spark.pyspark.python": sys.executable,
        "spark.driver.host": "127.0.0.1",
        "spark.ui.enabled": "false",
    }
    for key, value in settings.items():
        command += ["--conf", f"{key}={value}"]
    night = ["--run-date", str(date(2024, 3, 31)), "--config", str(config)]
    (tmp_path / "elsewhere").mkdir()
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "SPARK_LOCAL_IP")}
    environment |= {"PYSPARK_DRIVER_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"}
    submitted = subprocess.run(
        [*command, str(ROOT / "jobs" / "nightly.py"), *night],
        cwd=tmp_path / "elsewhere",
        env=environment,
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert submitted.returncode == 0, submitted.stdout[-3000:] + submitted.stderr[-6000:]
    root = lake_root(load_settings(str(config)).lake)
    item_id = world.item_id(1, 1)
    lists = neighbors_of(root, [item_id])
    assert world.bundle_of(item_id) == {n["neighbor_id"] for n in lists[(item_id, "engagement")][: world.num_categories - 1]}
    assert open_table(root, ITEM_NEIGHBORS).to_pyarrow_dataset().count_rows() == 3 * len(world.items())
