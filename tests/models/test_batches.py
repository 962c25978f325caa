"""What a sampled batch holds, and with which probability."""

from pathlib import Path

import numpy as np
import pytest

from models.batches import Batches
from models.data import TrainingData
from models.fine_tuning import make_batches
from models.workers import Workers
from tests.models.small_world import make_spec

SAMPLED = {"full_softmax_max_items": 10, "num_sampled_items": 12, "batch_size": 6, "in_batch_negatives": True}


@pytest.fixture
def batches(data: TrainingData, tmp_path: Path) -> Batches:
    return make_batches(data, make_spec(tmp_path, **SAMPLED), Workers(), user_level_weight=0.5)


def test_partners_of_the_batch_are_candidates_of_all_its_triggers(batches: Batches) -> None:
    for step in range(5):
        batch = batches.batch(step)
        (positives,) = batch.positives.values()
        assert len(np.unique(batch.candidates)) == len(batch.candidates) > 12
        assert (batch.candidates[positives.position] == positives.partners).all()
        assert set(batch.candidates) <= set(batch.items)


def test_items_are_candidates_as_often_as_is_said(batches: Batches) -> None:
    """So that the sum over candidates of anything, each over its probability, is the sum over the catalog in the mean."""
    steps, often, said = 3_000, np.zeros(batches.num_items), np.zeros(batches.num_items)
    for step in range(steps):
        batch = batches.batch(step)
        often[batch.candidates] += 1 / steps
        said[batch.candidates] = np.exp(batch.log_inclusion)
    assert (said[batches.by_popularity[: batches.num_popular]] == 1).all()
    assert (often < said + 0.03).all()
    assert (often > 0.8 * said).all(), "a trigger here has a dozen partners, and may draw one of them twice"
    np.testing.assert_allclose(often.sum(), said.sum(), rtol=0.1)
    assert said[batches.by_popularity[batches.num_popular :]].std() > 0.01, "those that are drawn as partners are likelier"
