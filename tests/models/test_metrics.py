from functools import partial

import numpy as np
import pytest
from scipy.sparse import csr_array
from scipy.spatial import ConvexHull

from models import metrics
from models.judges import PairJudge, TaxonomyJudge, judged_lists
from models.metrics import (
    bootstrap,
    bootstrap_hypervolume,
    bootstrap_ratio,
    churn_at_k,
    coverage_at_k,
    debiased_recall_at_k,
    gini_at_k,
    hypervolume,
    ideal_grades,
    in_degrees,
    intra_list_diversity_at_k,
    micro_recall_at_k,
    new_pairs,
    overlap_at_k,
    paired_difference,
    paired_hypervolume,
    recall_at_k,
    rel_ndcg_at_k,
    relevance_at_k,
    tail_items,
    tail_share_at_k,
    targets_in,
)

NAN = float("nan")
# three triggers, five items; the last trigger has no future
LISTS = np.array([[1, 2, 3], [4, -1, -1], [0, 1, 2]])
FUTURE = csr_array(np.array([[0, 3, 0, 1, 4], [0, 0, 2, 0, 2], [0, 0, 0, 0, 0]], dtype=np.float64))


def test_recall_by_hand():
    assert recall_at_k(LISTS, FUTURE, k=1) == pytest.approx([3 / 8, 1 / 2, np.nan], nan_ok=True)
    assert recall_at_k(LISTS, FUTURE, k=3) == pytest.approx([4 / 8, 1 / 2, np.nan], nan_ok=True)  # missing positions find nothing
    assert recall_at_k(LISTS, csr_array((3, 5)), k=3) == pytest.approx([np.nan] * 3, nan_ok=True)


def test_debiased_recall_by_hand():
    # weights of the partners of trigger 0: 3 / sqrt 9, 1 / sqrt 4, 4 / sqrt 1 (popularity 0 counts as 1)
    popularity = np.array([1, 9, 16, 4, 0])
    assert debiased_recall_at_k(LISTS, FUTURE, popularity, k=3)[:2] == pytest.approx([1.5 / 5.5, 2 / 2.5])
    assert FUTURE.sum() == 12  # the caller's matrix is left alone


def test_relevance_by_hand():
    judged = np.array([[1.0, 0.5, np.nan], [0.2, 0.9, 0.9], [0, 0, 1]])  # nobody judged the third; the second list is short
    assert relevance_at_k(LISTS, judged, k=2) == pytest.approx([0.75, 0.1, 0])
    assert relevance_at_k(LISTS, judged, k=10) == pytest.approx([0.15, 0.02, 0.1])  # over 10 positions, reached or not


def test_coverage_and_gini_by_hand():
    eligible = np.array([True, True, True, True, False])  # 4 is shown but does not count
    assert in_degrees(LISTS, k=2, num_items=5).tolist() == [1, 2, 1, 0, 1]
    assert coverage_at_k(LISTS, eligible, k=2) == 0.75
    assert gini_at_k(LISTS, eligible, k=2) == pytest.approx((-3 * 0 - 1 * 1 + 1 * 1 + 3 * 2) / (4 * 4))
    assert gini_at_k(np.array([[0], [1], [2], [3]]), eligible, k=1) == 0  # all equally often
    assert np.isnan(gini_at_k(np.full((2, 3), -1), eligible, k=3))


def test_churn_by_hand():
    before = np.array([[1, 2, 3], [1, 2, 3], [1, -1, -1], [-1, -1, -1]])
    now = np.array([[3, 1, 2], [1, 4, 5], [2, 3, 4], [-1, -1, -1]])
    assert churn_at_k(before, now, k=3) == pytest.approx([0, 1 - 1 / 5, 1, 0])  # order does not matter; two empty lists are equal
    assert churn_at_k(before, now, k=2) == pytest.approx([1 - 1 / 3, 1 - 1 / 3, 1, 0])


