"""Content vectors of small catalogs whose similarities are known by hand."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from pyspark.sql import SparkSession
from pyspark.sql.types import StructType

from conf.settings import FeatureSettings
from conf.tables import ITEM_ANNOTATIONS
from features.content import content_vectors, encode_content, fit_content

FIELDS = {"title": "string", "text": "string", "categories": "list", "tags": "list", "tag_weights": "floats", "attributes": "map"}
TYPES = {
    "string": pa.string(),
    "list": pa.list_(pa.string()),
    "floats": pa.list_(pa.float64()),
    "map": pa.map_(pa.string(), pa.string()),
}


def catalog(*rows: dict[str, Any]) -> pa.Table:
    columns = {
        name: pa.array([None if row.get(name) is None else _arrow(row[name]) for row in rows], TYPES[kind]) for name, kind in FIELDS.items()
    }
    return pa.table(columns)


def _arrow(value: Any) -> Any:
    return list(value.items()) if isinstance(value, dict) else value


def settings(**change: Any) -> FeatureSettings:
    return FeatureSettings(**({"content_dimensions": 8} | change))


def vectors_of(*rows: dict[str, Any], **change: Any) -> NDArray[np.float32]:
    items = catalog(*rows)
    return encode_content(items, fit_content(items, settings=settings(**change)))


def test_vectors_are_unit_and_say_what_items_share() -> None:
    rng = np.random.default_rng(0)
    topics = [[f"{kind}{n}" for n in range(12)] for kind in ("fruit", "tool", "toy")]
    rows = [{"title": " ".join(rng.choice(topics[item % 3], size=5, replace=False))} for item in range(90)]
    vectors = vectors_of(*rows, {"title": "…!"}, {}, content_dimensions=3)
    assert vectors.shape == (92, 3)
    assert vectors.dtype == np.float32
    assert np.linalg.norm(vectors[:90], axis=1) == pytest.approx(np.ones(90), abs=1e-5)
    assert not vectors[90:].any()  # no term at all
    cosine = vectors[:90] @ vectors[:90].T
    same = np.arange(90)[:, None] % 3 == np.arange(90) % 3
    assert cosine[same].min() > cosine[~same].max() + 0.5


def test_small_vocabularies_keep_exact_cosines() -> None:
    # two items, 4 terms in 8 dimensions. Both blocks count the same, and inside a block idf: shared 1, own ln(3/2) + 1
    own = np.log(1.5) + 1
    a, b = vectors_of({"title": "Red SHOES"}, {"text": "shoes, blue"})
    assert a @ b == pytest.approx(1 / (1 + own**2))
    one, other = {"title": "red", "categories": ["x"]}, {"title": "red", "categories": ["y"]}
    for title, label, wanted in ((1, 1, 0.5), (3, 1, 0.9), (0, 1, 0.0), (1, 0, 1.0)):
        a, b = vectors_of(one, other, title_weight=title, label_weight=label)
        assert a @ b == pytest.approx(wanted), (title, label)


def test_pairs_of_words_are_terms_once_two_items_share_them() -> None:
    rows = [{"title": title} for title in ("red shoes", "Red shoes!", "shoes red", "red hat", "blue shoes")]
    model = fit_content(catalog(*rows), settings=settings())
    assert {name for name in model.vocabulary if " " in name} == {"word:red shoes"}
    same, also, turned = encode_content(catalog(*rows[:3]), model)
    assert same @ also == pytest.approx(1)
    assert 0.5 < same @ turned < 0.9  # the same words, another phrase


def test_labels_are_terms() -> None:
    def cosine(a: dict[str, Any], b: dict[str, Any]) -> float:
        left, right = vectors_of(a, b)
        return float(left @ right)

    home = {"categories": ["home", "kitchen"]}
    assert cosine(home, {"categories": ["home", "garden"]}) > 0.2  # the prefix is shared
    assert cosine(home, {"categories": ["kitchen", "home"]}) == 0  # a path is not a bag
    assert cosine({"title": "home"}, {"tags": ["home"]}) == 0  # kinds of terms are apart
    assert cosine({"attributes": {"brand": "x"}}, {"attributes": {"maker": "x"}}) == 0
    assert cosine({"attributes": {"brand": "x"}}, {"attributes": {"brand": "x"}}) == pytest.approx(1)
    tags = {"tags": ["War", "sea"], "tag_weights": [10.0, 1.0]}
    assert cosine(tags, {"tags": ["war"]}) > 0.9 > 0.3 > cosine(tags, {"tags": ["sea"]}) > 0
    assert cosine({"title": "東京"}, {"title": "東京都"}) > 0.5  # no spaces between words


@pytest.mark.parametrize(
    ("rows", "max_terms", "wanted"),
    [
        ([{"title": "only item with quite a few more words than the vector has dimensions"}], 50, 1),  # one item
        ([{"title": "the very same text for all of them with over eight words"}] * 300, 50, 1),  # one direction
        ([{}, {}], 50, 0),  # no text anywhere
        ([], 50, 0),
        ([{"title": "common rare1"}, {"title": "common rare2"}] * 10 + [{"title": "unseen"}], 10, 1),
    ],
)
def test_degenerate_catalogs(rows: list[dict[str, Any]], max_terms: int, wanted: float) -> None:
    vectors = vectors_of(*rows, max_terms=max_terms)
    assert vectors.shape == (len(rows), 8)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.full(len(rows), wanted), abs=1e-5)
    if wanted and rows[0] == rows[-1]:
        assert np.unique(vectors, axis=0).shape[0] == 1


def test_a_row_depends_on_its_item_only() -> None:
    rng = np.random.default_rng(1)
    words = [f"w{n}" for n in range(60)]
    rows = [{"title": " ".join(rng.choice(words, size=6))} for _ in range(50)]
    model = fit_content(catalog(*rows), settings=settings())
    whole = encode_content(catalog(*rows), model)
    alone = np.vstack([encode_content(catalog(row), model) for row in rows])
    assert np.array_equal(whole, alone)  # so that equal texts have equal bits in whatever batch they come
    assert not encode_content(catalog({"title": "never heard of"}), model).any()


def annotation(item_id: str, **change: Any) -> dict[str, Any]:
    known = {name: None for name in ITEM_ANNOTATIONS.column_names if not name.endswith("_timestamp")}
    return known | {"item_id": item_id, "eligible": True, "deleted": False} | change


SCHEMA = ", ".join(f"{c.name} {c.type}" for c in ITEM_ANNOTATIONS.columns if not c.name.endswith("_timestamp"))


def spark_vectors(spark: SparkSession, rows: list[dict[str, Any]], **change: Any) -> dict[str, list[float]]:
    frame = spark.createDataFrame(rows, StructType.fromDDL(SCHEMA)).repartition(2)
    found = content_vectors(frame, settings=settings(**change))
    assert found.dtypes == [("item_id", "string"), ("content_vector", "array<float>")]
    return {row["item_id"]: row["content_vector"] for row in found.collect()}


def test_vectors_on_executors_and_a_judge_that_leaves_no_trace(spark: SparkSession) -> None:
    rng = np.random.default_rng(2)
    words = np.array([f"w{n}" for n in range(40)])
    rows = [
        annotation(f"i{n}", title=" ".join(rng.choice(words, 5)), categories=["a", f"b{n % 3}"])
        | {"tags": [f"t{n % 5}", "all"], "tag_weights": [1.0, n + 1.0]}
        for n in range(40)
    ]
    rows += [annotation("unknown") | {"eligible": None, "deleted": None}]
    found = spark_vectors(spark, rows, judge_fields=["tags", "embedding"])
    assert len(found) == 41
    assert {len(vector) for vector in found.values()} == {8}
    assert not any(found["unknown"])
    assert all(np.linalg.norm(vector) == pytest.approx(1, abs=1e-5) for item, vector in found.items() if item != "unknown")
    # the judge's columns permuted, and an embedding that would replace everything
    permuted = [
        row | {"tags": other["tags"], "tag_weights": other["tag_weights"], "embedding": [1.0, 0.0]}
        for row, other in zip(rows, rows[::-1], strict=True)
    ]
    assert spark_vectors(spark, permuted, judge_fields=["tags", "embedding"]) == found
    # a fit on fewer items is another fit, and still encodes all of them
    sampled = spark_vectors(spark, rows, judge_fields=["tags"], fit_max_items=10)
    assert sampled.keys() == found.keys()
    assert sampled != found


def test_own_embeddings_are_taken_at_unit_length(spark: SparkSession) -> None:
    own = {"a": [3.0, 4.0], "b": [0.0, -2.0], "none": None, "zero": [0.0, 0.0], "short": [1.0]}
    found = spark_vectors(spark, [annotation(item, title="ignored", embedding=vector) for item, vector in own.items()])
    assert found["a"] == pytest.approx([0.6, 0.8])
    assert found["b"] == pytest.approx([0.0, -1.0])
    assert [found[item] for item in ("none", "zero", "short")] == [[0.0, 0.0]] * 3
