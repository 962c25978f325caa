"""What the checks of all user tables share: columns by name and type, tolerant readings of text and time, refused rows.

A column of an unusable type is a fault of the configuration and raises; an unusable value is a fault of its row and becomes a reason.
ANSI mode is on, so every reading of a user's value goes through `try_cast`: a bad value is null here, never a failed night.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F
from pyspark.sql import types as T

from conf.errors import SourceError
from conf.settings import TimeFormat
from conf.tables import REJECTED_ROWS

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_TIMES = (T.TimestampType, T.TimestampNTZType, T.DateType)
_TEXTS = (T.StringType, T.CharType, T.VarcharType)
_LAST_SECOND = 253_402_300_799  # 9999-12-31 23:59:59: later values overflow a timestamp
_STARTS_WITH_A_YEAR = r"^\s*[+-]?\d{4,6}-"  # Spark reads a bare time of day as today: a clock in the data


def check_columns(frame: DataFrame, *, wanted: Mapping[str, str], table: str) -> None:
    """Raise unless the frame has every wanted column (upper and lower case are one, as in Spark).

    Args:
        frame: the user's table.
        wanted: column name by the setting that names it, e.g. `{"source.events.columns.item_id": "sku"}`.
        table: what to call the table.

    Raises:
        SourceError: names all missing columns, those present, and the settings to change.
    """
    have = {name.lower() for name in frame.columns}
    missing = {setting: name for setting, name in wanted.items() if name.lower() not in have}
    if missing:
        names = sorted(set(missing.values()))
        raise SourceError(f"missing columns {names} in {table}; have {frame.columns}; set {', '.join(sorted(missing))}")


def col(name: str) -> Column:
    """A top-level column whatever its name holds: dots, spaces, backticks."""
    return F.col(f"`{name.replace('`', '``')}`")


def type_of(frame: DataFrame, name: str) -> T.DataType:
    """Type of a column, found as Spark finds it: without regard to case."""
    return next(field.dataType for field in frame.schema.fields if field.name.lower() == name.lower())


def unusable(frame: DataFrame, name: str, *, setting: str, wanted: str) -> SourceError:
    """The error for a column of a type that cannot be read."""
    return SourceError(f"column {name!r} is {type_of(frame, name).simpleString()}; wanted {wanted}; change the table or set {setting}")


def is_text(type_: T.DataType) -> bool:
    """Text of any declared length."""
    return isinstance(type_, _TEXTS)


def is_integer(type_: T.DataType) -> bool:
    """A number without fraction, so that its text is its digits."""
    return isinstance(type_, T.IntegralType) or (isinstance(type_, T.DecimalType) and type_.scale == 0)


def is_number(type_: T.DataType) -> bool:
    """Any number."""
    return isinstance(type_, T.NumericType)


def read_columns(frame: DataFrame, read: Mapping[str, Column]) -> DataFrame:
    """Exactly the given columns under the given names.

    The names are given after the select: inside one, Spark takes a source column in a nested lambda for an output of the same name.
    """
    return frame.select(*(column.alias(f"_read_{name}") for name, column in read.items())).toDF(*read)


def id_column(frame: DataFrame, name: str, *, setting: str) -> Column:
    """An id as text, exactly as the table holds it; null where it is null, empty or blank. Bytes that are no UTF-8 become U+FFFD.

    Raises:
        SourceError: the column is neither text nor integer; of a float, 12 and 12.0 would be two ids.
    """
    type_ = type_of(frame, name)
    if not (is_text(type_) or is_integer(type_)):
        hint = "text or an integer (store float ids as text or integer)" if is_number(type_) else "text or an integer"
        raise unusable(frame, name, setting=setting, wanted=hint)
    text = F.make_valid_utf8(col(name).cast("string"))
    return F.when(~blank(text), text)


def text_column(frame: DataFrame, name: str, *, setting: str) -> Column:
    """Trimmed text of a text, number, date or boolean column; null where nothing is left. Bytes that are no UTF-8 become U+FFFD.

    Raises:
        SourceError: the column is an array, map, struct or binary.
    """
    if isinstance(type_of(frame, name), T.ArrayType | T.MapType | T.StructType | T.BinaryType):
        raise unusable(frame, name, setting=setting, wanted="text")
    return F.nullif(F.trim(F.make_valid_utf8(col(name).cast("string"))), F.lit(""))


def time_column(frame: DataFrame, name: str, *, setting: str, time_format: TimeFormat) -> Column:
    """A timestamp, as the table's `time_format` says; null where unreadable.

    `timestamp` takes timestamps, dates (their midnight) and ISO 8601 text (without zone: UTC), `date` the midnight of these, and the two
    epochs take numbers, or text that holds one.

    Raises:
        SourceError: the column is of another type.
    """
    type_, formats = type_of(frame, name), f"{setting.partition('.columns.')[0]}.time_format"
    if time_format.startswith("epoch"):
        if not (is_number(type_) or is_text(type_)):
            raise unusable(frame, name, setting=formats, wanted="a number, or text that holds one")
        return _from_epoch(col(name), milliseconds=time_format == "epoch_milliseconds")
    if isinstance(type_, _TIMES):
        moment = col(name).cast("timestamp")
    elif is_text(type_):
        moment = F.when(col(name).rlike(_STARTS_WITH_A_YEAR), col(name).try_cast("timestamp"))
    elif is_number(type_):
        raise unusable(frame, name, setting=f"{formats} (epoch_seconds or epoch_milliseconds)", wanted="timestamp, date or ISO 8601 text")
    else:
        raise unusable(frame, name, setting=setting, wanted="timestamp, date or ISO 8601 text")
    return F.date_trunc("day", moment) if time_format == "date" else moment


def _from_epoch(number: Column, *, milliseconds: bool) -> Column:
    """Exact decimal arithmetic: a double of microseconds since 1970 would round, and overflow raises under ANSI."""
    value = number.try_cast(T.DecimalType(24, 6))
    seconds = (value * F.lit(Decimal("0.001"))).try_cast(T.DecimalType(24, 6)) if milliseconds else value
    return F.timestamp_seconds(F.when(F.abs(seconds) <= F.lit(_LAST_SECOND), seconds.cast(T.DecimalType(20, 6))))


def blank(text: Column) -> Column:
    """Null, empty or white space only."""
    return text.isNull() | (F.length(F.regexp_replace(text, r"\s", "")) == 0)


def finite(number: Column) -> Column:
    """Neither null, NaN nor infinite."""
    return number.isNotNull() & ~F.isnan(number) & (F.abs(number) < F.lit(float("inf")))


def reasons(faults: Iterable[tuple[Column, str]]) -> Column:
    """All faults of a row in words, `; ` between them; null where there is none."""
    found = [F.when(condition, F.lit(text)) for condition, text in faults]
    return F.nullif(F.concat_ws("; ", *found), F.lit(""))


def id_faults(name: str, *, required: bool = True) -> list[tuple[Column, str]]:
    """Faults of an id that was read by `id_column`. Two ids that were mangled may have become one, so that none is taken."""
    missing = [(F.col(name).isNull(), f"{name} is null or empty")] if required else []
    return [*missing, (F.contains(F.col(name), F.lit("\ufffd")), f"{name} is not the UTF-8 it was read as")]


def time_faults(moment: Column, name: str, *, now: datetime | None = None) -> list[tuple[Column, str]]:
    """Faults that any time can have; `now` None: the future is no fault, as of a price from next Monday."""
    faults = [
        (moment.isNull(), f"{name} is missing or not a time"),
        (moment < F.lit(EPOCH), f"{name} is before 1970"),
    ]
    if now is not None:
        faults.append((moment > F.lit(now + timedelta(days=1)), f"{name} is in the future"))
    return faults


def source_row(names: Sequence[str], *, replaced: Mapping[str, Column] | None = None) -> Column:
    """JSON of the given source columns, nulls included; `replaced` gives another value for a column."""
    distinct = list(dict.fromkeys(names))
    values = [(replaced or {}).get(name, col(name)).alias(name) for name in distinct]
    return F.to_json(F.struct(*values), {"ignoreNullFields": "false"})


def start_of(day: date) -> datetime:
    """00:00 UTC of a day."""
    return datetime.combine(day, time(), tzinfo=UTC)


def collapse_duplicates(frame: DataFrame, *, key: Sequence[str], latest_by: str | None, content: Sequence[str], fault: str) -> DataFrame:
    """One accepted row per key: the latest by `latest_by`, then the one with the smallest content hash.

    Others with the same content disappear; others with different content get `fault` as their reason. Rows that have a reason
    already pass unchanged.
    """
    accepted = F.col("reason").isNull()
    hashed = frame.withColumn("_hash", F.sha2(F.to_json(F.struct(*content)), 256))
    order = [*([F.col(latest_by).desc()] if latest_by else []), F.col("_hash")]
    rows = Window.partitionBy(*key).orderBy(*order).rowsBetween(Window.unboundedPreceding, Window.currentRow)
    ranked = hashed.where(accepted).withColumns(
        {"_rank": F.row_number().over(Window.partitionBy(*key).orderBy(*order)), "_first": F.first("_hash").over(rows)}
    )
    kept = ranked.where((F.col("_rank") == 1) | (F.col("_hash") != F.col("_first")))
    judged = kept.withColumn("reason", F.when(F.col("_rank") > 1, F.lit(fault)))
    return judged.select(frame.columns).unionByName(frame.where(~accepted))


def rejected_rows(checked: DataFrame, *, run_id: str, source: str) -> DataFrame:
    """Refused rows of a checked source as rejected_rows; identical ones are counted.

    Args:
        checked: any frame with `reason` and `row`.
        run_id: the night.
        source: events, items or pair_relevance.
    """
    counted = (
        checked.where(F.col("reason").isNotNull()).groupBy("row").agg(F.min("reason").alias("reason"), F.count(F.lit(1)).alias("num_rows"))
    )
    return counted.withColumns({"run_id": F.lit(run_id), "source": F.lit(source)}).select(*REJECTED_ROWS.column_names)
