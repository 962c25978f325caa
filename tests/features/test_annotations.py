"""What ingest makes of a catalog, how its history grows over nights, and what was known when."""

from collections.abc import Mapping
from datetime import UTC, date, datetime

import pytest
from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.sql import functions as F

from conf.errors import SourceError
from conf.settings import ItemColumns, ItemSource, RelevanceSource
from conf.tables import ITEM_ANNOTATIONS, PAIR_RELEVANCE
from features.annotations import accepted_items, annotations_as_of, check_items, check_pair_relevance, merge_annotations

SOURCE = ItemSource(
    path="items",
    columns=ItemColumns(
        item_id="sku",
        title="name",
        categories=["dept", "class"],
        tags="tags",
        attributes=["brand", "size"],
        embedding="vector",
        eligible="sold",
        filters=["dept", "size", "shops"],
        event_timestamp="valid",
        created_timestamp="known",
    ),
)
SCHEMA = (
    "sku string, name string, dept string, class string, tags array<struct<tag string, weight string>>, brand string, size int, "
    "vector array<double>, sold string, valid string, known string, shops array<string>"
)
BASE: dict[str, object] = {
    "sku": "a",
    "name": "Tea",
    "dept": "food",
    "class": "drinks",
    "tags": [("hot", "2"), ("leaf", None)],
    "brand": "x",
    "size": 5,
    "vector": [1.0, 0.5],
    "sold": None,
    "valid": "2024-01-02",
    "known": None,
    "shops": None,
}
DAY = datetime(2024, 1, 2)


def catalog(spark: SparkSession, *overrides: Mapping[str, object]) -> DataFrame:
    return spark.createDataFrame([tuple((BASE | override).values()) for override in overrides], SCHEMA)


def test_a_part_of_the_text_is_kept(spark: SparkSession) -> None:
    source = ItemSource(path="items", columns=ItemColumns(item_id="sku", text="name"), text_pattern=r"(?s)^(.*?)(?: tags: .*)?$")
    texts = ["A game by X. tags: horror,\nshort", "no tags here", " tags: only", None]
    frame = spark.createDataFrame([(str(number), text) for number, text in enumerate(texts)], "sku string, name string")
    found = {row["item_id"]: row["text"] for row in check_items(frame, source=source).collect()}
    assert [found[str(number)] for number in range(4)] == ["A game by X.", "no tags here", "tags: only", None]
    with pytest.raises(ValueError, match="wanted one group in parentheses, found 0"):
        ItemSource(path="items", text_pattern="tags")


def test_rows_of_a_catalog(spark: SparkSession) -> None:
    refused = {
        "": "item_id is null or empty",
        "r1": "event_timestamp is missing or not a time",
        "r2": "event_timestamp is before 1970",
        "r3": "created_timestamp is missing or not a time",
        "r4": "embedding holds a value that is not a finite number",
        "r5": "embedding length differs from most items",
        "r6": "eligible is not a boolean",
    }
    checked = check_items(
        catalog(
            spark,
            {"sku": ""},
            {"sku": "r1", "valid": "soon", "known": "2024-01-02"},
            {"sku": "r2", "valid": "1960-01-01", "known": "2024-01-02"},
            {"sku": "r3", "known": "x"},
            {"sku": "r4", "vector": [1.0, float("nan")]},
            {"sku": "r5", "vector": [1.0]},
            {"sku": "r6", "sold": "perhaps"},
            {"sku": "full", "known": "2024-01-03T00:00:00Z", "sold": "false", "shops": ["de", " fr", "", None, "de"]},
            {"sku": "gap", "dept": " ", "name": " ", "brand": None, "size": None, "vector": None},
            {"sku": "level", "class": None, "tags": []},
            {"sku": "tags", "tags": [("", "1"), (" b ", "1"), ("b", "3"), ("c", "0"), ("d", "NaN"), ("e", "x"), ("f", None), (None, "1")]},
        ),
        source=SOURCE,
    )
    assert checked.columns == [*ITEM_ANNOTATIONS.column_names, "reason", "row"]
    found = {row["item_id"] or "": row for row in checked.collect()}
    assert {name: row["reason"] for name, row in found.items() if row["reason"]} == refused
    full = found["full"]
    assert full[:11] == (
        *("full", DAY, datetime(2024, 1, 3), "Tea", None, ["food", "drinks"], ["hot", "leaf"], [2.0, 1.0]),
        *({"brand": "x", "size": "5"}, [1.0, 0.5], False),
    )
    assert full["filter_values"] == {"dept": ["food"], "size": ["5"], "shops": ["de", "fr"]}
    gap = found["gap"]
    assert gap["filter_values"] is None
    assert (gap["categories"], gap["title"], gap["attributes"], gap["embedding"], gap["eligible"]) == (None, None, None, None, True)
    assert gap["created_timestamp"] == gap["event_timestamp"] == DAY
    assert (found["level"]["categories"], found["level"]["tags"], found["level"]["tag_weights"]) == (["food"], None, None)
    # a weight that is there and unusable removes its tag, a missing one is 1, a repeated tag counts once
    assert (found["tags"]["tags"], found["tags"]["tag_weights"]) == (["b", "f"], [1.0, 1.0])
    assert accepted_items(checked).columns == list(ITEM_ANNOTATIONS.column_names)


