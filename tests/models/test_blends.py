"""Mixes against plain loops over sorted lists."""

from dataclasses import dataclass

import numpy as np
import pytest

from models.baselines import content_lists, engagement_lists
from models.blends import Mixes, blend_lists, content_cosine
from models.merge import CandidateSet, Policies, Policy, merge_candidates

NUM_ITEMS = 14
TRIGGERS = np.array([3, 0, 13, 5, 14, 30], np.int32)  # 13 has no content, 14 and 30 were not known yet
MIXES = Mixes(late_blend=(0.0, 0.02, 0.5), reciprocal_rank_fusion=(0.0, 0.3, 0.5, 1.0), quota=(0.0, 0.25, 0.3, 0.5, 1.0))


@dataclass(frozen=True)
class TableScores:
    """p(j given i) by heart; the last row is that of unknown triggers."""

    table: np.ndarray

    def scores(self, triggers: np.ndarray) -> np.ndarray:
        return self.table[np.minimum(triggers, NUM_ITEMS)]


@dataclass(frozen=True)
class World:
    engagement: TableScores
    content: np.ndarray
    eligible: np.ndarray

    def lists(self, k: int, depth: int = 1000) -> dict[str, dict[float, np.ndarray]]:
        return blend_lists(
            TRIGGERS, engagement=self.engagement, content=self.content, eligible=self.eligible, k=k, mixes=MIXES, depth=depth
        )

    def listable(self, i: int) -> list[int]:
        return [j for j in range(NUM_ITEMS) if j != i and self.eligible[j]]

    def p(self, i: int) -> np.ndarray:
        return self.engagement.table[min(i, NUM_ITEMS)]

    def cosine(self, i: int) -> np.ndarray:
        """-inf without content."""
        return content_cosine(np.array([i], np.int32), self.content)[0]

    def orders(self, i: int) -> tuple[list[int], list[int]]:
        """By engagement and by content, best first."""
        cosine = self.cosine(i)
        by_p = sorted(self.listable(i), key=lambda j: (-self.p(i)[j], j))
        return by_p, sorted((j for j in self.listable(i) if cosine[j] > -np.inf), key=lambda j: (-cosine[j], j))


def random_world(seed: int) -> World:
    """Few different values, so that many tie, all exact in float32; items 12 and 13 have no content."""
    rng = np.random.default_rng(seed)
    table = rng.integers(0, 5, (NUM_ITEMS + 1, NUM_ITEMS)).astype(np.float32) / 64
    content = np.eye(4, dtype=np.float32)[rng.integers(0, 4, NUM_ITEMS)]
    content[:8] = rng.choice([-0.5, 0.5], (8, 4))
    content[12:] = 0
    return World(engagement=TableScores(table), content=content, eligible=rng.random(NUM_ITEMS) < 0.8)


def padded(items: list[int], k: int) -> list[int]:
    return items[:k] + [-1] * (k - len(items[:k]))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k", [1, 4, 30])
def test_late_blend_against_loops(seed, k):
    world = random_world(seed)
    for mix, lists in world.lists(k)["late_blend"].items():
        assert (lists.shape, lists.dtype) == ((len(TRIGGERS), k), np.int32)
        for i, found in zip(TRIGGERS.tolist(), lists.tolist(), strict=True):
            cosine, p = world.cosine(i), world.p(i)
            score = {j: p[j] + np.float32(mix) * max(cosine[j], np.float32(0)) for j in world.listable(i)}
            assert found == padded(sorted(score, key=lambda j, score=score: (-score[j], j)), k)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k", [1, 4, 30])
@pytest.mark.parametrize("depth", [2, 1000])
def test_reciprocal_rank_fusion_against_loops(seed, k, depth):
    world = random_world(seed)
    for mix, lists in world.lists(k, depth)["reciprocal_rank_fusion"].items():
        for i, found in zip(TRIGGERS.tolist(), lists.tolist(), strict=True):
            score: dict[int, np.float32] = {}
            for weight, order in zip((np.float32(1 - mix), np.float32(mix)), world.orders(i), strict=True):
                for rank, j in enumerate(order[:depth], start=1):
                    score[j] = score.get(j, np.float32(0)) + weight * (np.float32(1) / np.float32(60 + rank))
            listed = [j for j in score if score[j] > 0]
            assert found == padded(sorted(listed, key=lambda j, score=score: (-score[j], j)), k)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k", [1, 4, 30])
