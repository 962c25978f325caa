"""Draws that belong to items: uniform, independent of each other, and the same whatever else is in the catalog."""

import numpy as np

from models.draws import choose, item_keys, normal, uniform

KEYS = item_keys(f"item {number}" for number in range(20_000))


def test_numbers_are_uniform_normal_and_unrelated() -> None:
    drawn = [uniform(KEYS, *purpose) for purpose in ((1,), (2,), (1, 0), (0, 1))]
    for number, values in enumerate(drawn):
        assert 0 <= values.min() < values.max() < 1
        counts = np.histogram(values, bins=20, range=(0, 1))[0]
        assert np.abs(counts - 1000).max() < 150  # five standard deviations
        assert all(abs(np.corrcoef(values, other)[0, 1]) < 0.04 for other in drawn[:number])
    block = normal(KEYS, 6, seed=3)
    np.testing.assert_allclose(block.T @ block / len(KEYS), np.eye(6), atol=0.05)
    assert len(np.unique(KEYS)) == len(KEYS)


def test_another_item_changes_nobody_elses_draw() -> None:
    without = np.delete(KEYS, 7_000)
    np.testing.assert_array_equal(uniform(without, 5, 6), np.delete(uniform(KEYS, 5, 6), 7_000))
    few = [set(keys[choose(keys, 300, 9)].tolist()) for keys in (KEYS, without)]
    assert [len(chosen) for chosen in few] == [300, 300]
    assert len(few[0] ^ few[1]) in (0, 2)
    places = choose(KEYS, 300, 9)
    assert (np.diff(places) > 0).all()
    assert choose(KEYS[:5], 9, 1).tolist() == [0, 1, 2, 3, 4]


def test_every_item_is_chosen_equally_often() -> None:
    times = np.zeros(50)
    for step in range(2_000):
        times[choose(KEYS[:50], 10, 1, step)] += 1
    assert np.abs(times - 400).max() < 90  # five standard deviations