def test_metrics_against_loops():
    rng = np.random.default_rng(4)
    num_triggers, num_items, k = 40, 30, 6
    dense = rng.integers(0, 4, (num_triggers, num_items)) * (rng.random((num_triggers, num_items)) < 0.2)
    popularity = rng.integers(0, 50, num_items)
    lists = np.array([rng.permutation(num_items)[:8] for _ in range(num_triggers)])
    lists[rng.random(lists.shape) < 0.2] = -1
    discount = 1 / np.sqrt(np.maximum(popularity, 1))
    for weights, found in (
        (dense, recall_at_k(lists, csr_array(dense), k=k)),
        (dense * discount, debiased_recall_at_k(lists, csr_array(dense), popularity, k=k)),
    ):
        for row, partners, value in zip(lists, weights, found, strict=True):
            total = partners.sum()
            wanted = sum(partners[item] for item in row[:k] if item >= 0) / total if total else np.nan
            assert value == pytest.approx(wanted, nan_ok=True)
    degrees = np.array([sum(item in row[:k] for row in lists.tolist()) for item in range(num_items)])
    differences = np.abs(degrees[:, None] - degrees[None, :]).sum()
    assert gini_at_k(lists, np.ones(num_items, bool), k=k) == pytest.approx(differences / (2 * num_items * degrees.sum()))
    other = np.roll(lists, 1, axis=0)
    for before, now, value in zip(lists, other, churn_at_k(lists, other, k=k), strict=True):
        a, b = set(before[:k].tolist()) - {-1}, set(now[:k].tolist()) - {-1}
        assert value == pytest.approx(1 - len(a & b) / len(a | b))


def test_bootstrap_interval_is_the_normal_one():
    values = np.random.default_rng(0).normal(2.0, 1.0, 2_000)
    found = bootstrap(np.append(values, np.nan), num_resamples=1_000, seed=5)
    standard_error = values.std() / np.sqrt(len(values))
    assert found.num_triggers == 2_000
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx(
        (values.mean() - 1.96 * standard_error, values.mean() + 1.96 * standard_error), abs=0.006
    )
    assert bootstrap(np.append(values, np.nan), num_resamples=1_000, seed=5) == found
    assert bootstrap(values, num_resamples=1_000, seed=6) != found
    assert bootstrap(np.array([np.nan]), num_resamples=10, seed=0).num_triggers == 0


def test_pairing_finds_a_small_gain_behind_large_spread():
    rng = np.random.default_rng(0)
    baseline = rng.normal(0, 10, 500)
    gained = baseline + rng.normal(0.1, 0.3, 500)
    gain = paired_difference(gained, baseline, num_resamples=500, seed=1)
    assert 0 < gain.low < gain.value < gain.high < 0.2
    assert bootstrap(gained, num_resamples=500, seed=1).low < bootstrap(baseline, num_resamples=500, seed=1).value
    with pytest.raises(ValueError, match="wanted the same triggers"):
        paired_difference(gained, baseline[1:], num_resamples=10, seed=1)


def test_micro_recall_by_hand():
    found, total = micro_recall_at_k(LISTS, FUTURE, k=3)
    assert found.tolist() == [4, 2, 0]
    assert total.tolist() == [8, 4, 0]
    estimate = bootstrap_ratio(found, total, num_resamples=200, seed=0)
    assert estimate.value == 6 / 12
    assert estimate.num_triggers == 2  # the third has no future
    assert np.isnan(bootstrap_ratio(found[2:], total[2:], num_resamples=10, seed=0).low)


def test_ratio_bootstrap_against_loops():
    rng = np.random.default_rng(2)
    total = rng.integers(0, 9, 50).astype(float)
    found = np.floor(total * rng.random(50))
    estimate = bootstrap_ratio(found, total, num_resamples=2_000, seed=3)
    part, whole = found[total > 0], total[total > 0]
    ratios = [part[drawn].sum() / whole[drawn].sum() for drawn in rng.integers(len(part), size=(2_000, len(part)))]
    assert estimate.value == pytest.approx(found.sum() / total.sum())
    assert (estimate.low, estimate.high) == pytest.approx(np.quantile(ratios, [0.025, 0.975]), abs=0.01)
    assert estimate.low < estimate.value < estimate.high
    assert bootstrap_ratio(found, total, num_resamples=2_000, seed=3) == estimate
    assert bootstrap_ratio(found, total, num_resamples=2_000, seed=4) != estimate
    with pytest.raises(ValueError, match="wanted the same triggers"):
        bootstrap_ratio(found, total[1:], num_resamples=10, seed=0)


