"""From the user's catalog to `item_annotations`, its history over the nights, and what was known at a date. All times UTC.

An annotation holds from its event time and is known from its created time. As of run date D counts what holds and is known before
D+1 00:00: of two rows of an item with event times 2026-03-01 and 2026-03-03, run date 2026-03-02 sees the first, even if the second
was created earlier. A catalog without times has one row per item, at 1970-01-01.
"""

from datetime import date, datetime, timedelta
from functools import partial
from typing import Literal

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F
from pyspark.sql import types as T

from conf.settings import ItemSource, RelevanceSource
from conf.tables import ITEM_ANNOTATIONS, PAIR_RELEVANCE
from features.sources import (
    EPOCH,
    check_columns,
    col,
    collapse_duplicates,
    finite,
    id_column,
    id_faults,
    is_number,
    is_text,
    read_columns,
    reasons,
    source_row,
    start_of,
    text_column,
    time_column,
    time_faults,
    type_of,
    unusable,
)

_SETTING = "source.items.columns"
_MIXED_LENGTHS = "embedding length differs from most items"


def check_items(frame: DataFrame, *, source: ItemSource) -> DataFrame:
    """Every catalog row as an annotation, and what is wrong with it.

    A category path ends at its first empty level. Tags that are empty, repeated, or whose weight is not a finite number above 0
    are left out. Rows that say the same about the same item and time collapse into one; if they differ, the one created last is
    kept (then the one with the smallest content hash) and the others are refused.

    Returns:
        The columns of item_annotations, `reason` (null: accepted) and `row` (JSON of the mapped source values).

    Raises:
        SourceError: a mapped column is missing or of an unusable type.
    """
    check_columns(frame, wanted=_wanted(source), table=f"items ({source.path})")
    read = {
        "item_id": id_column(frame, source.columns.item_id, setting=f"{_SETTING}.item_id"),
        **_times(frame, source),
        "title": _text(frame, source.columns.title, "title"),
        "text": _kept(_text(frame, source.columns.text, "text"), source.text_pattern),
        "levels": _levels(frame, source),
        "labels": _labels(frame, source),
        "attributes": _attributes(frame, source),
        "embedding": _embedding(frame, source),
        "eligible": _eligible(frame, source),
        "filter_values": _filter_values(frame, source),
        "deleted": F.lit(False),
        "row": source_row(list(_wanted(source).values())),
    }
    checked = read_columns(frame, read).withColumns({"categories": _path(F.col("levels")), **_tags(F.col("labels"))})
    judged = checked.withColumn("reason", reasons(_item_faults())).withColumn("eligible", F.coalesce("eligible", F.lit(True)))
    if source.columns.embedding is not None:
        judged = _with_one_length(judged)
    content = [name for name in ITEM_ANNOTATIONS.column_names if name not in ("event_timestamp", "created_timestamp")]
    fault = "duplicate item_id with different content"
    unique = collapse_duplicates(judged, key=ITEM_ANNOTATIONS.key, latest_by="created_timestamp", content=content, fault=fault)
    return unique.select(*ITEM_ANNOTATIONS.column_names, "reason", "row")


def accepted_items(checked: DataFrame) -> DataFrame:
    """The accepted rows with exactly the columns of item_annotations."""
    return checked.where(F.col("reason").isNull()).select(*ITEM_ANNOTATIONS.column_names)


def check_pair_relevance(frame: DataFrame, *, source: RelevanceSource, now: datetime) -> DataFrame:
    """Every graded pair, and what is wrong with it; equal rows collapse, contradicting ones leave the smallest content hash.

    Returns:
        The columns of pair_relevance, `reason` (null: accepted) and `row`.

    Raises:
        SourceError: a mapped column is missing or of an unusable type.
    """
    setting = "source.pair_relevance.columns"
    mapped = {name: column for name, column in source.columns.model_dump().items() if column is not None}
    check_columns(frame, wanted={f"{setting}.{name}": column for name, column in mapped.items()}, table=f"pair_relevance ({source.path})")
    version = source.columns.source_version
    grade = source.columns.grade
    if not (is_number(type_of(frame, grade)) or is_text(type_of(frame, grade))):
        raise unusable(frame, grade, setting=f"{setting}.grade", wanted="a number in [0,1]")
    read = {
        "item_id": id_column(frame, source.columns.item_id, setting=f"{setting}.item_id"),
        "other_item_id": id_column(frame, source.columns.other_item_id, setting=f"{setting}.other_item_id"),
        "source": text_column(frame, source.columns.source, setting=f"{setting}.source"),
        "rated_at": time_column(frame, source.columns.rated_at, setting=f"{setting}.rated_at", time_format=source.time_format),
        "grade": col(grade).try_cast("double"),
        "source_version": F.lit(None).cast("string")
        if version is None
        else text_column(frame, version, setting=f"{setting}.source_version"),
        "row": source_row(list(mapped.values())),
    }
    checked = read_columns(frame, read)
    judged = checked.withColumn("reason", reasons(_relevance_faults(now)))
    fault = "duplicate pair, source and time with another grade"
    unique = collapse_duplicates(
        judged, key=PAIR_RELEVANCE.key, latest_by=None, content=[*PAIR_RELEVANCE.key, "grade", "source_version"], fault=fault
    )
    return unique.select(*PAIR_RELEVANCE.column_names, "reason", "row")


