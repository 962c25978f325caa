"""The Spark session of a job, and the process settings that every integration relies on (all times are UTC)."""

import logging
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from pyspark.sql import SparkSession

from conf.errors import MachineError
from conf.memory import KEPT_MEMORY
from conf.settings import SparkSettings

ROOT = Path(__file__).resolve().parent.parent
"""The checkout, or the zip that the jobs were loaded from."""


def use_utc() -> None:
    """Set the process time zone to UTC: Feast loses the newest values in any other."""
    os.environ["TZ"] = "UTC"
    time.tzset()


def check_java() -> None:
    """Raise MachineError unless a Java that Spark 4.1 supports answers."""
    java = shutil.which("java") if not (home := os.environ.get("JAVA_HOME")) else shutil.which("java", path=f"{home}/bin")
    wanted = "Java 17 or 21 is wanted; install it, e.g. `apt-get install openjdk-17-jre-headless`, or point JAVA_HOME at it"
    if java is None:
        raise MachineError(f"no java found on PATH or under JAVA_HOME; {wanted}")
    text = subprocess.run([java, "-version"], capture_output=True, text=True, check=False).stderr  # noqa: S603 - java found above
    version = re.search(r'version "(\d+)', text)
    if version is None or int(version.group(1)) not in (17, 21):
        raise MachineError(f"found {text.splitlines()[0] if text else 'an unreadable java -version'} at {java}; {wanted}")


def _settings(spark: SparkSettings) -> dict[str, str]:
    settings = {
        "spark.sql.session.timeZone": "UTC",  # with TZ=UTC: Feast's point-in-time bound is naive
        "spark.sql.shuffle.partitions": str(spark.shuffle_partitions),
        "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
        "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
        "spark.databricks.delta.snapshotPartitions": "1",  # 50 by default: a small overwrite took 5.5 s instead of 1
        "spark.sql.sources.parallelPartitionDiscovery.parallelism": "4",  # 10000 by default: VACUUM crawled over a minute
        "spark.sql.execution.arrow.pyspark.enabled": "true",  # toPandas without it is three times slower
        "spark.sql.execution.arrow.maxRecordsPerBatch": "4096",  # FAISS wants large batches
        **{f"spark.executorEnv.{name}": value for name, value in KEPT_MEMORY.items()},
        "spark.scheduler.barrier.maxConcurrentTasksCheck.interval": "1s",  # too few slots for the torch workers:
        "spark.scheduler.barrier.maxConcurrentTasksCheck.maxFailures": "3",  # a clear error in 8 s instead of a 10-minute hang
    }
    return settings | spark.settings


def _local_settings(spark: SparkSettings) -> dict[str, str]:
    settings = {
        "spark.driver.memory": spark.driver_memory,
        "spark.driver.host": "127.0.0.1",  # loopback only: nothing outside the machine can reach the driver
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.python.daemon.module": "jobs.worker_daemon",  # less to do between tasks
        "spark.python.unix.domain.socket.enabled": "true",  # TCP waits for acknowledgements: see there
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",  # our own progress display replaces it
        "spark.sql.warehouse.dir": str(Path("var/warehouse").absolute()),
    }
    if jars := sorted((ROOT / ".jars").glob("*.jar")):
        settings["spark.jars"] = ",".join(map(str, jars))
    else:
        settings["spark.jars.packages"] = "io.delta:delta-spark_4.1_2.13:4.4.0"
    return settings


def _prepare_local_workers() -> None:
    """Spark's Python workers, and torch's, run this interpreter and find our modules from any folder."""
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # the default is whatever python3 is on PATH
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))


def start_session(spark: SparkSettings, *, app_name: str) -> SparkSession:
    """The active session under spark-submit, else a local one.

    Raises:
        MachineError: Java is missing or of an unsupported version.
    """
    use_utc()
    check_java()
    builder = SparkSession.builder.appName(app_name)
    submitted = "PYSPARK_GATEWAY_PORT" in os.environ  # set by spark-submit, which owns master, jars and memory
    settings = _settings(spark) if submitted else _local_settings(spark) | _settings(spark)
    if not submitted:
        _prepare_local_workers()
        builder = builder.master(spark.master)
    for key, value in settings.items():
        builder = builder.config(key, value)
    session = builder.getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    for name in ("SQLQueryContextLogger", "DataFrameQueryContextLogger"):  # 60 lines of JSON for an error that is raised anyway
        logging.getLogger(name).setLevel(logging.CRITICAL)
    assert session.conf.get("spark.sql.session.timeZone") == "UTC"
    assert time.tzname[0] == "UTC"
    return session
