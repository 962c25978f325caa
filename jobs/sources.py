"""Reading the user's own tables, with one clear error for each way in which that fails."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from conf.errors import SourceError
from conf.settings import PairSettings, SourceSettings, SourceTable

_UNKEYED = b"mtmh"
_HASH_SLOTS = 1_000_000
_UNREADABLE = re.compile(r"Encountered error while reading file (.+?)\.(?:\s|$)")


def read_source(spark: SparkSession, source: SourceTable, *, name: str) -> DataFrame:
    """A user's table as it is.

    Raises:
        SourceError: it is missing, unreadable or has no columns.
    """
    options = {"header": "true"} | source.options if source.format == "csv" else source.options
    where = f"source.{name}.path is {source.path!r}, read as {source.format}"
    try:
        frame = spark.read.format(source.format).options(**options).load(source.path)
    except (PySparkException, Py4JJavaError) as error:  # the latter where a job that looks into the files fails
        raise SourceError(
            f"cannot read the {name} table: {_cause(error)}\n{where}; check source.{name}.path and source.{name}.format"
        ) from error
    if not frame.columns:
        raise SourceError(f"the {name} table has no columns; {where}")
    return frame


@contextmanager
def reading_sources(sources: SourceSettings) -> Iterator[None]:
    """Turn the failure of a job that meets an unreadable file of a user's table into an error that names it.

    Raises:
        SourceError: a file cannot be read. Spark reads lazily, so that only a later job may notice.
    """
    try:
        yield
    except (PySparkException, Py4JJavaError) as error:
        if "FAILED_READ_FILE" not in str(error):
            raise
        paths = {name: table.path for name, table in sources.tables.items()}
        raise SourceError(f"cannot read a file of your tables: {_cause(error)}\nreading {paths}; repair or remove the file") from error


def _cause(error: PySparkException | Py4JJavaError) -> str:
    """First line of what went wrong; of a failed job, what its innermost exception says, and of which file."""
    if isinstance(error, PySparkException):
        return str(error).splitlines()[0]
    cause: Any = error.java_exception
    while cause.getCause() is not None:
        cause = cause.getCause()
    words, file = str(cause.getMessage()).splitlines()[0], _UNREADABLE.search(str(error))
    return words if file is None or file[1].rpartition("/")[2] in words else f"{words}, in {file[1]}"


def take_users(frame: DataFrame, user_column: str, *, share: float) -> DataFrame:
    """The rows of a share of the users, chosen by hash, so that every night takes the same ones."""
    if share == 1 or user_column.lower() not in map(str.lower, frame.columns):  # a missing column is reported by the check that follows
        return frame
    return frame.where(F.pmod(F.xxhash64(F.col(f"`{user_column}`").cast("string")), F.lit(_HASH_SLOTS)) < int(share * _HASH_SLOTS))


def user_hash_key(pairs: PairSettings) -> tuple[bytes, str | None]:
    """The key of user hashes, and a note where the environment does not set one."""
    key = os.environ.get(pairs.user_hash_key_env)
    if key:
        return key.encode(), None
    return _UNKEYED, f"user hashes are not keyed: set {pairs.user_hash_key_env} to a secret of your own"