def votes_as_labels(feedback: DataFrame, *, run_date: date) -> DataFrame:
    """Rows of relevance_feedback to rows of pair_relevance of source `human`.

    Of several votes on a pair the latest before the end of the run date counts; a withdrawn one leaves no row.
    """
    cast = feedback.where(F.col("rated_at") < F.lit(start_of(run_date + timedelta(days=1))))
    last = Window.partitionBy("item_id", "other_item_id").orderBy(F.col("rated_at").desc(), F.col("grade").desc_nulls_last())
    latest = cast.withColumn("_rank", F.row_number().over(last)).where((F.col("_rank") == 1) & F.col("grade").isNotNull())
    named = latest.withColumns({"source": F.lit("human"), "source_version": F.lit("explorer")})
    return named.select(*PAIR_RELEVANCE.column_names)


def merge_annotations(
    existing: DataFrame | None,
    incoming: DataFrame,
    *,
    mode: Literal["snapshot", "changes"],
    run_date: date,
    point_in_time: bool,
) -> DataFrame:
    """The new full content of item_annotations.

    Of two rows with one key the later created stays, the incoming one at a tie. Deletion markers of incoming items go: the item is
    back, and a marker would outlive a row that carries an older event time. In a snapshot, every other item without a marker gets
    one at the run date's midnight. A catalog without times has no history, so all older rows of incoming items go with it.

    Args:
        existing: the table so far; None: there is none.
        incoming: accepted rows of this night.
        mode: snapshot: absent items have left the catalog; changes: absent items are unchanged.
        run_date: the night.
        point_in_time: whether the catalog has times.
    """
    incoming = incoming.select(*ITEM_ANNOTATIONS.column_names)
    if existing is None:
        return incoming
    present = incoming.select("item_id").distinct().withColumn("present", F.lit(True))
    known = existing.join(present, on="item_id", how="left").withColumn("present", F.coalesce("present", F.lit(False)))
    kept = known.where(~F.col("present") | (~F.col("deleted") & F.lit(point_in_time))).select(*ITEM_ANNOTATIONS.column_names)
    parts = [kept.withColumn("_priority", F.lit(0)), incoming.withColumn("_priority", F.lit(1))]
    if mode == "snapshot":
        gone = known.where(~F.col("present")).groupBy("item_id").agg(F.bool_or("deleted").alias("marked")).where(~F.col("marked"))
        parts.append(_markers(gone, run_date).withColumn("_priority", F.lit(2)))
    rows = parts[0]
    for part in parts[1:]:
        rows = rows.unionByName(part)
    order = [(F.col("_priority") == 2).desc(), F.col("created_timestamp").desc(), F.col("_priority").desc()]
    ranked = rows.withColumn("_rank", F.row_number().over(Window.partitionBy(*ITEM_ANNOTATIONS.key).orderBy(*order)))
    return ranked.where(F.col("_rank") == 1).select(*ITEM_ANNOTATIONS.column_names)


def annotations_as_of(annotations: DataFrame, *, run_date: date) -> DataFrame:
    """Native point-in-time join: per item the latest row that holds and is known before run_date + 1 day, `deleted` included."""
    end = F.lit(start_of(run_date + timedelta(days=1)))
    known = annotations.where((F.col("event_timestamp") < end) & (F.col("created_timestamp") < end))
    latest = Window.partitionBy("item_id").orderBy(F.col("event_timestamp").desc(), F.col("created_timestamp").desc())
    return known.withColumn("_rank", F.row_number().over(latest)).where(F.col("_rank") == 1).select(*ITEM_ANNOTATIONS.column_names)


def _wanted(source: ItemSource) -> dict[str, str]:
    """Column name by setting, lists numbered."""
    wanted: dict[str, str] = {}
    for name, value in source.columns.model_dump().items():
        if isinstance(value, list):
            wanted |= {f"{_SETTING}.{name}[{position}]": column for position, column in enumerate(value)}
        elif value is not None:
            wanted[f"{_SETTING}.{name}"] = value
    return wanted


