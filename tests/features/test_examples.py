"""Relevance examples: which pairs, and grades worked out by hand."""

from datetime import UTC, date, datetime
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from pyspark.sql import SparkSession
from pyspark.sql.types import StructType

from conf.errors import TableError
from conf.settings import FeatureSettings
from conf.tables import CO_ENGAGEMENT_PAIRS, ITEM_FEATURES, PAIR_RELEVANCE, RELEVANCE_EXAMPLES
from features.examples import Catalog, group_content, make_taxonomy, mine_examples, nearest_in_content, taxonomy_grades, teacher_grades

RUN_DATE = date(2026, 3, 10)
Example = tuple[float, str, str]


def pairs_of(*pairs: tuple[int, int]) -> tuple[Any, Any]:
    array = np.array(pairs, dtype=np.int64)
    return array[:, 0], array[:, 1]


def test_category_grade_is_the_idf_share_of_the_common_path() -> None:
    paths = [["food", "bread"], ["Food", "bread"], ["food", "milk"], ["food"], ["toys"], None, []]
    nothing = [None] * len(paths)
    # 5 items have categories: food in 4, food>bread in 2, the rest in 1
    food, bread, milk = np.log(5 / 4), np.log(5 / 2), np.log(5)
    i, j = pairs_of((0, 1), (0, 2), (2, 0), (0, 3), (0, 4), (0, 5), (0, 6))
    wanted = [1, food / (food + milk), food / (food + milk), food / (food + bread), 0, np.nan, np.nan]
    assert taxonomy_grades(make_taxonomy(paths, nothing, nothing), i, j) == pytest.approx(wanted, nan_ok=True)


def test_tag_grade_is_the_idf_cosine_and_the_mean_with_categories() -> None:
    tags = [["War", "sea"], ["war"], ["sea"], ["love"], None]
    weights = [[3.0, 4.0], [2.0], None, [1.0], None]
    nothing = [None] * len(tags)
    i, j = pairs_of((0, 1), (0, 2), (1, 3), (0, 4))
    tags_only = taxonomy_grades(make_taxonomy(nothing, tags, weights), i, j)  # war and sea have the same idf
    assert tags_only == pytest.approx([0.6, 0.8, 0, np.nan], nan_ok=True)
    paths = [["a"], ["a"], ["b"], None, ["a"]]
    both = taxonomy_grades(make_taxonomy(paths, tags, weights), i, j)
    assert both == pytest.approx([(1 + 0.6) / 2, (0 + 0.8) / 2, 0, 1], nan_ok=True)  # the last two by one of them alone


def test_what_all_items_share_grades_nothing() -> None:
    i, j = pairs_of((0, 1))
    everywhere = make_taxonomy([["all"], ["all"]], [["tag"], ["tag"]], [None, None])
    assert np.isnan(taxonomy_grades(everywhere, i, j)).all()
    assert np.isnan(taxonomy_grades(make_taxonomy([None] * 2, [None] * 2, [None] * 2), i, j)).all()


def test_teacher_grade() -> None:
    vectors = np.array([[1, 0], [0.6, 0.8], [-1, 0], [0, 0]], dtype=np.float32)
    i, j = pairs_of((0, 1), (0, 2), (0, 3), (3, 3))
    assert teacher_grades(vectors, i, j) == pytest.approx([0.6, 0, np.nan, np.nan], nan_ok=True)


def catalog_of(vectors: Any, offered: Any = None) -> Catalog:
    n = len(vectors)
    names = np.array([f"i{k:03d}" for k in range(n)], dtype=object)
    nothing = [None] * n
    shown = np.ones(n, dtype=bool) if offered is None else offered
    return Catalog(item_ids=names, vectors=vectors, offered=shown, taxonomy=make_taxonomy(nothing, nothing, nothing))


