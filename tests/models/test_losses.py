"""Each loss against the plain version."""

import numpy as np
import pytest
import torch
from torch import Tensor

from models import losses


@pytest.fixture
def case() -> tuple[Tensor, Tensor]:
    """(5, 12) scores with the trigger masked, and mass; row 4 has no partner."""
    rng = torch.Generator().manual_seed(0)
    scores, mass = torch.randn(5, 12, generator=rng) * 3, torch.rand(5, 12, generator=rng).round(decimals=1)
    scores[range(5), range(5)], mass[range(5), range(5)], mass[4] = losses.MASKED, 0, 0
    return scores.requires_grad_(), mass


def test_full_engagement_is_cross_entropy(case: tuple[Tensor, Tensor]) -> None:
    scores, mass = case
    share = mass[:4] / mass[:4].sum(1, keepdim=True)
    wanted = torch.nn.functional.cross_entropy(scores[:4], share, reduction="sum") / 5
    loss = losses.full_engagement(scores, mass, num_triggers=5)
    torch.testing.assert_close(loss.value, wanted)
    assert loss.parts["taught_share"] == pytest.approx(0.8)
    loss.value.backward()
    assert scores.grad is not None
    assert torch.isfinite(scores.grad).all()
    assert not scores.grad[4].any()
    assert not scores.grad[range(5), range(5)].any()


def test_what_was_shown_and_ignored_counts_as_several_negatives(case: tuple[Tensor, Tensor]) -> None:
    scores, mass = case
    copies = torch.ones(5, 12)
    copies[0, 7], copies[2, 1] = 4, 2
    twice = torch.cat([scores, scores[:, [7, 7, 7, 1]]], dim=1).detach()  # the catalog with the copies as items of their own
    twice[1:, 12:15], twice[[0, 1, 3, 4], 15] = losses.MASKED, losses.MASKED
    wanted = losses.full_engagement(twice, torch.cat([mass, torch.zeros(5, 4)], dim=1), num_triggers=5)
    torch.testing.assert_close(losses.full_engagement(scores, mass, num_triggers=5, log_copies=copies.log()).value, wanted.value)
    position, valid = torch.tensor([[1], [3], [4], [0], [5]]), torch.tensor([True] * 4 + [False])
    partner, rest = scores.gather(1, position), {"log_inclusion": torch.zeros(12), "position": position, "valid": valid, "num_triggers": 5}
    rest["weight"] = torch.ones(5, 1)
    sampled = losses.sampled_engagement(partner, scores, log_copies=copies.log(), **rest)  # type: ignore[arg-type]
    torch.testing.assert_close(sampled.value, ((twice.logsumexp(1) - partner[:, 0]) * valid).sum() / 5)


def test_sampled_engagement_with_every_item_is_the_full_one(case: tuple[Tensor, Tensor]) -> None:
    scores, _ = case
    position = torch.tensor([[1, 2], [0, 3], [4, 4], [11, 0], [0, 0]])
    valid = torch.tensor([True, True, True, True, False])
    common = {"log_inclusion": torch.zeros(12), "position": position, "valid": valid, "num_triggers": 5}
    loss = losses.sampled_engagement(scores.gather(1, position), scores, weight=torch.ones(5, 2), **common)  # type: ignore[arg-type]
    of_draws = -scores.log_softmax(1).gather(1, position)[:4]
    torch.testing.assert_close(loss.value, of_draws.mean(1).sum() / 5)
    weight = torch.tensor([1.5, 0.5]).expand(5, 2)
    loss = losses.sampled_engagement(scores.gather(1, position), scores, weight=weight, **common)  # type: ignore[arg-type]
    torch.testing.assert_close(loss.value, (of_draws * weight[:4]).mean(1).sum() / 5)


def test_sampled_normalizer_is_unbiased_and_counts_the_partner_once() -> None:
    """Over many 10-of-30 draws the estimate is the full sum of exponentials in the mean."""
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.standard_normal(40).astype(np.float32) * 2)
    draws, partner = 5000, 25
    uniform = 10 + rng.permuted(np.tile(np.arange(30), (draws, 1)), axis=1)[:, :10]
    items = np.concatenate([np.tile(np.arange(10), (draws, 1)), uniform], axis=1)  # one draw a row
    found = items == partner
    normalizer = losses.sampled_log_normalizer(
        scores[partner].expand(draws, 1),
        scores[items],
        torch.log(torch.tensor([1.0] * 10 + [1 / 3] * 10)),
        torch.from_numpy(np.where(found.any(1), found.argmax(1), -1)[:, None]),
    )
    assert float(normalizer.exp().min()) > float(scores[partner].exp())  # the partner counts in every draw, found or not
    assert float(normalizer.exp().mean()) == pytest.approx(float(scores.exp().sum()), rel=0.02)


def test_affinity_divides_by_popularity_and_undoes_sampling(case: tuple[Tensor, Tensor]) -> None:
    scores, mass = case
    popularity = torch.linspace(0.01, 0.2, 12)
    inclusion = torch.linspace(0.2, 1, 12)
    share = mass[:4] / popularity / inclusion
    log_q = (scores[:4].exp() / inclusion / (scores[:4].exp() / inclusion).sum(1, keepdim=True)).log() + inclusion.log()
    wanted = -(share / share.sum(1, keepdim=True) * log_q.masked_fill(mass[:4] == 0, 0)).sum() / 5
    loss = losses.affinity(scores, mass, log_popularity=popularity.log(), log_inclusion=inclusion.log(), num_triggers=5)
    torch.testing.assert_close(loss.value, wanted)


def test_relevance_is_listwise_divergence_of_what_is_present() -> None:
    cosines = torch.tensor([[0.9, 0.1, -0.5], [0.2, 0.4, 0.0], [0.3, 0.3, 0.3]], requires_grad=True)
    targets = torch.tensor([[1.0, 0.0, 0.4], [0.2, 0.9, 0.7], [1.0, 0.0, 0.0]])
    present = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])  # a list of one teaches nothing
    wanted = torch.tensor(0.0)
    for row, length in ((0, 3), (1, 2)):
        p, q = (t[row, :length].div(losses.RELEVANCE_TEMPERATURE).softmax(0) for t in (targets, cosines))
        wanted = wanted + (p * (p.log() - q.log())).sum()
    loss = losses.relevance(cosines, targets, present, num_triggers=3)
    torch.testing.assert_close(loss.value, wanted / 3)
    torch.autograd.backward(loss.value)
    assert cosines.grad is not None
    assert not cosines.grad[~present].any()
    assert not cosines.grad[2].any()
    perfect = losses.relevance(targets.clone(), targets, present, num_triggers=3)
    assert float(perfect.value) == pytest.approx(0, abs=1e-6)
