"""From the user's event table to `engagements`: one row per user, item, action and instant, all times UTC.

A night with run date D takes every engagement before D+1 00:00 UTC. For D = 2026-03-01, an event at 2026-03-01 23:59:59 is of this
night, one at 2026-03-02 00:00:00 is `later`: neither accepted nor refused, it waits for its night.
"""

from datetime import date, datetime, timedelta

import pyarrow as pa
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T

from conf.errors import SettingsError
from conf.settings import EventSource
from conf.tables import ENGAGEMENTS
from features.pair_kernels import keyed_hash
from features.sources import (
    blank,
    check_columns,
    col,
    finite,
    id_column,
    id_faults,
    is_number,
    is_text,
    read_columns,
    reasons,
    rejected_rows,
    source_row,
    start_of,
    text_column,
    time_column,
    time_faults,
    type_of,
    unusable,
)

__all__ = ["accepted_events", "check_columns", "check_events", "event_metrics", "rejected_rows"]

_SETTING = "source.events.columns"


def check_events(frame: DataFrame, *, source: EventSource, run_date: date, now: datetime, hash_key: bytes) -> DataFrame:
    """Every source row with what it means and what is wrong with it.

    Args:
        frame: the user's table as read.
        source: column names, time format and action weights.
        run_date: the night.
        now: the present, from which the future is told; a day of clock skew is allowed.
        hash_key: key of the user hashes in `row`.

    Returns:
        The columns of engagements (null where unreadable), and `reason` (null: accepted; several faults are joined by `; `),
        `row` (JSON of the mapped source values, the user id hashed), `later` (accepted, but after the run date). Rows of actions
        that `action_weights` leaves out are neither refused nor later, whatever else they hold.

    Raises:
        SourceError: a mapped column is missing or of an unusable type.
        SettingsError: the key is empty.
    """
    if not hash_key:
        raise SettingsError("the key of the user hashes is empty; set the environment variable that pairs.user_hash_key_env names")
    mapped = {name: column for name, column in source.columns.model_dump().items() if column is not None}
    check_columns(frame, wanted={f"{_SETTING}.{name}": column for name, column in mapped.items()}, table=f"events ({source.path})")
    read = {
        "user_id": id_column(frame, source.columns.user_id, setting=f"{_SETTING}.user_id"),
        "item_id": id_column(frame, source.columns.item_id, setting=f"{_SETTING}.item_id"),
        "action": _action(frame, source),
        "engaged_at": time_column(frame, source.columns.engaged_at, setting=f"{_SETTING}.engaged_at", time_format=source.time_format),
        "session_id": _session(frame, source),
        "weight": _source_weight(frame, source),
        "row": _row(source, mapped, hash_key),
    }
    checked = read_columns(frame, read).withColumn("weight", F.col("weight") * _action_weight(source))
    judged = checked.withColumn("reason", F.when(~_other_action(source), reasons(_faults(now))))
    tomorrow = F.lit(start_of(run_date + timedelta(days=1)))
    columns = {
        "later": _accepted(source) & F.coalesce(F.col("engaged_at") >= tomorrow, F.lit(False)),
        "event_date": F.to_date("engaged_at"),
    }
    return judged.withColumns(columns).select(*ENGAGEMENTS.column_names, "reason", "row", "later")


def accepted_events(checked: DataFrame, *, source: EventSource) -> DataFrame:
    """The engagements of this night, one per key: the largest weight and the smallest session id of its rows."""
    taken = checked.where(_accepted(source) & ~F.col("later"))
    rows = taken.groupBy(*ENGAGEMENTS.key).agg(F.max("weight").alias("weight"), F.min("session_id").alias("session_id"))
    return rows.withColumn("event_date", F.to_date("engaged_at")).select(*ENGAGEMENTS.column_names)


def event_metrics(checked: DataFrame, *, source: EventSource) -> dict[str, float]:
    """Counts of source rows in one pass: all, refused, later than the night, of actions that are left out, taken."""
    row = checked.agg(
        F.count(F.lit(1)).alias("num_source_events"),
        F.count_if(F.col("reason").isNotNull()).alias("num_rejected_events"),
        F.count_if(F.col("later")).alias("num_later_events"),
        F.count_if(_other_action(source)).alias("num_other_action_events"),
        F.count_if(_accepted(source) & ~F.col("later")).alias("num_taken_events"),
    ).first()
    assert row is not None  # an aggregate without groups has one row
    return {name: float(value) for name, value in row.asDict().items()}


def _other_action(source: EventSource) -> Column:
    return ~F.col("action").isin(*source.action_weights) if source.action_weights else F.lit(False)


def _accepted(source: EventSource) -> Column:
    return F.col("reason").isNull() & ~_other_action(source)


def _faults(now: datetime) -> list[tuple[Column, str]]:
    weight = F.col("weight")
    return [
        *id_faults("user_id"),
        *id_faults("item_id"),
        *id_faults("session_id", required=False),
        *time_faults(F.col("engaged_at"), "engaged_at", now=now),
        (~finite(weight), "weight is missing or not a finite number"),
        (finite(weight) & (weight <= 0), "weight is not above 0"),
    ]


def _action(frame: DataFrame, source: EventSource) -> Column:
    default = F.lit(source.default_action)
    name = source.columns.action
    return default if name is None else F.coalesce(text_column(frame, name, setting=f"{_SETTING}.action"), default)


def _source_weight(frame: DataFrame, source: EventSource) -> Column:
    name = source.columns.weight
    if name is None:
        return F.lit(1.0)
    type_ = type_of(frame, name)
    if not (is_number(type_) or is_text(type_)):
        raise unusable(frame, name, setting=f"{_SETTING}.weight", wanted="a number, or text that holds one")
    return col(name).try_cast("double")


def _action_weight(source: EventSource) -> Column:
    weight = F.lit(1.0)
    for action, value in source.action_weights.items():
        weight = F.when(F.col("action") == F.lit(action), F.lit(value)).otherwise(weight)
    return weight


def _session(frame: DataFrame, source: EventSource) -> Column:
    name = source.columns.session_id
    return F.lit(None).cast("string") if name is None else id_column(frame, name, setting=f"{_SETTING}.session_id")


def _row(source: EventSource, mapped: dict[str, str], hash_key: bytes) -> Column:
    """Source values with the user id hashed, wherever its column is mapped.

    The hash is a Python function since Spark's own would carry the key in the query plan, which logs and user interfaces show.
    Plans that do not read `row` do not call it.
    """
    user = F.make_valid_utf8(col(source.columns.user_id).cast("string"))

    def hash_users(users: pa.Array) -> pa.Array:  # a function, not a partial: Spark reads the type hints
        return _hash_users(users, key=hash_key)

    hashed = F.arrow_udf(hash_users, T.StringType())  # type: ignore[attr-defined]  # not in pyspark's stubs
    replaced = F.when(~blank(user), hashed(user)).otherwise(user)
    return source_row(list(mapped.values()), replaced={source.columns.user_id: replaced})


def _hash_users(users: pa.Array, key: bytes) -> pa.Array:
    return pa.array([None if user is None else f"{keyed_hash(user, key=key) % 2**64:016x}" for user in users.to_pylist()], pa.string())