def test_search_is_exact_and_skips_self_and_items_not_offered() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(200, 6)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[50:80] = vectors[:30]  # texts repeat
    vectors[90] = 0
    offered = np.arange(200) != 91
    groups = group_content(catalog_of(vectors, offered))
    assert len(groups.vectors) == 200 - 30 - 2
    i, j = nearest_in_content(groups, np.arange(len(groups.vectors)), 7)
    scores = vectors.astype(np.float64) @ vectors.T.astype(np.float64)
    np.fill_diagonal(scores, -np.inf)
    scores[:, [90, 91]] = -np.inf
    assert not {90, 91} & {*i.tolist(), *j.tolist()}
    for item in range(200):
        found = j[i == item]
        if item not in (90, 91):
            assert len(set(found.tolist())) == 7
            assert scores[item, found] == pytest.approx(np.sort(scores[item])[::-1][:7], abs=1e-5), item
    # however the queries are split, the answer is the same
    parts = [nearest_in_content(groups, part, 7) for part in np.array_split(np.arange(len(groups.vectors)), 3)]
    assert {*zip(i, j, strict=True)} == {pair for part in parts for pair in zip(*part, strict=True)}


def test_equal_items_point_at_each_other_in_a_circle() -> None:
    vectors = np.tile(np.array([[1.0, 0.0]], dtype=np.float32), (10, 1))
    vectors[9] = [0.0, 1.0]
    i, j = nearest_in_content(group_content(catalog_of(vectors)), np.array([0, 1]), 3)
    assert j[i == 7].tolist() == [8, 0, 1]
    counts = np.bincount(j, minlength=10)
    assert counts[:9].max() - counts[:9].min() <= 1  # each of nine is offered to three, and once or not to the one apart
    few, _ = nearest_in_content(group_content(catalog_of(vectors[:2])), np.array([0]), 5)
    assert few.tolist() == [0, 1]  # fewer items than asked for
    nothing = group_content(catalog_of(np.zeros((3, 2), dtype=np.float32)))
    assert [len(found) for found in nearest_in_content(nothing, np.zeros(0, dtype=np.int64), 5)] == [0, 0]


def feature(position: int, item_id: str, vector: list[float], **change: Any) -> dict[str, Any]:
    valid: dict[str, Any] = {"item_id": item_id, "item_index": position, "content_vector": vector, "in_catalog": True, "eligible": True}
    counts = {"age_days": 0, "num_user_days": 0, "as_of": RUN_DATE}
    return dict.fromkeys(ITEM_FEATURES.column_names) | valid | counts | change


def co_engaged(trigger: str, target: str, weight: float) -> dict[str, Any]:
    zeros = {c.name: 0.0 for c in CO_ENGAGEMENT_PAIRS.columns if c.type == "double"}
    days = {c.name: RUN_DATE for c in CO_ENGAGEMENT_PAIRS.columns if c.type == "date"}
    return zeros | days | {"trigger_item_id": trigger, "target_item_id": target, "num_user_days": 2, "weight": weight}


def label(item: str, other: str, source: str, day: int, grade: float) -> dict[str, Any]:
    rated = datetime(2026, 3, day, 23, 59, tzinfo=UTC)
    return {"item_id": item, "other_item_id": other, "source": source, "rated_at": rated, "grade": grade, "source_version": None}


def mined(
    spark: SparkSession, items: list[dict[str, Any]], pairs: list[Any], labels: list[Any], **change: Any
) -> dict[tuple[str, str], Example]:
    frames = [
        spark.createDataFrame(rows, StructType.fromDDL(table.ddl))
        for rows, table in ((items, ITEM_FEATURES), (pairs, CO_ENGAGEMENT_PAIRS), (labels, PAIR_RELEVANCE))
    ]
    settings = FeatureSettings(**({"num_content_examples": 1, "num_co_engaged_examples": 2} | change))
    examples = mine_examples(*frames, settings=settings, run_date=RUN_DATE)
    assert examples.dtypes == [(c.name, c.type) for c in RELEVANCE_EXAMPLES.columns]
    rows = examples.collect()
    found = {(row["item_id"], row["other_item_id"]): (row["target"], row["source"], row["mined_by"]) for row in rows}
    assert len(found) == len(rows), "a pair comes twice"
    assert {row["as_of"] for row in rows} <= {RUN_DATE}
    return found


