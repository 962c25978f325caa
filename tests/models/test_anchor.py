"""How far a trained head is held back to content, on heads and content made by hand: 1,000 items in twenty groups."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from conf.settings import HeadSettings
from models.anchor import SHARES, choose_anchor
from models.checkpoint import load_checkpoint, save_checkpoint
from models.data import Examples, Floats, Ints, Sparse, TrainingData, sparse_rows
from models.factorization import factorize
from models.mtmh import Anchor
from models.scorer import HeadVectors
from models.start import build_model
from models.train import train
from models.workers import Workers
from tests.models.small_world import make_spec, no_examples
from tests.models.test_factorization import WEIGHTS

NUM_ITEMS, NUM_GROUPS = 1000, 20
GROUP = np.arange(NUM_ITEMS) % NUM_GROUPS
TRIGGERS = np.arange(0, NUM_ITEMS, 10, dtype=np.int32)
NO_EXAMPLES = no_examples()


def of_groups() -> Floats:
    """Unit rows that say which group an item is of."""
    return np.eye(NUM_GROUPS, dtype=np.float32)[GROUP]


def noise(seed: int = 0) -> Floats:
    """Unit rows that say nothing."""
    rows = np.random.default_rng(seed).standard_normal((NUM_ITEMS, NUM_GROUPS)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def head(learned: Floats, content: Floats) -> HeadVectors:
    """A head that has left content behind for what it has learned, the last dimension that of popularity."""
    rows = np.hstack([np.zeros_like(content), learned])
    return HeadVectors(
        trigger=np.hstack([rows, np.ones((len(rows), 1), np.float32)]), target=np.hstack([rows, np.zeros((len(rows), 1), np.float32)])
    )


def partners() -> Sparse:
    """All others of the group."""
    row, column = np.nonzero((GROUP[:, None] == GROUP) & ~np.eye(NUM_ITEMS, dtype=bool))
    return sparse_rows(row, column, np.ones(len(row)), (NUM_ITEMS, NUM_ITEMS))


def graded_by(rows: Floats) -> Examples:
    """Eight others a trigger, half of them of its group, graded by their cosine in some rows."""
    rng = np.random.default_rng(1)
    trigger = np.repeat(TRIGGERS, 8)
    own = (trigger + NUM_GROUPS * rng.integers(1, 40, len(trigger))) % NUM_ITEMS
    other = np.where(np.arange(len(trigger)) % 2, own, (own + rng.integers(1, 19, len(trigger))) % NUM_ITEMS).astype(np.int32)
    cosine = np.einsum("ev,ev->e", rows[trigger], rows[other])
    return Examples(trigger=trigger, other=other, target=((cosine + 1) / 2).astype(np.float32))


def spread(vectors: Floats, triggers: Ints) -> float:
    """Mean of the nearest hundred scores less that of the median item, by plain sorting."""
    scores = np.sort(vectors[triggers] @ vectors.T, axis=1)
    return float((scores[:, -100:].mean(axis=1) - scores[:, NUM_ITEMS // 2]).mean())


@pytest.mark.parametrize("examples", [NO_EXAMPLES, graded_by(of_groups())], ids=["no examples", "a teacher who agrees"])
def test_a_head_that_has_learned_noise_is_held_back_as_far_as_can_be(examples: Examples) -> None:
    anchor, trials = choose_anchor(head(noise(), of_groups()), of_groups(), partners(), TRIGGERS, examples)
    assert anchor.share == max(SHARES)
    for most in (0.0, 0.2):
        assert choose_anchor(head(noise(), of_groups()), of_groups(), partners(), TRIGGERS, examples, most=most)[0].share == most
    recall = [float(trials[share].recall.mean()) for share in SHARES]
    assert recall == sorted(recall)
    assert recall[0] < 0.15 < 0.9 < recall[-1]


def test_a_head_that_knows_better_is_left_alone() -> None:
    anchor, _ = choose_anchor(head(of_groups(), noise()), noise(), partners(), TRIGGERS, NO_EXAMPLES)
    assert anchor == Anchor(share=0.0, unit=1.0)


def test_a_teacher_who_grades_otherwise_objects() -> None:
    anchor, trials = choose_anchor(head(noise(), of_groups()), of_groups(), partners(), TRIGGERS, graded_by(noise()))
    assert anchor == Anchor()
    agreement = [float(trials[share].agreement.mean()) for share in SHARES]
    assert agreement[0] == pytest.approx(1.0)
    assert agreement[-1] < 0.98
    # equal grades cannot be ordered less well: such a teacher is not asked
    level = graded_by(np.ones((NUM_ITEMS, 1), np.float32))
    assert choose_anchor(head(noise(), of_groups()), of_groups(), partners(), TRIGGERS, level)[0].share == max(SHARES)


def test_a_later_night_moves_only_for_a_sure_gain() -> None:
    alike = (head(of_groups(), of_groups()), of_groups(), partners(), TRIGGERS, NO_EXAMPLES)
    assert choose_anchor(*alike)[0].share == 0.0
    assert choose_anchor(*alike, default=0.3, stay=2.0)[0].share == 0.3
    assert choose_anchor(*alike, default=0.3, stay=2.0, most=0.2)[0].share == 0.2, "the settings allow less since"
    better = (head(noise(), of_groups()), of_groups(), partners(), TRIGGERS, NO_EXAMPLES)
    assert choose_anchor(*better, default=0.1, stay=2.0)[0].share == max(SHARES)


def test_scores_spread_as_far_as_before() -> None:
    alike = noise() + 2 * noise(1)[0]  # a head to which all items look much the same
    free, content = head(alike / np.linalg.norm(alike, axis=1, keepdims=True), of_groups()), of_groups()
    anchor, _ = choose_anchor(free, content, partners(), TRIGGERS, NO_EXAMPLES)
    assert 0.3 < anchor.unit < 1
    held = anchor.applied(torch.from_numpy(free.target), torch.from_numpy(content)).numpy()
    assert spread(held, TRIGGERS) == pytest.approx(spread(free.target, TRIGGERS), rel=1e-3)
    assert spread(held / anchor.unit**0.5, TRIGGERS) > 1.01 * spread(free.target, TRIGGERS)


def test_without_content_there_is_nothing_to_be_held_back_to() -> None:
    nothing = np.zeros((NUM_ITEMS, 0), np.float32)
    anchor, trials = choose_anchor(head(noise(), nothing), nothing, partners(), TRIGGERS, NO_EXAMPLES)
    assert anchor == Anchor()
    assert {float(trial.recall.mean()) for trial in trials.values()} == {float(trials[0.0].recall.mean())}


def test_heads_of_cosines_are_anchored_and_the_checkpoint_knows(data: TrainingData, tmp_path: Path) -> None:
    model = build_model(factorize(data.full, data.content, weights=WEIGHTS, seed=0), data.content, make_spec(tmp_path).model, 0.3, seed=0)
    free = model.vectors()
    model.anchor = Anchor(share=0.4, unit=0.25)
    held = model.vectors()
    for side in (0, 1):
        torch.testing.assert_close(held["engagement"][side], free["engagement"][side], rtol=0, atol=0)
        before, after = free["relevance"][side], held["relevance"][side]
        described = torch.from_numpy(data.content.any(axis=1))
        moved = 0.6 * before[:, :-1]
        moved[:, : data.content.shape[1]] += 0.4 * torch.from_numpy(data.content)
        torch.testing.assert_close(after[described, :-1], 0.5 * torch.nn.functional.normalize(moved, dim=1)[described])
        torch.testing.assert_close(after[:, -1], before[:, -1], rtol=0, atol=0)
    version = save_checkpoint(tmp_path, model, vocabulary=data.vocabulary, run={})
    loaded, content = load_checkpoint(tmp_path, vocabulary=data.vocabulary)
    assert loaded.anchor == model.anchor
    torch.testing.assert_close(loaded.vectors()["relevance"][1], held["relevance"][1], rtol=0, atol=0)
    model.anchor = Anchor()
    assert save_checkpoint(tmp_path / "free", model, vocabulary=data.vocabulary, run={}) != version
    assert content["config"]["anchor"] == {"share": 0.4, "unit": 0.25}


def test_a_training_says_its_anchor_and_leaves_heads_of_likelihood_alone(data: TrainingData, tmp_path: Path) -> None:
    spec = make_spec(tmp_path / "cosines")
    metrics = train(data, spec, Workers())
    assert metrics["anchored_share"] in SHARES
    model, _ = load_checkpoint(tmp_path / "cosines" / "checkpoint", vocabulary=data.vocabulary)
    assert model.anchor == Anchor(share=metrics["anchored_share"], unit=metrics["anchored_unit"])
    note = f"relevance head held back to content by {model.anchor.share:g}: holdout recall@100"
    assert any(said.startswith(note) for said in json.loads((tmp_path / "cosines" / "notes.json").read_text()))
    heads = dict.fromkeys(spec.model.heads, HeadSettings(engagement=1.0))
    alike = dataclasses.replace(spec, folder=str(tmp_path / "alike"), model=spec.model.model_copy(update={"heads": heads}))
    metrics = train(data, alike, Workers())
    assert (metrics["anchored_share"], metrics["anchored_unit"]) == (0.0, 1.0)
