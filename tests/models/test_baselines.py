import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
from scipy.sparse import csr_array

from models.baselines import (
    CatalogTooLargeError,
    Smooth,
    SmoothSvd,
    SmoothWeights,
    content_lists,
    count_lists,
    ease_lists,
    ease_weights,
    engagement_lists,
    hide,
    pair_score_lists,
    popularity_lists,
    smooth_lists,
    smooth_scores,
    top_columns,
    tune_ease,
    tune_smooth,
    tune_smooth_svd,
)
from models.data import History
from models.factorization import ScoreWeights, factorize, recall, sample_triggers
from models.metrics import recall_at_k
from models.ranking import best_per_row
from tests.models.small_world import empty_history, make_history

# six items, the last is ineligible
POPULARITY = np.array([5, 1, 3, 3, 2, 9], np.float32)
ELIGIBLE = np.array([True, True, True, True, True, False])
COUNTS = csr_array(
    np.array(
        [[9, 2, 0, 2, 0, 7], [0, 0, 0, 0, 8, 0], [0] * 6, [0] * 6, [0] * 6, [1, 0, 0, 0, 0, 0]],
        np.float32,
    )
)
CONTENT = np.array([[1, 0], [1, 0], [0.6, 0.8], [0, 1], [0, 0], [0, 1]], np.float32)

BASELINES = {
    "popularity": partial(popularity_lists, popularity=POPULARITY, eligible=ELIGIBLE),
    "counts": partial(count_lists, counts=COUNTS, popularity=POPULARITY, eligible=ELIGIBLE),
    "content": partial(content_lists, content=CONTENT, eligible=ELIGIBLE),
}


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("k", [1, 3, 10])
def test_baseline_contract(name, k):
    triggers = np.array([3, 0, 5, 4, 6], np.int32)  # 5 is ineligible, 6 was not known yet
    lists = BASELINES[name](triggers, k=k)
    assert (lists.shape, lists.dtype) == ((5, k), np.int32)
    for trigger, found in zip(triggers, lists, strict=True):
        listed = found[found >= 0]
        assert (found[: len(listed)] == listed).all(), "missing positions come last"
        assert trigger not in listed
        assert ELIGIBLE[listed].all()
        assert len(set(listed.tolist())) == len(listed)
    longer = BASELINES[name](triggers, k=k + 1)
    assert (longer[:, :k] == lists).all(), "a longer list starts with the shorter"
    assert (BASELINES[name](triggers[::-1], k=k)[::-1] == lists).all(), "a list does not depend on its batch"
    assert BASELINES[name](triggers[:0], k=k).shape == (0, k)


@pytest.mark.parametrize(
    ("name", "trigger", "wanted"),
    [
        ("popularity", 0, [2, 3, 4, 1, -1]),  # 2 and 3 are equally popular
        ("popularity", 6, [0, 2, 3, 4, 1]),
        ("counts", 0, [1, 3, 2, 4, -1]),  # counted 1 and 3 tie; 5 is ineligible and 0 the trigger; then by popularity
        ("counts", 1, [4, 0, 2, 3, -1]),
        ("counts", 5, [0, 2, 3, 4, 1]),
        ("counts", 6, [0, 2, 3, 4, 1]),
        ("content", 0, [1, 2, 3, -1, -1]),  # 4 has no content
        ("content", 3, [2, 0, 1, -1, -1]),
        ("content", 5, [3, 2, 0, 1, -1]),
        ("content", 4, [-1] * 5),
        ("content", 6, [-1] * 5),
    ],
)
def test_lists_by_hand(name, trigger, wanted):
    assert BASELINES[name](np.array([trigger], np.int32), k=5).tolist() == [wanted]


def test_content_blocks_do_not_show(monkeypatch):
    rng = np.random.default_rng(2)
    content = rng.standard_normal((50, 8)).astype(np.float32)
    content /= np.linalg.norm(content, axis=1, keepdims=True)
    triggers, eligible = np.arange(50, dtype=np.int32), rng.random(50) < 0.8
    whole = content_lists(triggers, content=content, eligible=eligible, k=5)
    monkeypatch.setattr("models.ranking._CELLS_AT_ONCE", 100)  # two or three triggers at once
    assert (content_lists(triggers, content=content, eligible=eligible, k=5) == whole).all()
    cosine = np.where(eligible & ~np.eye(50, dtype=bool), content @ content.T, -np.inf)
    assert (whole == np.argsort(-cosine, axis=1, kind="stable")[:, :5]).all()


