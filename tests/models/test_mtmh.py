"""What the encoder is at its start, and what stays true however it is trained."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models.checkpoint import load_checkpoint, save_checkpoint
from models.data import TrainingData
from models.factorization import Factorization, factorize
from models.fine_tuning import backward, fine_tune, make_batches
from models.mtmh import Mtmh
from models.resume import Optimization
from models.start import build_model
from models.workers import Workers
from tests.models.small_world import make_spec
from tests.models.test_factorization import WEIGHTS


@pytest.fixture(scope="module", params=[0.0, 7.0])
def start(data: TrainingData, request: pytest.FixtureRequest) -> Factorization:
    """With popularity that decays as the pairs do, and faster."""
    return factorize(data.full, data.content, weights=replace(WEIGHTS, popularity_half_life_days=request.param), seed=0)


@pytest.fixture
def model(start: Factorization, data: TrainingData) -> Mtmh:
    return build_model(start, data.content, make_spec(folder=None).model, 0.3, seed=0)  # type: ignore[arg-type]  # nothing is written


def test_scores_at_the_start_are_the_calibrated_factorization(model: Mtmh, start: Factorization, data: TrainingData) -> None:
    vectors = {name: (a.numpy(), b.numpy()) for name, (a, b) in model.vectors().items()}
    trigger, target = vectors["engagement"]
    known = np.flatnonzero(start.known)
    np.testing.assert_allclose(trigger @ target.T, start.scores(np.arange(data.num_items, dtype=np.int32)), atol=1e-4)
    trigger, target = vectors["relevance"]
    both = np.hstack([0.3**0.5 * data.content, 0.7**0.5 * start.trigger])[known]
    both /= np.linalg.norm(both, axis=1, keepdims=True)
    np.testing.assert_allclose((trigger @ target.T)[np.ix_(known, known)], both @ both.T, atol=1e-4)
    empty = data.num_items - 2
    assert not target[empty].any()  # neither content nor history: the zero vector


def test_popularity_never_enters_a_head_without_engagement(model: Mtmh, data: TrainingData, tmp_path) -> None:
    spec = make_spec(tmp_path)
    fine_tune(model, data, spec, Workers(), user_level_weight=0.5)
    trigger, target = model.vectors()["relevance"]
    assert not target[:, -1].any()
    assert (trigger[:, -1] == 1).all()
    norms = target[:, :-1].norm(dim=1)
    assert torch.all((norms - 1).abs().lt(1e-4) | norms.lt(1e-4))
    assert model.vectors()["engagement"][1][:, -1].unique().numel() > 5  # while the other head's bias differs by item


def test_a_bounded_table_holds_what_is_engaged_with_most_and_the_rest_lives_on_content(
    start: Factorization, data: TrainingData, tmp_path: Path
) -> None:
    """At the start, an item without a row is what it would be if its id were hidden; and no table at all is one, too."""
    spec = make_spec(tmp_path)
    bounded = build_model(start, data.content, spec.model.model_copy(update={"max_id_rows": 5}), 0.3, seed=0)
    unbounded = build_model(start, data.content, spec.model, 0.3, seed=0)
    assert len(bounded.encoders["shared"].ids.weight) == bounded.num_id_rows == 5
    assert unbounded.num_id_rows == start.known.sum() < data.num_items  # an item without history has none, ever
    with_row = (bounded.id_row >= 0).numpy()
    assert start.log_popularity[with_row].min() >= start.log_popularity[start.known & ~with_row].max()
    items = torch.arange(data.num_items)
    hidden = unbounded(items, torch.from_numpy(~with_row))
    for name, vectors in bounded.vectors().items():
        torch.testing.assert_close(vectors, hidden[name])
    fine_tune(bounded, data, spec, Workers(), user_level_weight=0.5)
    save_checkpoint(tmp_path / "bounded", bounded, vocabulary="v", run={})
    for name, vectors in load_checkpoint(tmp_path / "bounded", vocabulary="v")[0].vectors().items():
        torch.testing.assert_close(vectors, bounded.vectors()[name])
    none = build_model(start, data.content, spec.model.model_copy(update={"max_id_rows": 0}), 0.3, seed=0)
    fine_tune(none, data, spec, Workers(), user_level_weight=0.5)
    assert all(torch.isfinite(vectors).all() for pair in none.vectors().values() for vectors in pair)


def test_one_step_gives_every_parameter_a_gradient(model: Mtmh, data: TrainingData, tmp_path) -> None:
    with torch.no_grad():
        model.encoders["shared"].outer.weight.normal_(std=0.01)  # at exactly zero it keeps the first layer's gradient at zero for one step
    batch = make_batches(data, make_spec(tmp_path), Workers(), user_level_weight=0.5).batch(0)
    backward(model, batch, Workers(), affinity_weight=1.0, compare=False)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        gradient = parameter.grad.to_dense()
        assert torch.isfinite(gradient).all(), name
        assert gradient.abs().sum() > 0, name


def test_a_step_moves_the_id_rows_that_it_names_and_no_other(model: Mtmh, data: TrainingData, tmp_path) -> None:
    """As Adam would; and others stay where they are, whatever moved them before."""
    batches = make_batches(
        data, make_spec(tmp_path, full_softmax_max_items=10, num_sampled_items=12, batch_size=4), Workers(), user_level_weight=0.5
    )
    work, table = Optimization(model, learning_rate=1e-2, num_steps=10), model.encoders["shared"].ids.weight
    for step in range(4):
        before, batch = table.detach().clone(), batches.batch(step)
        work.clear()
        backward(model, batch, Workers(), affinity_weight=1.0, compare=False)
        taught = table.grad.to_dense().abs().sum(dim=1) > 0
        work.step({})
        moved = (table != before).any(dim=1)
        named = torch.zeros(len(table), dtype=torch.bool)
        named[model.id_row[batch.items].clamp(min=0)] = True
        assert moved[taught].all()
        assert not moved[~named].any()
        assert 0 < taught.sum() < len(table) - 5


def test_separate_encoders_start_alike_and_part(start: Factorization, data: TrainingData, tmp_path) -> None:
    spec = make_spec(tmp_path)
    settings = spec.model.model_copy(update={"encoder": "separate"})
    apart = build_model(start, data.content, settings, 0.3, seed=0)
    before = build_model(start, data.content, spec.model, 0.3, seed=0).vectors()
    for name, vectors in apart.vectors().items():
        torch.testing.assert_close(vectors, before[name])
    history = fine_tune(apart, data, spec, Workers(), user_level_weight=0.5)
    rows = [apart.encoders[name].ids.weight for name in ("engagement", "relevance")]
    assert not torch.equal(*rows)
    assert not [name for entry in history for name in entry if name.startswith("cosine engagement/engagement relevance/")]
    save_checkpoint(tmp_path / "apart", apart, vocabulary="v", run={})
    for name, vectors in load_checkpoint(tmp_path / "apart", vocabulary="v")[0].vectors().items():
        torch.testing.assert_close(vectors, apart.vectors()[name])


@pytest.mark.parametrize("sees", [["target"], ["trigger"], []])
def test_a_side_that_sees_no_content_depends_on_none(start: Factorization, data: TrainingData, tmp_path, sees: list[str]) -> None:
    spec = make_spec(tmp_path)
    model = build_model(start, data.content, spec.model.model_copy(update={"content_sides": sees}), 0.3, seed=0)
    fine_tune(model, data, spec, Workers(), user_level_weight=0.5)
    before, known = model.vectors(), model.id_row >= 0
    save_checkpoint(tmp_path / "some", model, vocabulary="v", run={})
    model = load_checkpoint(tmp_path / "some", vocabulary="v")[0]
    model.content.copy_(model.content.flip(0))
    after = model.vectors()
    for side, old, new in zip(("trigger", "target"), before["engagement"], after["engagement"], strict=True):
        assert torch.allclose(old[known], new[known], atol=1e-5) == (side not in sees), side
    assert not torch.allclose(before["relevance"][0], after["relevance"][0], atol=1e-2)  # that head lives on content


def test_a_hidden_id_reads_content_alone(model: Mtmh, data: TrainingData) -> None:
    items = torch.tensor([0, 5, 10])  # category 0 of three bundles: equal content
    open_, hidden = model(items), model(items, torch.ones(3, dtype=torch.bool))
    assert not torch.allclose(open_["engagement"][0][0], open_["engagement"][0][1])
    torch.testing.assert_close(hidden["engagement"][0][0], hidden["engagement"][0][1])
    new = torch.tensor([data.num_items - 1])  # no history: hidden or not is the same
    torch.testing.assert_close(model(new)["engagement"][0], hidden["engagement"][0][:1])
    torch.testing.assert_close(model(torch.arange(20))["relevance"][1][5], model(items)["relevance"][1][1])  # a batch does not matter