def test_text_columns_and_catalogs_without_times(spark: SparkSession) -> None:
    columns = ItemColumns(item_id="id", categories="path", tags="tags", embedding="vector", eligible="sold")
    rows = [(1, "food|drinks||x", "b| a |b||", "1|2.5", 0), (2, None, "", "1|x", 1), (3, "|food", None, None, None)]
    frame = spark.createDataFrame(rows, "id bigint, path string, tags string, vector string, sold int")
    found = {row["item_id"]: row for row in check_items(frame, source=ItemSource(path="items", columns=columns)).collect()}
    first = found["1"]
    assert (first["categories"], first["tags"], first["embedding"]) == (["food", "drinks"], ["b", "a"], [1.0, 2.5])
    assert (first["eligible"], first["event_timestamp"], first["created_timestamp"]) == (False, datetime(1970, 1, 1), datetime(1970, 1, 1))
    assert found["2"]["reason"] == "embedding holds a value that is not a finite number"
    assert (found["3"]["categories"], found["3"]["eligible"], found["3"]["reason"]) == (None, True, None)
    # the separator is text, not a pattern
    odd = ItemSource(path="items", columns=ItemColumns(item_id="id", tags="tags"), list_separator=r".\E")
    tagged = spark.createDataFrame([("a", r"x.y.\Ez")], "id string, tags string")
    assert check_items(tagged, source=odd).collect()[0]["tags"] == ["x.y", "z"]


def test_duplicates(spark: SparkSession) -> None:
    checked = check_items(
        catalog(
            spark,
            {"sku": "same"},
            {"sku": "same"},
            {"sku": "late", "name": "old", "known": "2024-01-03"},
            {"sku": "late", "name": "new", "known": "2024-01-04"},
            {"sku": "late", "name": "new", "known": "2024-01-03"},
            {"sku": "tie", "name": "one"},
            {"sku": "tie", "name": "two"},
            {"sku": "tie", "name": "two", "valid": "2024-01-05"},
        ),
        source=SOURCE,
    )
    rows = checked.collect()
    accepted = sorted((row["item_id"], row["title"], row["created_timestamp"].day) for row in rows if row["reason"] is None)
    assert [row for row in accepted if row[0] != "tie"] == [("late", "new", 4), ("same", "Tea", 2)]
    assert [row[2] for row in accepted if row[0] == "tie"] == [2, 5]
    refused = sorted((row["item_id"], row["reason"]) for row in rows if row["reason"])
    assert refused == [(item, "duplicate item_id with different content") for item in ("late", "tie")]