def test_a_planted_world_has_known_recall_and_relevance():
    # 4 groups of 5 items: the future stays inside the group of the trigger's index, relevance inside that of its index by fives
    items = np.arange(20)
    engaged, relevant = items % 4, items // 5
    judge = TaxonomyJudge(codes=relevant[:, None].astype(np.int32), level_grades=[1.0])
    future = csr_array((engaged[:, None] == engaged) & (items[:, None] != items), dtype=np.float64)
    likely = np.array([[j for j in items if engaged[j] == engaged[i] and j != i] for i in items])
    alike = np.array([[j for j in items if relevant[j] == relevant[i] and j != i] for i in items])
    ideal = ideal_grades(judge, items, np.ones(20, bool), k=4)
    shared = (engaged[alike] == engaged[:, None]).mean(axis=1)  # one in four of the relevant items, for those at the edge of a group
    for lists, recall, relevance in ((likely, np.ones(20), shared), (alike, shared, np.ones(20))):
        judged = judged_lists(judge, items, lists)
        assert recall_at_k(lists, future, k=4) == pytest.approx(recall)
        assert relevance_at_k(lists, judged, k=4) == pytest.approx(relevance)
    assert set(shared) == {0, 0.25}
    assert rel_ndcg_at_k(judged_lists(judge, items, alike), ideal) == pytest.approx(np.ones(20))
    # the front of the two lists: all of one axis with the shared part of the other
    front = np.array([[1.0, shared.mean()], [shared.mean(), 1.0]])
    assert hypervolume(front) == pytest.approx(2 * shared.mean() - shared.mean() ** 2)


def test_rel_ndcg_by_hand():
    judged = np.array([[0.5, 1.0, NAN], [1.0, 0.5, 0.0], [NAN, NAN, NAN], [0.0, 0.0, 0.0]])
    ideal = np.array([[1.0, 0.5], [1.0, 0.5], [1.0, 1.0], [0.0, 0.0]])
    best = 1 + 0.5 / np.log2(3)
    assert rel_ndcg_at_k(judged, ideal) == pytest.approx([(0.5 + 1 / np.log2(3)) / best, 1, 0, NAN], nan_ok=True)
    assert rel_ndcg_at_k(judged[:, :1], ideal)[:2] == pytest.approx([0.5 / best, 1 / best])  # a short list lacks the second position


@pytest.mark.parametrize("cells_at_once", [1, 70, 4_000_000])
def test_ideal_grades_against_loops(monkeypatch, cells_at_once):
    monkeypatch.setattr(metrics, "_CELLS_AT_ONCE", cells_at_once)
    rng = np.random.default_rng(1)
    judge = PairJudge.from_pairs(rng.integers(0, 30, 200), rng.integers(0, 30, 200), rng.random(200), num_items=30)
    triggers, eligible = np.array([*range(30), 30, 35]), rng.random(30) < 0.6
    ideal = ideal_grades(judge, triggers, eligible, k=8)
    for trigger, found in zip(triggers.tolist(), ideal, strict=True):
        others = np.array([item for item in range(30) if eligible[item] and item != trigger])
        grades = sorted(judge.grades(np.full(len(others), trigger), others), reverse=True)[:8]
        assert found == pytest.approx(grades, abs=1e-7)
    assert not ideal[30:].any()  # the judge does not know these triggers
    most = ideal_grades(judge, triggers, eligible, k=40)
    assert (most[:, :8] == ideal).all()
    assert not most[:, eligible.sum() :].any()
    assert not ideal_grades(judge, triggers, np.zeros(30, bool), k=3).any()
    best = np.array([[item for item in np.argsort(-row) if eligible[item]][:8] for row in judge.rows(triggers[:30])])
    ndcg = rel_ndcg_at_k(judged_lists(judge, triggers[:30], best), ideal[:30])
    assert (ndcg[~np.isnan(ndcg)] == 1).all()
    worse = rel_ndcg_at_k(judged_lists(judge, triggers[:30], best[:, ::-1]), ideal[:30])
    assert (worse[~np.isnan(worse)] < 1).all()