def test_pairs_are_graded_by_the_most_trusted_source(spark: SparkSession) -> None:
    items = [
        feature(0, "a", [1.0, 0.0], categories=["x"], tags=["q"], tag_weights=[1.0]),
        feature(1, "b", [0.8, 0.6], categories=["x"]),
        feature(2, "c", [0.6, 0.8], categories=["y"]),
        feature(3, "d", [0.0, 1.0]),
        feature(4, "gone", [0.0, 0.0], in_catalog=False, eligible=False),
    ]
    pairs = [
        co_engaged("a", "d", 5.0),
        co_engaged("a", "gone", 4.0),  # nothing is known of it
        co_engaged("a", "c", 3.0),  # third of two, but labelled below
        co_engaged("b", "a", 1.0),  # near in content already
        co_engaged("b", "c", 1.0),
        co_engaged("b", "d", 1.0),  # ties with the two before it and comes last by id
    ]
    labels = [
        label("a", "c", "human", 1, 0.1),
        label("a", "c", "human", 9, 0.9),  # the latest of the people
        label("a", "c", "llm", 10, 0.5),
        label("a", "c", "human", 11, 0.0),  # after the run date
        label("c", "d", "survey", 10, 0.3),
        label("c", "d", "LLM", 2, 0.7),  # more trusted, though older
        label("d", "a", "survey", 3, 0.4),
        label("d", "gone", "human", 3, 1.0),  # a label needs no content
        label("a", "nobody", "human", 3, 1.0),
        label("a", "a", "human", 3, 1.0),
    ]
    found = mined(spark, items, pairs, labels)
    assert {pair: (pytest.approx(target, abs=1e-6), *rest) for pair, (target, *rest) in found.items()} == {
        ("a", "b"): (1.0, "taxonomy", "content"),
        ("a", "c"): (0.9, "human", "label"),
        ("a", "d"): (0.0, "teacher", "co_engaged"),  # engaged together and unlike
        ("b", "c"): (0.0, "taxonomy", "content"),  # cosine .96, yet other categories
        ("b", "a"): (1.0, "taxonomy", "co_engaged"),
        ("c", "b"): (0.0, "taxonomy", "content"),
        ("c", "d"): (0.7, "llm", "label"),
        ("d", "c"): (0.8, "teacher", "content"),
        ("d", "a"): (0.4, "survey", "label"),
        ("d", "gone"): (1.0, "human", "label"),
    }


def test_the_judge_does_not_grade(spark: SparkSession) -> None:
    known = [("a", [1.0, 0.0], "x", "p"), ("b", [0.6, 0.8], "x", "q"), ("c", [0.0, 1.0], "y", "q")]
    items = [
        feature(n, item, vector, categories=[section], tags=[tag], tag_weights=[1.0])
        for n, (item, vector, section, tag) in enumerate(known)
    ]
    by_teacher = mined(spark, items, [], [], judge_fields=["categories", "tags"])
    permuted = [row | {"categories": other["categories"], "tags": other["tags"]} for row, other in pairwise([*items, items[0]])]
    assert mined(spark, permuted, [], [], judge_fields=["categories", "tags"]) == by_teacher
    assert {source for _, source, _ in by_teacher.values()} == {"teacher"}
    assert {source for _, source, _ in mined(spark, items, [], [], judge_fields=["categories"]).values()} == {"taxonomy"}


def test_index_gaps_are_refused(spark: SparkSession) -> None:
    with pytest.raises(TableError, match=r"2 rows whose item_index is not 0\.\.1"):
        mined(spark, [feature(0, "a", [1.0]), feature(2, "b", [1.0])], [], [])