def _item_faults() -> list[tuple[Column, str]]:
    vector = F.col("embedding")
    return [
        *id_faults("item_id"),
        *time_faults(F.col("event_timestamp"), "event_timestamp"),
        *time_faults(F.col("created_timestamp"), "created_timestamp"),
        (F.exists(vector, lambda x: ~finite(x)), "embedding holds a value that is not a finite number"),
        (F.col("eligible").isNull(), "eligible is not a boolean"),
    ]


def _relevance_faults(now: datetime) -> list[tuple[Column, str]]:
    grade = F.col("grade")
    return [
        *id_faults("item_id"),
        *id_faults("other_item_id"),
        (F.col("item_id") == F.col("other_item_id"), "item_id and other_item_id are the same"),
        (F.col("source").isNull(), "source is null or empty"),
        *time_faults(F.col("rated_at"), "rated_at", now=now),
        (~finite(grade) | ~grade.between(0.0, 1.0), "grade is not a number in [0,1]"),
    ]


def _times(frame: DataFrame, source: ItemSource) -> dict[str, Column]:
    event, created = source.columns.event_timestamp, source.columns.created_timestamp
    read = partial(time_column, frame, time_format=source.time_format)
    held = F.lit(EPOCH) if event is None else read(event, setting=f"{_SETTING}.event_timestamp")
    if created is None:
        return {"event_timestamp": held, "created_timestamp": held}
    known = read(created, setting=f"{_SETTING}.created_timestamp")
    return {"event_timestamp": held, "created_timestamp": F.when(col(created).isNull(), held).otherwise(known)}


def _text(frame: DataFrame, name: str | None, setting: str) -> Column:
    return F.lit(None).cast("string") if name is None else text_column(frame, name, setting=f"{_SETTING}.{setting}")


def _kept(text: Column, pattern: str | None) -> Column:
    """The part of a text that the pattern's group matches; the whole text where it does not."""
    if pattern is None:
        return text
    return F.when(F.regexp_like(text, F.lit(pattern)), F.nullif(F.trim(F.regexp_extract(text, pattern, 1)), F.lit(""))).otherwise(text)


def _list(frame: DataFrame, name: str, source: ItemSource, *, setting: str) -> Column:
    """An array of text: as it is, or split from text at `list_separator`."""
    type_ = type_of(frame, name)
    if is_text(type_):
        return F.split(F.make_valid_utf8(col(name)), r"\Q" + source.list_separator.replace(r"\E", r"\E\\E\Q") + r"\E")
    if isinstance(type_, T.ArrayType) and (is_text(type_.elementType) or is_number(type_.elementType)):
        return F.transform(col(name).cast("array<string>"), F.make_valid_utf8)
    raise unusable(frame, name, setting=setting, wanted=f"an array of text, or text split at {source.list_separator!r}")


def _levels(frame: DataFrame, source: ItemSource) -> Column:
    """The category columns as one array, empty levels as empty text."""
    names, setting = source.columns.categories, f"{_SETTING}.categories"
    if names is None:
        return F.lit(None).cast("array<string>")
    if isinstance(names, str):
        levels = _list(frame, names, source, setting=setting)
    else:
        levels = F.array(*(text_column(frame, name, setting=setting) for name in names))
    return F.transform(levels, lambda level: F.coalesce(F.trim(level), F.lit("")))


def _path(levels: Column) -> Column:
    """Levels up to the first empty one."""
    first_empty = F.array_position(levels, "")
    return _unless_empty(F.when(first_empty == 0, levels).otherwise(F.slice(levels, 1, (first_empty - 1).cast("int"))))


def _labels(frame: DataFrame, source: ItemSource) -> Column:
    """The tags as array<struct<tag string, weight double>>, those without text or with an unusable weight left out."""
    name, setting = source.columns.tags, f"{_SETTING}.tags"
    if name is None:
        return F.lit(None).cast("array<struct<tag:string,weight:double>>")
    type_ = type_of(frame, name)
    if isinstance(type_, T.ArrayType) and isinstance(type_.elementType, T.StructType):
        fields = {field.name.lower(): field.name for field in type_.elementType.fields}
        if "tag" not in fields:
            raise unusable(frame, name, setting=setting, wanted="array<struct<tag, weight>>")
        labels = F.transform(col(name), lambda x: _label(x[fields["tag"]], x[fields["weight"]] if "weight" in fields else F.lit(None)))
    else:
        labels = F.transform(_list(frame, name, source, setting=setting), lambda x: _label(x, F.lit(None)))
    return F.filter(labels, lambda x: x["tag"].isNotNull() & (x["tag"] != "") & finite(x["weight"]) & (x["weight"] > 0))


