"""The start of the encoder, against dense linear algebra and known neighbors."""

from dataclasses import replace

import numpy as np
import pytest

from models.data import TRENDS, History, TrainingData, sparse_rows
from models.factorization import (
    CoEngagement,
    ScoreWeights,
    calibrate,
    choose_content_share,
    factorize,
    log_likelihoods,
    log_popularity,
    recall,
    recalls,
    sample_triggers,
    spectrum,
)
from tests.models.small_world import SmallWorld, empty_history, make_history

WEIGHTS = ScoreWeights(
    user_level_weight=0.5, dimension=16, target_norm_exponent=0.5, popularity_weight=0.1, temperature=3.0, prior_users=1.0
)


def dense(history: History, b: float) -> np.ndarray:
    """M in the open."""
    x = history.user_items.toarray()
    user = (x / np.maximum(x.sum(1, keepdims=True), 1)).T @ x
    np.fill_diagonal(user, 0)
    return history.pairs.toarray() + b * user * history.pairs.sum() / user.sum()


def test_the_unformed_matrix_equals_the_dense_one(data: TrainingData) -> None:
    matrix = CoEngagement(pairs=data.full.pairs, user_items=data.full.user_items, user_level_weight=0.5)
    plain = dense(data.full, 0.5)
    block = np.random.default_rng(0).standard_normal((data.num_items, 3)).astype(np.float32)
    np.testing.assert_allclose(matrix.dot(block), plain @ block, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(matrix.dot_transposed(block), plain.T @ block, rtol=1e-3, atol=1e-3)
    triggers, some = np.array([0, 7, 76], np.int32), np.array([7, 1, 30], np.int32)
    np.testing.assert_allclose(matrix.rows(triggers), plain[triggers], rtol=1e-4, atol=1e-5)
    every = matrix.estimated_rows(triggers, some, most_users=matrix.pairs.shape[0] + 10_000, offset=np.full(3, 0.7))
    np.testing.assert_allclose(every, plain[np.ix_(triggers, some)], rtol=1e-4, atol=1e-5)


def test_rows_from_few_users_are_right_in_the_mean(data: TrainingData) -> None:
    matrix = CoEngagement(pairs=data.full.pairs * 0, user_items=data.full.user_items, user_level_weight=0.5)
    triggers = np.argsort(-data.full.num_users)[:20].astype(np.int32)
    some = np.random.default_rng(1).permutation(data.num_items)[:40].astype(np.int32)
    exact, offsets = matrix.rows(triggers)[:, some], (np.arange(200) + 0.5) / 200
    rows = np.stack([matrix.estimated_rows(triggers, some, most_users=4, offset=np.full(20, offset)) for offset in offsets])
    assert (data.full.num_users[triggers] > 8).all()
    np.testing.assert_allclose(rows.mean(axis=0), exact, rtol=0.1, atol=0.02 * exact.max())
    assert ((rows > 0).sum(axis=2) <= 4 * np.diff(data.full.user_items.indptr).max()).all()
    assert (rows == 0).mean() > (exact == 0).mean() + 0.1, "each is of four users"


def test_spectrum_is_the_singular_value_decomposition(data: TrainingData) -> None:
    matrix = CoEngagement(pairs=data.full.pairs, user_items=data.full.user_items, user_level_weight=0.5)
    plain = dense(data.full, 0.5)
    row, column = (1 / np.sqrt(s + np.median(s[s > 0]) + 1) for s in (plain.sum(1), plain.sum(0)))
    normalized = row[:, None] * plain * column
    left, values, right = spectrum(matrix, dimension=10, keys=data.full.keys, seed=0)
    np.testing.assert_allclose(values, np.linalg.svd(normalized, compute_uv=False)[:10], rtol=1e-3)
    np.testing.assert_allclose(normalized @ right, left * values, atol=1e-3)
    again = spectrum(matrix, dimension=10, keys=data.full.keys, seed=0)
    assert all(np.array_equal(a, b) for a, b in zip((left, values, right), again, strict=True))


def test_known_neighbors_come_first_and_cold_items_follow_their_content(world: SmallWorld, data: TrainingData) -> None:
    made = factorize(data.full, data.content, weights=WEIGHTS, seed=0)
    common = np.arange(20, dtype=np.int32)  # the four most popular bundles
    scores = made.scores(common)
    scores[np.arange(20), common] = -np.inf
    for item, row in enumerate(scores):
        assert set(np.argsort(-row)[: world.num_categories - 1].tolist()) == world.bundle_of(item)
    new, empty = data.num_items - 1, data.num_items - 2
    assert not made.known[[new, empty]].any()
    assert not made.trigger[empty].any()
    assert not made.target[empty].any()  # as a target it has nothing but floored popularity
    assert np.linalg.norm(made.trigger[new]) < 0.9  # a prediction is less sure than a history
    telling = np.eye(world.num_bundles, dtype=np.float32)[np.minimum(np.arange(data.num_items) // world.num_categories, 2)]
    telling[new], telling[empty] = telling[7], 0  # content now tells the bundle, and the new item is one of bundle 1
    made = factorize(data.full, telling, weights=WEIGHTS, seed=0)
    found = np.argsort(-made.scores(np.array([new], np.int32))[0])[: world.num_categories]
    assert set(found.tolist()) == world.bundle_of(7) | {7}
    assert np.isfinite(made.scores(np.array([new, empty], np.int32))).all()
    trigger, target = made.vectors()
    np.testing.assert_allclose(trigger[common] @ target.T, made.scores(common), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_items", [2, 3])
def test_tiny_and_empty_histories_stay_finite(num_items: int) -> None:
    some = make_history(
        sparse_rows([0], [1], [2.0], (num_items, num_items)),
        sparse_rows([0, 0], [0, 1], [1, 1], (1, num_items)),
        np.eye(num_items, dtype=np.float32)[0],
    )
    users_only = replace(some, pairs=empty_history(num_items).pairs)
    for history in (some, users_only, empty_history(num_items)):
        made = factorize(history, np.zeros((num_items, 4), np.float32), weights=WEIGHTS, seed=0)
        assert made.trigger.shape == made.target.shape
        assert np.isfinite(made.scores(np.arange(num_items, dtype=np.int32))).all()


def test_log_popularity_is_normalized_and_floored() -> None:
    out = np.exp(log_popularity(np.array([0, 0.1, 4, 8], np.float32)))  # median of the seen 4, floor 2
    np.testing.assert_allclose(out, np.array([2, 2, 4, 8]) / 16, rtol=1e-6)


def test_the_popularity_of_a_score_may_decay_faster_than_the_pairs(data: TrainingData) -> None:
    made, faster = (factorize(data.full, data.content, weights=replace(WEIGHTS, popularity_half_life_days=days), seed=0) for days in (0, 7))
    popularity = np.exp(data.full.trends[:, TRENDS.index("log_popularity_7d")])
    np.testing.assert_array_equal(made.log_prior, log_popularity(data.full.popularity))
    np.testing.assert_array_equal(faster.log_prior, log_popularity(popularity))
    np.testing.assert_array_equal(faster.log_popularity, made.log_popularity)
    assert np.abs(faster.log_prior - made.log_prior).max() > 0.1
    items = np.arange(data.num_items, dtype=np.int32)
    gained = WEIGHTS.temperature * WEIGHTS.popularity_weight * (faster.log_prior - made.log_prior)
    np.testing.assert_allclose(faster.scores(items) - made.scores(items), np.broadcast_to(gained, (len(items), len(items))), atol=1e-5)


def test_calibration_finds_the_half_life_of_what_followed() -> None:
    """Twenty of 150 items sell since last week; over all time they are the least popular ones, and nothing else tells them."""
    num_items, late = 150, np.arange(130, 150)
    popularity = np.linspace(30, 1, num_items, dtype=np.float32)
    some = make_history(empty_history(num_items).pairs, sparse_rows([0, 0], [0, 1], [1, 1], (2, num_items)), popularity)
    trends = np.tile(np.log(popularity / popularity.sum())[:, None], (1, len(TRENDS)))
    this_week = np.where(np.isin(np.arange(num_items), late), 50.0, 1.0)
    trends[:, TRENDS.index("log_popularity_7d")] = np.log(this_week / this_week.sum())
    history = replace(some, trends=trends.astype(np.float32))
    row, column = (part.ravel() for part in np.meshgrid(np.arange(60), late, indexing="ij"))
    holdout = sparse_rows(row, column, np.ones(len(row)), (num_items, num_items))
    triggers, content = np.arange(60, dtype=np.int32), np.zeros((num_items, 0), np.float32)
    options = {"start": replace(WEIGHTS, popularity_weight=1.0), "largest": 4, "content_share": 0.5, "seed": 0}
    found = calibrate(history, content, holdout, triggers, **options)
    assert found.weights.popularity_half_life_days == 7
    assert found.log[0]["recall"] == pytest.approx(0)
    assert found.recall == 1


@pytest.mark.parametrize(("misled", "wanted"), [(0, 1.0), (1, 1.0), (40, 0.85)])
def test_content_gives_way_to_engagement_only_where_that_is_surely_better(misled: int, wanted: float) -> None:
    """400 items in groups of 20, each item's new partners; the content of some triggers is of another group."""
    num_items, size, triggers = 400, 20, np.arange(0, 400, 5, dtype=np.int32)
    group = np.arange(num_items) // size
    known_by = np.eye(num_items // size, dtype=np.float32)[group]
    content = known_by + 0.01 * np.random.default_rng(0).standard_normal(known_by.shape).astype(np.float32)  # no two items are level
    content[triggers[:misled]] = content[(triggers[:misled] + 200) % num_items]
    history = empty_history(num_items)
    made = factorize(history, content, weights=replace(WEIGHTS, dimension=known_by.shape[1]), seed=0)
    fit = replace(made, trigger=known_by)
    row, column = np.nonzero((group[:, None] == group) & ~np.eye(num_items, dtype=bool))
    holdout = sparse_rows(row, column, np.ones(len(row)), (num_items, num_items))
    assert choose_content_share(fit, content, history, holdout, triggers, default=0.5) == wanted
    assert choose_content_share(fit, content, history, holdout, triggers, default=0.15, stay=2.0) == 0.15


def test_items_without_content_choose_no_share_of_it() -> None:
    """Scores that are all level find what chance finds: before, they found everything."""
    num_items, size = 400, 20
    triggers, group = np.arange(0, num_items, 5, dtype=np.int32), np.arange(num_items) // size
    known_by = np.eye(num_items // size, dtype=np.float32)[group]
    content = np.random.default_rng(0).standard_normal(known_by.shape).astype(np.float32)  # says nothing
    content /= np.linalg.norm(content, axis=1, keepdims=True)
    content[num_items // 2 :] = 0
    history = empty_history(num_items)
    fit = replace(factorize(history, content, weights=replace(WEIGHTS, dimension=known_by.shape[1]), seed=0), trigger=known_by)
    row, column = np.nonzero((group[:, None] == group) & ~np.eye(num_items, dtype=bool))
    holdout = sparse_rows(row, column, np.ones(len(row)), (num_items, num_items))
    assert choose_content_share(fit, content, history, holdout, triggers, default=0.5) <= 0.5  # 1.0 before
    level = np.zeros((2, 8), np.float32)
    level[1, 5] = 1.0
    truth = sparse_rows(np.array([0, 1, 1]), np.array([3, 5, 6]), np.ones(3), (2, 8))
    assert recalls(level, np.array([0, 1], np.int32), truth, 3) == pytest.approx([3 / 7, (1 + 2 / 6) / 2])


def test_recall_and_likelihood_against_plain_loops() -> None:
    rng = np.random.default_rng(1)
    scores = rng.standard_normal((4, 9)).astype(np.float32)
    triggers = np.array([0, 3, 5, 8], np.int32)
    truth = rng.integers(0, 3, (4, 9)).astype(np.float32)
    truth[np.arange(4), triggers] = 0
    wanted_recall, wanted_likelihood = [], []
    for row, trigger in enumerate(triggers):
        others = [j for j in range(9) if j != trigger]
        top = sorted(others, key=lambda j: -scores[row, j])[:3]
        wanted_recall.append(truth[row, top].sum() / truth[row].sum())
        log_p = {j: scores[row, j] - np.log(np.exp(scores[row, others]).sum()) for j in others}
        wanted_likelihood.append(sum(truth[row, j] * log_p[j] for j in others) / truth[row].sum())
    cells = np.nonzero(truth)
    sparse = sparse_rows(*cells, truth[cells], (4, 9))
    assert recall(scores.copy(), triggers, sparse, 3) == pytest.approx(np.mean(wanted_recall))
    assert log_likelihoods(scores.copy(), triggers, sparse).mean() == pytest.approx(np.mean(wanted_likelihood), rel=1e-5)


def test_calibration_never_loses_recall_and_needs_a_holdout(data: TrainingData) -> None:
    triggers = sample_triggers(data.holdout, keys=data.full.keys, maximum=60, seed=1)
    assert len(triggers) >= 20
    given = (data.fit, data.content, data.holdout)
    options = {"largest": WEIGHTS.dimension, "content_share": 0.5, "seed": 0}
    found = calibrate(*given, triggers, start=WEIGHTS, **options)
    assert found.recall == max(entry["recall"] for entry in found.log)
    assert 0 < found.content_share <= 1
    stayed = calibrate(*given, triggers, start=found.weights, **options | {"content_share": found.content_share}, stay=0.01)
    assert (stayed.weights, stayed.content_share) == (found.weights, found.content_share)
    poor = replace(WEIGHTS, popularity_weight=1.0, target_norm_exponent=0.0)
    assert calibrate(*given, triggers, start=poor, **options, stay=0.01).recall > (1 - 0.02) * found.recall
    assert calibrate(*given, triggers, start=poor, **options, stay=9.0).weights == poor
    without = calibrate(*given, triggers[:0], start=WEIGHTS, **options)
    assert (without.weights, without.content_share, without.log) == (WEIGHTS, 0.5, [])
