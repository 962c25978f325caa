import numpy as np
import pytest
from scipy.sparse import csr_array

from models.metrics import (
    bootstrap,
    churn_at_k,
    coverage_at_k,
    debiased_recall_at_k,
    gini_at_k,
    in_degrees,
    paired_difference,
    recall_at_k,
    relevance_at_k,
)

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
