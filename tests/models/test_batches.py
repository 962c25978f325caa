"""What a sampled batch holds, and with which probability."""

from pathlib import Path

import numpy as np
import pytest

from models.batches import Batches
from models.data import TrainingData
from models.factorization import CoEngagement, log_popularity
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


def shifted(data: TrainingData, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(N,) log prior by which a third of the items is worth four times its counts, and (N, N) counts as they would then be."""
    shift = np.where(np.random.default_rng(seed).random(data.num_items) < 1 / 3, 4.0, 1.0).astype(np.float32)
    matrix = CoEngagement(pairs=data.full.pairs, user_items=data.full.user_items, user_level_weight=0.5)
    return log_popularity(data.full.popularity) + np.log(shift), matrix.rows(np.arange(data.num_items, dtype=np.int32)) * shift


def test_counts_are_taught_as_they_would_be_under_the_popularity_that_scores_start_from(data: TrainingData, tmp_path: Path) -> None:
    log_prior, wanted = shifted(data, 1)
    batches = make_batches(data, make_spec(tmp_path), Workers(), user_level_weight=0.5, log_prior=log_prior)
    plain = make_batches(data, make_spec(tmp_path), Workers(), user_level_weight=0.5)
    same = make_batches(data, make_spec(tmp_path), Workers(), user_level_weight=0.5, log_prior=log_popularity(data.full.popularity))
    batch, as_counted = batches.batch(0), plain.batch(0).positives["engagement"].mass
    mass = batch.positives["engagement"].mass
    np.testing.assert_allclose(mass, wanted[batch.triggers], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(same.batch(0).positives["engagement"].mass, as_counted)
    without = [m / np.exp(p) for m, p in ((mass, log_prior), (as_counted, log_popularity(data.full.popularity)))]
    np.testing.assert_allclose(*without, rtol=1e-4)  # affinity, which divides by popularity, is taught the same


def test_drawn_partners_weigh_what_a_shifted_row_wants_of_them(data: TrainingData, tmp_path: Path) -> None:
    log_prior, rows = shifted(data, 2)
    spec = make_spec(tmp_path, **SAMPLED)
    batches = make_batches(data, spec, Workers(), user_level_weight=0.5, log_prior=log_prior)
    found, steps = np.zeros_like(rows), 4_000
    for step in range(steps):
        batch = batches.batch(step)
        positives = batch.positives["engagement"]
        some = positives.valid
        np.add.at(found, (batch.triggers[some][:, None], positives.partners[some]), positives.weight[some])
    often = found.sum(axis=1) > 500
    assert often.sum() > 20
    wanted, share = (part[often] / part[often].sum(axis=1, keepdims=True) for part in (rows, found))
    assert np.abs(wanted - share).sum(axis=1).mean() < 0.15
    as_counted = rows / np.exp(log_prior - log_popularity(data.full.popularity))
    assert np.abs(as_counted[often] / as_counted[often].sum(axis=1, keepdims=True) - share).sum(axis=1).mean() > 0.3