# --- against plain loops, on worlds with ties, ineligible items, unknown triggers and lists longer than the catalog ---

TRIGGERS = np.array([3, 0, 11, 5, 12, 40, 3], np.int32)  # 12 and 40 were not known yet
WEIGHTS = SmoothWeights(user_level_weight=0.5, prior_weight=4.0, popularity_exponent=0.3)
FACTORS = ScoreWeights(
    user_level_weight=0.5, dimension=4, target_norm_exponent=0.5, popularity_weight=0.4, temperature=2.0, prior_users=0.0
)


@dataclass(frozen=True)
class World:
    history: History
    eligible: np.ndarray


def random_world(seed: int, num_items: int = 12, num_users: int = 9) -> World:
    """Few different values, so that many tie; the last item has no history at all."""
    rng = np.random.default_rng(seed)
    pairs = rng.integers(0, 3, (num_items, num_items)).astype(np.float32)
    users = (rng.random((num_users, num_items)) < 0.3).astype(np.float32)
    popularity = rng.integers(0, 4, num_items).astype(np.float32)
    np.fill_diagonal(pairs, 0)
    pairs[-1], pairs[:, -1], users[:, -1], popularity[-1] = 0, 0, 0, 0
    history = make_history(csr_array(pairs), csr_array(users), popularity)
    return World(history=history, eligible=rng.random(num_items) < 0.8)


def smooth_svd(history: History, *, share: float) -> SmoothSvd:
    """By WEIGHTS and FACTORS."""
    made = factorize(history, np.zeros((history.num_items, 0), np.float32), weights=FACTORS, seed=0)
    return SmoothSvd(smooth=Smooth.of(history, WEIGHTS), factorization=made, share=share)


def slow_list(scores: Callable[[int], float | None], num_items: int, trigger: int, eligible: np.ndarray, k: int) -> list[int]:
    """Best first, ties by index; None is not listed."""
    found = [(-score, j) for j in range(num_items) if j != trigger and eligible[j] and (score := scores(j)) is not None]
    return [j for _, j in sorted(found)[:k]]


def slow_lists(score: Callable[[int, int], float | None], world: World, k: int, *, backfill: bool = False) -> list[list[int]]:
    """TRIGGERS' lists, padded; `score(i, j)`."""
    popularity, lists = world.history.popularity, []
    for i in TRIGGERS.tolist():
        found = slow_list(lambda j, i=i: score(i, j), len(popularity), i, world.eligible, k)
        if backfill:
            popular = slow_list(lambda j: float(popularity[j]), len(popularity), i, world.eligible, k)
            found = (found + [j for j in popular if j not in found])[:k]
        lists.append(found + [-1] * (k - len(found)))
    return lists


def slow_counts(history: History, b: float) -> np.ndarray:
    """C + b C_user, cell by cell."""
    pairs, x = history.pairs.toarray(), history.user_items.toarray()
    n = len(pairs)
    user = np.zeros((n, n))
    for row in x:
        for i in range(n):
            for j in range(n):
                user[i, j] += row[i] * row[j] / row.sum() if i != j and row[i] else 0
    return pairs + b * user * pairs.sum() / user.sum()


def slow_smooth(history: History, weights: SmoothWeights) -> np.ndarray:
    """(N + 1, N): the last row is that of an unknown trigger."""
    counts, popularity = slow_counts(history, weights.user_level_weight), history.popularity
    floor = np.maximum(popularity, 0.5 * np.median(popularity[popularity > 0]))
    p, floored = popularity / popularity.sum(), floor / floor.sum()
    counts = np.vstack([counts, np.zeros(len(p))])
    return (counts + weights.prior_weight * p) / floored**weights.popularity_exponent


def row_of(i: int, num_items: int = 12) -> int:
    return min(i, num_items)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k", [1, 4, 30])