def test_tail_by_hand():
    assert tail_items(np.array([1, 5, 3, 1, 0])).tolist() == [True, False, False, True, True]  # 5 + 3 hold exactly 0.8
    assert tail_items(np.array([1, 5, 3, 1, 0]), share=0.81).tolist() == [False, False, False, True, True]
    assert tail_items(np.array([0.1, 0.7, 0.1, 0.1]), share=0.8).tolist() == [False, False, True, True]  # despite rounding
    assert tail_items(np.array([4, 2]), share=1.0).tolist() == [False, False]
    assert tail_items(np.zeros(2)).all()
    assert tail_items(np.empty(0)).shape == (0,)
    tail = np.array([True, False, False, True, True])
    lists = np.array([[0, 1, 3], [4, -1, -1], [-1, -1, -1]])
    assert tail_share_at_k(lists, tail, k=2) == pytest.approx([0.5, 1, NAN], nan_ok=True)
    assert tail_share_at_k(lists, tail, k=3) == pytest.approx([2 / 3, 1, NAN], nan_ok=True)
    assert np.isnan(tail_share_at_k(lists[2:], np.empty(0, bool), k=3)).all()


@pytest.mark.parametrize("cells_at_once", [1, 300, 4_000_000])
def test_diversity_against_loops(monkeypatch, cells_at_once):
    monkeypatch.setattr(metrics, "_CELLS_AT_ONCE", cells_at_once)
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(30, 6)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[[3, 29]] = 0  # no content
    lists = np.array([rng.permutation(30)[:8] for _ in range(40)])
    lists[rng.random(lists.shape) < 0.3] = -1
    lists[0], lists[1, 1:], lists[2] = -1, -1, [0, 3, 29, -1, 1, -1, -1, -1]
    for row, value in zip(lists, intra_list_diversity_at_k(lists, vectors, k=5), strict=True):
        used = [item for item in row[:5] if item not in (-1, 3, 29)]
        cosines = [vectors[a] @ vectors[b] for place, a in enumerate(used) for b in used[:place]]
        assert value == pytest.approx(1 - np.mean(cosines) if cosines else NAN, abs=1e-6, nan_ok=True)
    same, across = np.array([[0, 1, 2]]), np.array([[0, 3, -1]])
    corners = np.array([[1, 0], [1, 0], [1, 0], [0, 1]])
    assert intra_list_diversity_at_k(same, corners, k=3).tolist() == [0]
    assert intra_list_diversity_at_k(across, corners, k=3).tolist() == [1]


def test_overlap_by_hand():
    a, b = np.array([[1, 2, 3], [1, 2, 3], [-1, -1, -1]]), np.array([[3, 1, 2], [1, 4, 5], [-1, -1, -1]])
    assert overlap_at_k(a, b, k=3) == pytest.approx([1, 1 / 5, 1])
    assert overlap_at_k(a, b, k=2) == pytest.approx([1 / 3, 1 / 3, 1])


