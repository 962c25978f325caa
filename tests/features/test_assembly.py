"""Which items item_features holds, how they are numbered, and what is known of each."""

from datetime import UTC, date, datetime
from typing import Any

from pyspark.sql import Row, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import StructType

from conf.settings import FeatureSettings
from conf.tables import ITEM_ANNOTATIONS, ITEM_FEATURES, ITEM_POPULARITY
from features.assembly import assemble_features
from features.content import content_vectors

RUN_DATE = date(2026, 3, 10)
SETTINGS = FeatureSettings(content_dimensions=4)
NAMES = [name for name in ITEM_ANNOTATIONS.column_names if not name.endswith("_timestamp")]
KNOWN = (
    ", ".join(f"{c.name} {c.type}" for c in ITEM_ANNOTATIONS.columns if not c.name.endswith("_timestamp"))
    + ", first_event_timestamp timestamp"
)


def known(item_id: str, **change: Any) -> dict[str, Any]:
    valid = dict.fromkeys([*NAMES, "first_event_timestamp"]) | {"item_id": item_id, "title": item_id, "eligible": True, "deleted": False}
    return valid | change


def popular(item_id: str, first: date = RUN_DATE, user_days: int = 3) -> dict[str, Any]:
    zeros = {"weight": 1.0, "fit_weight": 0.0, "num_users": 2, "num_user_days": user_days}
    days = {"landmark_date": first, "holdout_from": RUN_DATE, "first_engaged_date": first, "last_engaged_date": RUN_DATE, "as_of": RUN_DATE}
    return zeros | days | {"item_id": item_id}


def assembled(spark: SparkSession, rows: list[dict[str, Any]], counts: list[dict[str, Any]], **options: Any) -> dict[str, Row]:
    annotations = spark.createDataFrame(rows, KNOWN)
    vectors = content_vectors(annotations.withColumn("embedding", F.array(F.lit(3.0), F.lit(4.0)).cast("array<float>")), settings=SETTINGS)
    popularity = spark.createDataFrame(counts, StructType.fromDDL(ITEM_POPULARITY.ddl))
    features = assemble_features(annotations, vectors, popularity, run_date=RUN_DATE, **options)
    assert features.dtypes == [(c.name, c.type) for c in ITEM_FEATURES.columns]
    found = {row["item_id"]: row for row in features.collect()}
    assert features.count() == len(found)
    return found


def test_catalog_and_engaged_items_are_numbered_in_order_of_id(spark: SparkSession) -> None:
    first = datetime(2026, 3, 1, 12, tzinfo=UTC)
    rows = [
        known("b", categories=["x"], first_event_timestamp=first),  # in the catalog, never engaged
        known("a", first_event_timestamp=first),  # engaged before it was annotated
        known("Z", eligible=False),  # upper case sorts first; a catalog without times, engaged today
        known("gone", deleted=True, eligible=False),  # left the catalog, engaged before
        known("gone and never engaged", deleted=True, eligible=False),
        known("future") | {"title": None, "eligible": None, "deleted": None},  # not known yet, never engaged
        known("unlisted") | {"title": None, "eligible": None, "deleted": None},  # engaged only
    ]
    counts = [popular("a", date(2026, 2, 28), 7), popular("Z"), popular("gone"), popular("unlisted"), popular("ä")]
    found = assembled(spark, rows, counts)
    assert [row["item_id"] for row in sorted(found.values(), key=lambda row: row["item_index"])] == ["Z", "a", "b", "gone", "unlisted", "ä"]
    assert [found[i]["item_index"] for i in ("Z", "ä")] == [0, 5]
    assert {i: (row["in_catalog"], row["eligible"]) for i, row in found.items()} == {
        "Z": (True, False),
        "a": (True, True),
        "b": (True, True),
        "gone": (False, False),
        "unlisted": (False, False),
        "ä": (False, False),
    }
    assert {i: row["age_days"] for i, row in found.items()} == {"Z": 0, "a": 10, "b": 9, "gone": 0, "unlisted": 0, "ä": 0}
    assert {i: row["num_user_days"] for i, row in found.items()} == {"Z": 3, "a": 7, "b": 0, "gone": 3, "unlisted": 3, "ä": 3}
    assert [any(found[i]["content_vector"]) for i in ("a", "b", "Z", "gone", "unlisted", "ä")] == [True, True, True, False, False, False]
    assert {len(row["content_vector"]) for row in found.values()} == {2}
    assert found["b"]["categories"] == ["x"]


def test_the_judges_fields_are_withheld(spark: SparkSession) -> None:
    row = known("a", categories=["x"], tags=["t"], tag_weights=[1.0], attributes={"k": "v"})
    found = assembled(spark, [row], [], judge_fields=["tags", "title", "embedding"])["a"]
    assert (found["title"], found["tags"], found["tag_weights"]) == (None, None, None)
    assert (found["categories"], found["attributes"], found["in_catalog"]) == (["x"], {"k": "v"}, True)


def test_category_levels_behind_a_given_one_are_withheld(spark: SparkSession) -> None:
    rows = [known("a", categories=["x", "y", "z"]), known("b", categories=["x"])]
    found = assembled(spark, rows, [], judge_fields=["categories[2:]"])
    assert {i: row["categories"] for i, row in found.items()} == {"a": ["x", "y"], "b": ["x"]}
    assert assembled(spark, rows, [], judge_fields=["categories[2:]", "categories"])["a"]["categories"] is None


def test_a_catalog_without_items_leaves_engaged_items_numbered(spark: SparkSession) -> None:
    found = assembled(spark, [], [popular("b"), popular("a")])
    assert {i: (row["item_index"], row["content_vector"]) for i, row in found.items()} == {"a": (0, [0.0] * 4), "b": (1, [0.0] * 4)}