def test_unusable_catalogs(spark: SparkSession) -> None:
    good = catalog(spark, {})
    with pytest.raises(SourceError, match=r"missing columns \['class', 'size'\] in items .*attributes\[1\], .*categories\[1\]"):
        check_items(good.drop("class", "size"), source=SOURCE)
    for name, column, message in [
        ("sku", F.lit(1.5), "'sku' is double; wanted text or an integer"),
        ("name", F.array(F.lit("x")), r"'name' is array<string>; wanted text"),
        ("tags", F.lit(1), r"'tags' is int; wanted an array of text, or text split at '\|'"),
        ("tags", F.array(F.struct(F.lit("x").alias("label"))), r"wanted array<struct<tag, weight>>"),
        ("valid", F.lit(3), "'valid' is int; wanted timestamp, date or ISO 8601 text"),
        ("sold", F.lit(0.5), "'sold' is double; wanted a boolean"),
    ]:
        with pytest.raises(SourceError, match=message):
            check_items(good.withColumn(name, column), source=SOURCE)


def test_graded_pairs(spark: SparkSession) -> None:
    base = ("a", "b", "human", "2024-01-02", 0.5)
    rows = [
        base,
        base,
        (*base[:4], 0.75),  # contradicts: one of both is refused
        ("a", "c", *base[2:4], 0.0),
        ("a", "d", *base[2:4], 1.0),
        ("a", "e", *base[2:4], 1.01),
        ("a", "f", *base[2:4], float("nan")),
        ("a", "g", *base[2:4], None),
        ("a", "a", *base[2:]),
        (None, "h", *base[2:]),
        ("a", "i", "", *base[3:]),
        ("a", "j", "human", "2030-01-01", 0.5),
    ]
    frame = spark.createDataFrame(rows, "item_id string, other_item_id string, source string, rated_at string, grade double")
    checked = check_pair_relevance(frame, source=RelevanceSource(path="labels"), now=datetime(2024, 2, 1, tzinfo=UTC))
    assert checked.columns == [*PAIR_RELEVANCE.column_names, "reason", "row"]
    found = checked.collect()
    assert sorted(row["other_item_id"] for row in found if row["reason"] is None) == ["b", "c", "d"]
    assert {row["other_item_id"]: row["reason"] for row in found if row["reason"]} == {
        "b": "duplicate pair, source and time with another grade",
        **dict.fromkeys("efg", "grade is not a number in [0,1]"),
        "a": "item_id and other_item_id are the same",
        "h": "item_id is null or empty",
        "i": "source is null or empty",
        "j": "rated_at is in the future",
    }


def test_times_in_epochs(spark: SparkSession) -> None:
    at = datetime(2024, 1, 2, 3, tzinfo=UTC)
    milliseconds = F.lit(int(at.timestamp()) * 1000)
    columns = ItemColumns(item_id="sku", title="name", event_timestamp="valid", created_timestamp="known")
    source = ItemSource(path="items", columns=columns, time_format="epoch_milliseconds")
    items = catalog(spark, {}).withColumns({"valid": milliseconds, "known": F.lit(None).cast("long")})
    seconds = [F.unix_seconds(name).alias(name) for name in ("event_timestamp", "created_timestamp")]
    (row,) = check_items(items, source=source).select("reason", *seconds).collect()
    assert row.asDict() == {"reason": None, "event_timestamp": int(at.timestamp()), "created_timestamp": int(at.timestamp())}
    labels = spark.range(1).select(
        F.lit("a").alias("item_id"), F.lit("b").alias("other_item_id"), F.lit(1.0).alias("grade"), F.lit("human").alias("source"),
        milliseconds.alias("rated_at"),
    )  # fmt: skip
    graded = RelevanceSource(path="labels", time_format="epoch_milliseconds")
    (row,) = check_pair_relevance(labels, source=graded, now=datetime(2024, 2, 1, tzinfo=UTC)).select("reason", "rated_at").collect()
    assert (row["reason"], row["rated_at"]) == (None, at.replace(tzinfo=None))


def annotations(spark: SparkSession, *rows: tuple[str, datetime, datetime, str]) -> DataFrame:
    """(item_id, event time, created time, title); a title of `-` is a deletion marker."""
    columns = "item_id string, event_timestamp timestamp, created_timestamp timestamp, title string, eligible boolean, deleted boolean"
    full = [(item, valid, known, None if title == "-" else title, title != "-", title == "-") for item, valid, known, title in rows]
    frame = spark.createDataFrame(full, columns)
    missing = {c.name: F.lit(None).cast(c.type) for c in ITEM_ANNOTATIONS.columns if c.name not in frame.columns}
    return frame.withColumns(missing).select(*ITEM_ANNOTATIONS.column_names)