def test_slices_of_the_future_by_hand():
    known = csr_array(([1, 1, 0, 5, 1], ([0, 0, 0, 1, 2], [0, 1, 3, 2, 1])), shape=(3, 4))  # a stored 0 is not known, item 4 came later
    assert new_pairs(FUTURE, known).toarray().tolist() == [[0, 0, 0, 1, 4], [0, 0, 0, 0, 2], [0] * 5]
    assert targets_in(FUTURE, np.array([False, True, True, False, False])).toarray().tolist() == [[0, 3, 0, 0, 0], [0, 0, 2, 0, 0], [0] * 5]
    wider = csr_array(([1.0], ([1], [8])), shape=(3, 9))
    assert (new_pairs(FUTURE, wider) != FUTURE).nnz == 0
    assert FUTURE.sum() == 12  # the caller's matrix is left alone
    with pytest.raises(ValueError, match="found 2 rows of pairs against 3"):
        new_pairs(FUTURE, known[:2])
    with pytest.raises(ValueError, match=r"found a mask \(4,\) for a future of 5 items"):
        targets_in(FUTURE, np.ones(4, bool))


def test_slices_hold_their_cells_of_the_future():
    rng = np.random.default_rng(0)
    dense, seen = rng.integers(0, 3, (20, 30)), rng.random((20, 25)) < 0.4
    future, known = csr_array(dense), csr_array(seen.astype(np.int8))
    padded = np.pad(seen, ((0, 0), (0, 5)))
    new = new_pairs(future, known)
    assert (new.toarray() == np.where(padded, 0, dense)).all()
    group = rng.random(30) < 0.5
    inside = targets_in(future, group)
    assert (inside.toarray() == np.where(group, dense, 0)).all()
    for part in (new, inside):
        assert part.nnz == np.count_nonzero(part.toarray())


@pytest.mark.parametrize(("mixtures", "area"), [(False, 1 * 3 + 1 * 2.5 + 2 * 1), (True, 1 * 3 + 2.75 + 2 * 1.75)])
def test_hypervolume_by_hand(mixtures, area):
    front, of = np.array([[1.0, 3.0], [2.0, 2.5], [4.0, 1.0]]), partial(hypervolume, mixtures=mixtures)
    assert of(front) == area
    assert of(front[[2, 0, 1]]) == area
    assert of(np.concatenate([front, [[1.0, 1.0], [2.0, 1.5], [0.5, 3.0]], front[:1]])) == area  # dominated, and one twice
    assert (of(np.concatenate([front, [[3.0, 1.7]]])) == area) == mixtures  # dominated by a mixture alone
    assert of(np.concatenate([front, [[9.0, -1.0], [-1.0, 9.0], [-2.0, -2.0]]])) == area  # not above the reference
    assert of(front[:1], reference=(-1.0, 0.0)) == 2 * 3
    assert of(np.empty((0, 2))) == 0
    assert np.isnan(of(np.array([[1.0, NAN]])))
    assert of(front, reference=(1.0, 1.0)) == 1.5


def test_hypervolume_against_a_grid_and_a_hull():
    rng = np.random.default_rng(0)
    centers = (np.arange(200) + 0.5) / 200
    for num_points in (1, 2, 5, 12):
        points = rng.integers(0, 201, (num_points, 2)) / 200  # on the lines of the grid, so that counting cells is exact
        covered = ((centers[:, None, None] < points[:, 0]) & (centers[None, :, None] < points[:, 1])).any(axis=2)
        assert hypervolume(points) == pytest.approx(covered.mean())
        corners = [[0, 0], [points[:, 0].max(), 0], [0, points[:, 1].max()]]
        assert hypervolume(points, mixtures=True) == pytest.approx(ConvexHull(np.concatenate([points, corners])).volume)


def test_with_mixtures_a_family_gains_nothing_by_finer_steps():
    coarse, fine = (np.stack([np.linspace(0.15, 0.05, num), np.linspace(0.1, 0.4, num)], axis=1) for num in (7, 14))
    assert hypervolume(fine) > 1.02 * hypervolume(coarse)
    assert hypervolume(fine, mixtures=True) == pytest.approx(hypervolume(coarse, mixtures=True))