def _label(text: Column, weight: Column) -> Column:
    """A missing weight is 1; one that is there and no number becomes null, which removes the tag."""
    value = F.when(weight.isNull(), F.lit(1.0)).otherwise(weight.try_cast("double"))
    return F.struct(F.trim(F.make_valid_utf8(text.cast("string"))).alias("tag"), value.alias("weight"))


def _tags(labels: Column) -> dict[str, Column]:
    """Parallel arrays; of repeated tags the first."""
    names = F.transform(labels, lambda x: x["tag"])
    first = F.filter(labels, lambda x, index: F.array_position(names, x["tag"]) == index + 1)
    return {
        "tags": _unless_empty(F.transform(first, lambda x: x["tag"])),
        "tag_weights": _unless_empty(F.transform(first, lambda x: x["weight"])),
    }


def _unless_empty(array: Column) -> Column:
    return F.when(F.size(array) > 0, array)


def _attributes(frame: DataFrame, source: ItemSource) -> Column:
    names = list(dict.fromkeys(source.columns.attributes))
    if not names:
        return F.lit(None).cast("map<string,string>")
    values = [part for name in names for part in (F.lit(name), text_column(frame, name, setting=f"{_SETTING}.attributes"))]
    present = F.map_filter(F.create_map(*values), lambda _, value: value.isNotNull())
    return F.when(F.size(present) > 0, present)


def _filter_values(frame: DataFrame, source: ItemSource) -> Column:
    """Distinct values that are not blank, per column; a column without any is left out."""
    names, setting = list(dict.fromkeys(source.columns.filters)), f"{_SETTING}.filters"
    if not names:
        return F.lit(None).cast("map<string,array<string>>")
    parts = [part for name in names for part in (F.lit(name), _values(frame, name, source, setting=setting))]
    present = F.map_filter(F.create_map(*parts), lambda _, values: F.size(values) > 0)
    return F.when(F.size(present) > 0, present)


def _values(frame: DataFrame, name: str, source: ItemSource, *, setting: str) -> Column:
    """An array of text, or the text of a column: split if it is text, whole if it is a number, a time or a boolean."""
    type_ = type_of(frame, name)
    if is_text(type_) or isinstance(type_, T.ArrayType):
        values = _list(frame, name, source, setting=setting)
    else:
        values = F.array(text_column(frame, name, setting=setting))
    trimmed = F.transform(F.coalesce(values, F.array().cast("array<string>")), lambda value: F.trim(value))
    return F.array_distinct(F.filter(trimmed, lambda value: value != ""))


def _embedding(frame: DataFrame, source: ItemSource) -> Column:
    """An unreadable number becomes NaN, so that it is told from a missing vector."""
    name = source.columns.embedding
    if name is None:
        return F.lit(None).cast("array<float>")
    values = _list(frame, name, source, setting=f"{_SETTING}.embedding")
    return _unless_empty(F.transform(values, lambda x: F.coalesce(x.try_cast("float"), F.lit(float("nan")).cast("float"))))


def _with_one_length(checked: DataFrame) -> DataFrame:
    """Refuse embeddings of another length than the most common one (the shorter at a tie)."""
    length = F.size("embedding")
    usual = checked.where(F.col("reason").isNull()).agg(F.mode(length, deterministic=True).alias("_length"))
    differs = F.col("embedding").isNotNull() & (length != F.col("_length"))
    reason = F.nullif(F.concat_ws("; ", "reason", F.when(differs, F.lit(_MIXED_LENGTHS))), F.lit(""))
    return checked.crossJoin(F.broadcast(usual)).withColumn("reason", reason).drop("_length")


def _eligible(frame: DataFrame, source: ItemSource) -> Column:
    """Null only where a value is there and is no boolean."""
    name = source.columns.eligible
    if name is None:
        return F.lit(True)
    type_ = type_of(frame, name)
    if isinstance(type_, T.BooleanType) or is_text(type_) or isinstance(type_, T.IntegralType):
        return F.when(col(name).isNull(), F.lit(True)).otherwise(col(name).try_cast("boolean"))
    raise unusable(frame, name, setting=f"{_SETTING}.eligible", wanted="a boolean, or text that holds true or false")


def _markers(gone: DataFrame, run_date: date) -> DataFrame:
    """One deletion marker per item: known and holding from the run date's midnight."""
    midnight = F.lit(start_of(run_date))
    given = {
        "item_id": F.col("item_id"),
        "event_timestamp": midnight,
        "created_timestamp": midnight,
        "eligible": F.lit(False),
        "deleted": F.lit(True),
    }
    columns = [given.get(c.name, F.lit(None)).cast(c.type).alias(c.name) for c in ITEM_ANNOTATIONS.columns]
    return gone.select(*columns)