@pytest.mark.parametrize("backfill", [False, True])
def test_pair_scores_against_loops(seed, k, backfill):
    world = random_world(seed)
    cells = world.history.pairs.toarray()
    plain = slow_lists(lambda i, j: (cells[i, j] or None) if i < 12 else None, world, k, backfill=backfill)
    popularity = world.history.popularity
    unsorted = world.history.pairs[:, ::-1][:, ::-1]
    for scores in (world.history.pairs, csr_array(unsorted)):
        lists = pair_score_lists(TRIGGERS, scores=scores, popularity=popularity, eligible=world.eligible, k=k, backfill=backfill)
        assert lists.tolist() == plain
    counted = count_lists(TRIGGERS, counts=world.history.pairs, popularity=popularity, eligible=world.eligible, k=k)
    assert not backfill or counted.tolist() == plain


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_smooth_against_loops(seed, alpha):
    world = random_world(seed)
    weights = replace(WEIGHTS, popularity_exponent=alpha)
    plain = slow_smooth(world.history, weights)
    smooth = Smooth.of(world.history, weights)
    scores = smooth_scores(TRIGGERS, matrix=smooth.matrix, popularity=world.history.popularity, weights=weights)
    for row, i in zip(scores, TRIGGERS.tolist(), strict=True):
        others = np.arange(12) != i
        np.testing.assert_allclose(row[others], plain[row_of(i), others], rtol=1e-4)
    for k in (3, 30):
        lists = smooth_lists(TRIGGERS, history=world.history, weights=weights, eligible=world.eligible, k=k)
        by_row = dict(zip(TRIGGERS.tolist(), scores.tolist(), strict=True))
        assert lists.tolist() == slow_lists(lambda i, j, rows=by_row: rows[i][j], world, k)
    p = smooth.scores(TRIGGERS)
    wanted = np.where(np.arange(12) == TRIGGERS[:, None], 0, scores)
    np.testing.assert_allclose(p, wanted / wanted.sum(axis=1, keepdims=True), rtol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_smooth_svd_against_loops(share):
    world = random_world(1)
    mixed = smooth_svd(world.history, share=share)
    made, smooth = mixed.factorization, slow_smooth(world.history, WEIGHTS)
    found = mixed.scores(TRIGGERS)
    assert found.dtype == np.float32
    for row, i in zip(found, TRIGGERS.tolist(), strict=True):
        trigger = made.trigger[i] if i < 12 else np.zeros(4)
        others = [j for j in range(12) if j != i]
        weight = {j: math.exp(2.0 * (trigger @ made.target[j] + 0.4 * made.log_popularity[j])) for j in others}
        counted = {j: smooth[row_of(i), j] for j in others}
        for j in others:
            wanted = share * weight[j] / sum(weight.values()) + (1 - share) * counted[j] / sum(counted.values())
            assert row[j] == pytest.approx(wanted, rel=1e-4, abs=1e-7)
        assert row.sum() == pytest.approx(1, rel=1e-5)
        assert i >= 12 or row[i] == 0
    for k in (3, 30):
        by_row = dict(zip(TRIGGERS.tolist(), found.tolist(), strict=True))
        lists = engagement_lists(TRIGGERS, engagement=mixed, eligible=world.eligible, k=k)
        assert lists.tolist() == slow_lists(lambda i, j, rows=by_row: rows[i][j], world, k)


@pytest.mark.parametrize("num_items", [1, 3])
def test_engagement_scores_of_an_empty_history_are_finite(num_items):
    history = empty_history(num_items)
    mixed = smooth_svd(history, share=0.5)
    assert np.isfinite(mixed.scores(np.array([0, num_items], np.int32))).all()
    lists = engagement_lists(np.zeros(1, np.int32), engagement=mixed, eligible=np.ones(num_items, bool), k=4)
    assert lists.tolist() == [[*range(1, num_items)] + [-1] * (5 - num_items)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("backfill", [False, True])
def test_ease_against_the_formula(seed, backfill):
    world = random_world(seed)
    x = world.history.user_items.toarray().astype(float)
    inverse = np.linalg.inv(x.T @ x + 2.0 * np.eye(12))
    plain = np.eye(12) - inverse / np.diag(inverse)  # equation 8
    weights = ease_weights(world.history.user_items, regularization=2.0)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, plain, atol=1e-6)
    assert not np.diag(weights).any()
    for k in (3, 30):
        lists = ease_lists(TRIGGERS, weights=weights, popularity=world.history.popularity, eligible=world.eligible, k=k, backfill=backfill)
        wanted = slow_lists(lambda i, j: float(weights[i, j]) if i < 12 and weights[i, j] > 0 else None, world, k, backfill=backfill)
        assert lists.tolist() == wanted


def test_ease_says_when_it_is_too_large():
    world = random_world(0)
    with pytest.raises(CatalogTooLargeError, match="found 12 items, wanted at most 11"):
        ease_weights(world.history.user_items, regularization=1.0, max_items=11)
    truth, triggers = csr_array(world.history.pairs[:3]), np.arange(3, dtype=np.int32)
    with pytest.raises(CatalogTooLargeError):
        tune_ease(world.history, truth, triggers, eligible=world.eligible, max_items=11)


@pytest.mark.parametrize("values", ["ties", "normal", "none"])
@pytest.mark.parametrize("k", [0, 1, 7, 39, 40, 60])
def test_top_columns_is_best_per_row(values, k):
    rng = np.random.default_rng(k)
    scores = rng.standard_normal((9, 40)) if values == "normal" else rng.integers(-1, 2, (9, 40)) * 0.5
    scores[rng.random((9, 40)) < (1.0 if values == "none" else 0.3)] = -np.inf
    scores[0] = -np.inf
    scores = scores.astype(np.float32)
    assert top_columns(scores, k).tolist() == best_per_row(scores, k).tolist()
    assert top_columns(scores[:0], k).shape == best_per_row(scores[:0], k).shape


# --- tuning ---


def drawn_truth(data):
    """What followed in the last days, and for which triggers."""
    triggers = sample_triggers(data.holdout, keys=data.full.keys, maximum=60, seed=1)
    return csr_array(data.holdout[triggers]), triggers


def test_smooth_tuning_reaches_the_best_of_its_path(data):
    truth, triggers = drawn_truth(data)

    def reached(weights):
        smooth = Smooth.of(data.fit, weights)
        return recall(hide(smooth.raw(triggers), triggers, data.eligible), triggers, truth, 3)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("models.baselines._TUNED_AT", 3)  # a hundred is the whole catalog here
        patch.setattr("models.ranking._CELLS_AT_ONCE", 700)
        start = SmoothWeights(user_level_weight=0.0, prior_weight=1000.0, popularity_exponent=0.5)
        best = tune_smooth(data.fit, truth, triggers, eligible=data.eligible, start=start)
    assert reached(best) > reached(start)
    for name, values in {"user_level_weight": (0, 0.3, 10), "prior_weight": (1, 30, 1000), "popularity_exponent": (0, 0.5)}.items():
        for value in values:  # no single change of a coordinate is better
            assert reached(replace(best, **{name: float(value)})) <= reached(best) + 1e-6


def test_tuning_without_usable_triggers_keeps_the_start(data):
    unknown = np.array([data.num_items, data.num_items + 5], np.int32)
    truth = csr_array(data.holdout[np.array([0, 1])])
    start = SmoothWeights(prior_weight=7.0)
    assert tune_smooth(data.fit, truth, unknown, eligible=data.eligible, start=start) == start
    assert tune_smooth(data.fit, truth, unknown, eligible=data.eligible) == SmoothWeights()
    nothing = csr_array((2, data.num_items), dtype=np.float32)
    assert tune_smooth(data.fit, nothing, np.array([0, 1], np.int32), eligible=data.eligible, start=start) == start
    assert tune_ease(data.fit, truth, unknown, eligible=data.eligible, grid=(5.0, 1.0)) == 5.0


def test_user_level_weight_is_tuned_without_any_pair(data):
    truth, triggers = drawn_truth(data)
    no_pairs = replace(data.fit, pairs=csr_array((data.num_items, data.num_items), dtype=np.float32))
    best = tune_smooth(no_pairs, truth, triggers, eligible=data.eligible)
    assert best.user_level_weight == SmoothWeights().user_level_weight, "it has no effect, so it does not move"


def test_share_and_lambda_are_the_best_of_their_grids(data, monkeypatch):
    monkeypatch.setattr("models.baselines._TUNED_AT", 3)
    truth, triggers = drawn_truth(data)
    shares, grid = (0.0, 0.5, 1.0), (0.1, 10.0, 1000.0)
    mixed = smooth_svd(data.fit, share=0.5)
    factors = {0.0: mixed.factorization, 1.0: replace(mixed.factorization, trigger=-mixed.factorization.trigger)}
    mixes = {(prior, s): replace(mixed, factorization=of, share=s) for prior, of in factors.items() for s in shares}
    reached = {of: recall(hide(m.scores(triggers), triggers, data.eligible), triggers, truth, 3) for of, m in mixes.items()}
    for known in (factors, dict(reversed(factors.items()))):
        found = tune_smooth_svd(mixed.smooth, known, truth, triggers, eligible=data.eligible, shares=shares)
        assert reached[found] == max(reached.values())
    by_lambda = {}
    for value in grid:
        weights = ease_weights(data.fit.user_items, regularization=value)
        popularity = data.fit.popularity
        lists = ease_lists(triggers, weights=weights, popularity=popularity, eligible=data.eligible, k=3, backfill=True)
        by_lambda[value] = recall_at_k(lists, truth, k=3).mean()
    assert by_lambda[tune_ease(data.fit, truth, triggers, eligible=data.eligible, grid=grid)] == max(by_lambda.values())


def cells(entries: dict[tuple[int, int], float], shape: tuple[int, int]) -> csr_array:
    made = np.zeros(shape, np.float32)
    for cell, value in entries.items():
        made[cell] = value
    return csr_array(made)


def test_a_user_level_weight_beyond_ten_is_found(monkeypatch):
    monkeypatch.setattr("models.baselines._TUNED_AT", 1)
    # the one counted pair is of 0 and 1; what follows 0 is 2, which one of ten users engaged with it: a twentieth of the users' mass
    users = cells({(0, 0): 1, (0, 2): 1} | {(user, item): 1 for user in range(1, 10) for item in (3, 4)}, (10, 5))
    history = make_history(cells({(0, 1): 1}, (5, 5)), users, np.ones(5, np.float32))
    best = tune_smooth(history, cells({(0, 2): 1}, (1, 5)), np.zeros(1, np.int32), eligible=np.ones(5, bool))
    assert best == SmoothWeights(user_level_weight=30.0)


def test_lambda_goes_on_from_the_end_of_its_grid_while_recall_gains(monkeypatch):
    monkeypatch.setattr("models.baselines._TUNED_AT", 1)
    # 0 is engaged with 1 more often than with 2, but 1 goes with 3 whether 0 is there or not: a small lambda lists 2, a large one 1.
    # Three copies of this, in each three times as many users as in the one before: what tips one tips the next at three times lambda.
    kinds = {(0, 1, 3): 50, (1, 3): 50, (0, 2): 20}
    baskets = [[4 * copy + i for i in kind] for copy in range(3) for kind, count in kinds.items() for _ in range(3**copy * count)]
    users = cells({(user, item): 1 for user, items in enumerate(baskets) for item in items}, (len(baskets), 12))
    history = make_history(csr_array((12, 12), dtype=np.float32), users, np.zeros(12, np.float32))
    triggers, eligible = np.array([0, 4, 8], np.int32), np.arange(12) % 4 != 3
    truth = cells({(row, 4 * row + 1): 1 for row in range(3)}, (3, 12))
    tips = 100.0  # the first copy; it does so from about 66 on
    tuned = partial(tune_ease, history, truth, triggers, eligible=eligible)
    asked: list[float] = []

    def counted(user_items, *, regularization, max_items):
        asked.append(regularization)
        return ease_weights(user_items, regularization=regularization, max_items=max_items)

    monkeypatch.setattr("models.baselines.ease_weights", counted)
    assert tuned(grid=(1.0, tips)) == 9 * tips
    assert asked == [1.0, tips, 3 * tips, 9 * tips, 27 * tips]
    asked.clear()
    assert tuned(grid=(9 * tips, 90 * tips)) == 9 * tips
    assert len(asked) == 2, "an optimum inside the grid costs nothing more"
    monkeypatch.setattr("models.baselines._MAX_EASE_REGULARIZATION", 5 * tips)
    assert tuned(grid=(1.0, tips)) == 3 * tips


def test_blocks_do_not_show(monkeypatch):
    world = random_world(2)
    mixed = smooth_svd(world.history, share=0.5)
    made = {
        "pairs": partial(pair_score_lists, scores=world.history.pairs, popularity=world.history.popularity, backfill=True),
        "engagement": partial(engagement_lists, engagement=mixed),
    }
    whole = {name: lists(TRIGGERS, eligible=world.eligible, k=5).tolist() for name, lists in made.items()}
    monkeypatch.setattr("models.ranking._CELLS_AT_ONCE", 20)
    assert {name: lists(TRIGGERS, eligible=world.eligible, k=5).tolist() for name, lists in made.items()} == whole
