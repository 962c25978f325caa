"""One lazy Spark session for all tests, and one Redis server; tests that do not ask for them run without."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"
COMPILING_LITTLE = {
    "spark.sql.codegen.wholeStage": "false",
    "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:ReservedCodeCacheSize=256m -XX:+UseSerialGC",
}
"""Half of a JVM's time on a small world is compiling code that runs once; nights that spark-submit starts compile as yours do."""
os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small worlds: threads that wait for each other cost more than they bring, twenty times here


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkSession]:
    """A local session with Delta; started once, at the first test that needs it."""
    from conf.settings import SparkSettings
    from jobs.session import start_session

    settings = {"spark.sql.warehouse.dir": str(tmp_path_factory.mktemp("warehouse")), **COMPILING_LITTLE}
    session = start_session(SparkSettings(driver_memory="2g", shuffle_partitions=2, settings=settings), app_name="tests")
    yield session
    session.stop()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the two development sets, which a fresh clone does not have."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"the development data sets are not on this machine (looked in {SHARED_DATA})")
    return SHARED_DATA


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """host:port of a real server on a free port of the loopback, with nothing in it."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("no redis-server on PATH; `apt-get install redis-server`, or your system's equivalent")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("redis")
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(folder)]
    with (folder / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"127.0.0.1:{port}"
        server.terminate()
