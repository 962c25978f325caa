"""One lazy Spark session for all tests; tests that do not ask for it run without a JVM."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"
os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkSession]:
    """A local session with Delta; started once, at the first test that needs it."""
    from conf.settings import SparkSettings
    from jobs.session import start_session

    warehouse = {"spark.sql.warehouse.dir": str(tmp_path_factory.mktemp("warehouse"))}
    session = start_session(SparkSettings(driver_memory="2g", shuffle_partitions=2, settings=warehouse), app_name="tests")
    yield session
    session.stop()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the two development sets, which a fresh clone does not have."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"the development data sets are not on this machine (looked in {SHARED_DATA})")
    return SHARED_DATA