def families(rng, num_triggers=300, num_settings=6):
    """Recall falls as relevance rises along the settings; a third of the triggers have no future, a few no relevance either."""
    recall = np.linspace(0.4, 0.2, num_settings) + rng.normal(0, 0.1, (num_triggers, 1)) + rng.normal(0, 0.02, (num_triggers, num_settings))
    relevance = np.linspace(0.1, 0.5, num_settings) + rng.normal(0, 0.1, (num_triggers, 1))
    recall[: num_triggers // 3] = NAN
    relevance[:5] = NAN
    return recall, relevance


def test_hypervolume_bootstrap_against_loops():
    rng = np.random.default_rng(7)
    x, y = families(rng)
    found = bootstrap_hypervolume(x, y, num_resamples=1_000, seed=1)
    assert found.value == pytest.approx(hypervolume(np.stack([np.nanmean(x, axis=0), np.nanmean(y, axis=0)], axis=1)))
    assert found.num_triggers == 295
    areas = []
    for _ in range(1_000):
        drawn = rng.integers(5, 300, 295)
        areas.append(hypervolume(np.stack([np.nanmean(x[drawn], axis=0), np.nanmean(y[drawn], axis=0)], axis=1)))
    assert (found.low, found.high) == pytest.approx(np.quantile(areas, [0.025, 0.975]), abs=0.002)
    assert found.low < found.value < found.high
    assert found.high - found.low > 0.01
    assert bootstrap_hypervolume(x, y, num_resamples=1_000, seed=1) == found
    assert bootstrap_hypervolume(x, y, num_resamples=1_000, seed=2) != found
    assert bootstrap_hypervolume(x, y, num_resamples=100, seed=1, reference=(0.2, 0.1)).value < found.value


def test_hypervolume_without_values_is_not_a_number():
    empty = np.full((4, 2), NAN)
    assert bootstrap_hypervolume(empty, empty, num_resamples=10, seed=0).num_triggers == 0
    half = bootstrap_hypervolume(empty, np.ones((4, 2)), num_resamples=10, seed=0)
    assert np.isnan([half.value, half.low, half.high]).all()
    # resamples that happen to draw no trigger with a value on x are left out
    rare = bootstrap_hypervolume(np.array([[1.0], [NAN]]), np.ones((2, 1)), num_resamples=50, seed=0)
    assert (rare.value, rare.low, rare.high) == (1, 1, 1)


def test_paired_hypervolume():
    rng = np.random.default_rng(5)
    x, y = families(rng)
    equal = paired_hypervolume(x, y, x.copy(), y.copy(), num_resamples=200, seed=1)
    assert (equal.value, equal.low, equal.high) == (0, 0, 0)
    gain = paired_hypervolume(x + 0.01, y, x, y, num_resamples=500, seed=1)
    alone = [bootstrap_hypervolume(a, y, num_resamples=500, seed=1) for a in (x + 0.01, x)]
    assert gain.value == pytest.approx(alone[0].value - alone[1].value)
    assert 0 < gain.low < gain.value < gain.high
    assert alone[0].low < alone[1].high  # pairing tells what two intervals do not
    assert gain == paired_hypervolume(x + 0.01, y, x, y, num_resamples=500, seed=1)
    fewer = paired_hypervolume(x, y, x[:, ::2], y[:, ::2], num_resamples=100, seed=1)  # more settings on one front: never less area
    assert fewer.low >= 0
    with pytest.raises(ValueError, match="wanted the same triggers"):
        paired_hypervolume(x, y, x[1:], y[1:], num_resamples=10, seed=0)
    with pytest.raises(ValueError, match="wanted the same triggers"):
        bootstrap_hypervolume(x, y[:, 1:], num_resamples=10, seed=0)


def test_resampling_in_blocks_draws_the_same(monkeypatch):
    x, y = families(np.random.default_rng(5), num_triggers=30)
    whole = bootstrap_hypervolume(x, y, num_resamples=100, seed=1)
    monkeypatch.setattr(metrics, "_RESAMPLES_AT_ONCE", 250)
    blocks = bootstrap_hypervolume(x, y, num_resamples=100, seed=1)
    assert (blocks.value, blocks.low, blocks.high) == pytest.approx((whole.value, whole.low, whole.high))
