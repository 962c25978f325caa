"""Consecutive nights: with a hundredth more baskets, lists hardly change when a night starts from the one before, at no loss of recall."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from conf.settings import RetrievalSettings
from models.checkpoint import load_checkpoint
from models.data import TrainingData
from models.metrics import churn_at_k
from models.scorer import Scorer, Widths
from models.train import train
from models.workers import Workers
from tests.models.small_world import SmallWorld, make_spec, source_of
from tests.models.test_factorization import WEIGHTS

TONIGHT = SmallWorld(num_bundles=40, num_users=300, num_stray=2)
LAST_NIGHT = replace(TONIGHT, num_missing=18)  # of 1,800 baskets
K = 20


@dataclass(frozen=True)
class Trained:
    """(N, K) lists by p(j given i), and what the calibration reached."""

    lists: np.ndarray
    recall: float
    notes: list[str]


def night(data: TrainingData, folder: Path, previous: Path | None = None, seed: int = 17) -> Trained:
    """Train, and list every item's best K."""
    spec = replace(make_spec(folder, num_validation_triggers=200, num_steps=30, seed=seed), previous=previous and str(previous))
    metrics = train(data, spec, Workers())
    model, _ = load_checkpoint(folder / "checkpoint", vocabulary=data.vocabulary)
    source = source_of(data, model, min_users=2)
    everyone = np.arange(data.num_items, dtype=np.int32)
    candidates = source.propose(everyone, data.holdout * 0, widths=Widths.of(RetrievalSettings()))
    scores = np.full((data.num_items, data.num_items), -np.inf, np.float32)
    scores[candidates.segment, candidates.target] = Scorer.load(folder / "scorer.json").logits(candidates.features)
    lists = np.argsort(-scores, axis=1, kind="stable")[:, :K].astype(np.int32)
    return Trained(lists, metrics["holdout_recall_at_100"], json.loads((folder / "notes.json").read_text()))


def churn(before: Trained, after: Trained) -> float:
    return float(np.nanmean(churn_at_k(before.lists, after.lists, k=K)))


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    folder = tmp_path_factory.mktemp("nights")
    last, tonight = (world.load(folder / name) for name, world in (("a", LAST_NIGHT), ("b", TONIGHT)))
    trained = {"last": night(last, folder / "last")}
    trained["warm"] = night(tonight, folder / "warm", folder / "last")
    trained["cold"] = night(tonight, folder / "cold", seed=18)
    return trained


def test_a_warm_night_changes_little(nights: dict[str, Trained]) -> None:
    warm, cold = (churn(nights["last"], nights[name]) for name in ("warm", "cold"))
    assert warm < 0.15
    assert warm < cold / 2
    assert nights["warm"].recall > 0.98 * nights["cold"].recall
    assert nights["warm"].notes[0].startswith("starts from the weights and the scorer of")
    assert nights["cold"].notes[0] == "starts cold"


def test_a_model_that_cannot_be_read_is_said_and_left_alone(data: TrainingData, tmp_path: Path) -> None:
    found = {}
    for name, content in (("none", None), ("old", '{"features": ["clicks"]}'), ("broken", "{")):
        folder = tmp_path / name / "model"
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps({**vars(WEIGHTS), "content_share": 0.5}))
        if content is not None:
            (folder / "scorer.json").write_text(content)
        spec = replace(make_spec(tmp_path / f"out-{name}", num_steps=0), previous=str(folder))
        train(data, spec, Workers())
        found[name] = json.loads((tmp_path / f"out-{name}" / "notes.json").read_text())[0]
    assert all(said.startswith("starts cold: the model in") for said in found.values()), found