def briefly(frame: DataFrame) -> list[tuple[str, int, int, str]]:
    def brief(row: Row) -> tuple[str, int, int, str]:
        title = "-" if row["deleted"] and not row["eligible"] else row["title"]
        return row["item_id"], row["event_timestamp"].toordinal(), row["created_timestamp"].toordinal(), title

    assert frame.columns == list(ITEM_ANNOTATIONS.column_names)
    return sorted(brief(row) for row in frame.collect())


def on(day: int) -> datetime:
    return datetime(2024, 3, day)


NEVER = datetime(1970, 1, 1)


@pytest.mark.parametrize(
    ("mode", "point_in_time", "existing", "incoming", "expected"),
    [
        pytest.param(
            "snapshot",
            False,
            [("stays", NEVER, "old"), ("goes", NEVER, "old"), ("gone", NEVER, "old"), ("gone", on(2), "-"), ("back", on(2), "-")],
            [("stays", NEVER, "new"), ("back", NEVER, "new"), ("fresh", NEVER, "new")],
            [
                *[("back", NEVER, "new"), ("fresh", NEVER, "new"), ("gone", NEVER, "old"), ("gone", on(2), "-")],
                *[("goes", NEVER, "old"), ("goes", on(9), "-"), ("stays", NEVER, "new")],
            ],
            id="snapshot without times: markers come and go",
        ),
        pytest.param(
            "snapshot",
            True,
            [("a", on(1), "one"), ("a", on(2), "two"), ("b", on(3), "-"), ("b", on(1), "one"), ("c", on(9), "same day")],
            [("a", on(2), "two again"), ("a", on(4), "four"), ("b", on(1), "one")],
            [("a", on(1), "one"), ("a", on(2), "two again"), ("a", on(4), "four"), ("b", on(1), "one"), ("c", on(9), "-")],
            id="snapshot with times: history stays, one row per key",
        ),
        pytest.param(
            "changes",
            True,
            [("a", on(1), "one"), ("b", on(1), "one"), ("c", on(2), "-")],
            [("a", on(1), "one again"), ("c", on(1), "one")],
            [("a", on(1), "one again"), ("b", on(1), "one"), ("c", on(1), "one")],
            id="changes: absent items are unchanged",
        ),
        pytest.param("snapshot", False, None, [("a", NEVER, "one")], [("a", NEVER, "one")], id="first night"),
    ],
)
def test_merging_a_night(
    spark: SparkSession,
    mode: str,
    point_in_time: bool,
    existing: list[tuple[str, datetime, str]] | None,
    incoming: list[tuple[str, datetime, str]],
    expected: list[tuple[str, datetime, str]],
) -> None:
    def frame(rows: list[tuple[str, datetime, str]]) -> DataFrame:
        return annotations(spark, *((item, time, time, title) for item, time, title in rows))

    before = None if existing is None else frame(existing)
    merged = merge_annotations(before, frame(incoming), mode=mode, run_date=date(2024, 3, 9), point_in_time=point_in_time)
    days = [(item, time.toordinal(), time.toordinal(), title) for item, time, title in expected]
    assert briefly(merged) == sorted(days)


def test_as_of_sees_what_holds_and_is_known(spark: SparkSession) -> None:
    table = annotations(
        spark,
        ("a", on(1), on(1), "first"),
        ("a", on(3), on(3), "second"),
        ("a", on(2), on(5), "late correction of an older time"),
        ("b", on(2), on(6), "known late"),
        ("c", on(1), on(1), "first"),
        ("c", on(3), on(3), "-"),
        ("d", on(9), on(1), "announced"),
    )
    known = {day: {row[0]: row[3] for row in briefly(annotations_as_of(table, run_date=date(2024, 3, day)))} for day in (2, 3, 6)}
    assert known == {
        2: {"a": "first", "c": "first"},
        3: {"a": "second", "c": "-"},
        6: {"a": "second", "b": "known late", "c": "-"},
    }