def test_quota_against_loops(seed, k):
    world = random_world(seed)
    for share, lists in world.lists(k)["quota"].items():
        for i, found in zip(TRIGGERS.tolist(), lists.tolist(), strict=True):
            assert found == padded(slow_quota(*world.orders(i), share), k)


def slow_quota(by_p: list[int], by_content: list[int], share: float) -> list[int]:
    """Deal positions out one by one, then drop repeats; a side that has run out passes its position on."""
    sides, dealt = (list(by_p), list(by_content)), []
    position = 0
    while sides[0] or sides[1]:
        position += 1
        mine = sides[int(position * share + 1e-6) > int((position - 1) * share + 1e-6)]
        if mine:
            dealt.append(mine.pop(0))
        elif position > 1000:  # a share of 0 or 1 never gives the other side a position
            dealt += sides[0] + sides[1]
            break
    return list(dict.fromkeys(dealt))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5])
def test_quota_is_the_policy_of_the_merge(share):
    rng = np.random.default_rng(3)
    p, cosine = (rng.permutation(NUM_ITEMS * 5).reshape(5, NUM_ITEMS).astype(np.float32) for _ in range(2))
    content_rows = cosine / 100
    log_p = np.log((p + 1) / (p + 1).sum(axis=1, keepdims=True)).astype(np.float32)
    candidates = CandidateSet(
        offsets=np.arange(6) * NUM_ITEMS,
        log_p=log_p.ravel(),
        relevance=content_rows.ravel(),
        log_popularity=np.zeros(log_p.size, np.float32),
        found_by_relevance=np.ones(log_p.size, bool),
        counted=np.ones(log_p.size, bool),
        new=np.zeros(log_p.size, bool),
    )
    policies = Policies.same(Policy(kind="quota", value=share, popularity_exponent=0.0), 5)
    merged = merge_candidates(candidates, policies, k=6)
    for row in range(5):
        positions = merged.position[merged.offsets[row] : merged.offsets[row + 1]] - row * NUM_ITEMS
        by_p, by_content = (np.argsort(-side[row], kind="stable").tolist() for side in (log_p, content_rows))
        assert positions.tolist() == slow_quota(by_p, by_content, share)[:6]


def test_ends_of_the_sweeps_are_the_two_lists():
    world = random_world(7)
    lists = world.lists(5)
    by_p = engagement_lists(TRIGGERS, engagement=world.engagement, eligible=world.eligible, k=5)
    by_content = content_lists(TRIGGERS, content=world.content, eligible=world.eligible, k=5)
    for family in lists:
        assert (lists[family][0.0] == by_p).all(), family
    described = (by_content >= 0).all(axis=1)
    assert described.sum() == 3
    for family in ("reciprocal_rank_fusion", "quota"):
        assert (lists[family][1.0][described] == by_content[described]).all(), family


def test_blocks_do_not_show_and_no_trigger_no_list(monkeypatch):
    world = random_world(5)
    whole = world.lists(5)
    monkeypatch.setattr("models.ranking._CELLS_AT_ONCE", 30)
    for family, sweep in world.lists(5).items():
        assert list(sweep) == list(getattr(MIXES, family))
        assert all((lists == whole[family][mix]).all() for mix, lists in sweep.items())
    arguments = {"engagement": world.engagement, "content": world.content, "eligible": world.eligible, "k": 5}
    empty = blend_lists(TRIGGERS[:0], **arguments, mixes=Mixes(late_blend=(0.5,), reciprocal_rank_fusion=(), quota=()))
    assert {family: list(sweep) for family, sweep in empty.items()} == {"late_blend": [0.5], "reciprocal_rank_fusion": [], "quota": []}
    assert empty["late_blend"][0.5].shape == (0, 5)
