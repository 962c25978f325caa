"""A checkpoint is weights and JSON; it refuses what it was not made for."""

import json
from pathlib import Path

import pytest
import torch

from conf.errors import TrainingError
from models.checkpoint import load_checkpoint, save_checkpoint
from models.data import TrainingData
from models.factorization import factorize
from models.mtmh import Mtmh
from models.start import build_model
from tests.models.small_world import make_spec
from tests.models.test_factorization import WEIGHTS


@pytest.fixture
def model(data: TrainingData, tmp_path: Path) -> Mtmh:
    return build_model(factorize(data.full, data.content, weights=WEIGHTS, seed=0), data.content, make_spec(tmp_path).model, 0.3, seed=0)


def test_round_trip_and_version(model: Mtmh, data: TrainingData, tmp_path: Path) -> None:
    version = save_checkpoint(tmp_path / "a", model, vocabulary=data.vocabulary, run={"note": 1})
    loaded, content = load_checkpoint(tmp_path / "a", vocabulary=data.vocabulary)
    assert content["model_version"] == version
    assert content["run"] == {"note": 1}
    for name, (trigger, target) in model.vectors().items():
        torch.testing.assert_close(loaded.vectors()[name][0], trigger, rtol=0, atol=0)
        torch.testing.assert_close(loaded.vectors()[name][1], target, rtol=0, atol=0)
    assert save_checkpoint(tmp_path / "b", loaded, vocabulary=data.vocabulary, run={"note": 2}) == version
    with torch.no_grad():
        loaded.encoders["shared"].ids.weight[0, 0] += 1e-3
    assert save_checkpoint(tmp_path / "b", loaded, vocabulary=data.vocabulary, run={}) != version


def test_other_items_or_other_weights_are_refused(model: Mtmh, data: TrainingData, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, model, vocabulary=data.vocabulary, run={})
    with pytest.raises(TrainingError, match="item_features has changed"):
        load_checkpoint(tmp_path, vocabulary="0" * 64)
    content = json.loads((tmp_path / "model.json").read_text())
    content["config"]["hidden_dimension"] += 1
    (tmp_path / "model.json").write_text(json.dumps(content))
    with pytest.raises(TrainingError, match="do not fit"):
        load_checkpoint(tmp_path, vocabulary=data.vocabulary)
