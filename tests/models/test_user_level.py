"""User-level co-engagement against loops, and as files."""

from pathlib import Path

import numpy as np
from scipy.sparse import csr_array

from models.user_level import UserLevel

USERS = csr_array((np.random.default_rng(4).random((30, 12)) < 0.3).astype(np.float32))
TRIGGERS = np.array([3, 0, 11, 7], np.int32)


def plain_rows(users: np.ndarray, triggers: np.ndarray, min_users: int) -> np.ndarray:
    out = np.zeros((len(triggers), users.shape[1]))
    for row, trigger in enumerate(triggers):
        for item in set(range(users.shape[1])) - {int(trigger)}:
            both = (users[:, trigger] > 0) & (users[:, item] > 0)
            if both.sum() >= min_users:
                out[row, item] = (1 / users[both].sum(axis=1)).sum()
    return out


def test_rows_against_loops_below_and_above_the_minimum_of_users() -> None:
    for min_users in (1, 2, 4):
        rows, num_users = UserLevel.of(USERS, min_users=min_users).rows_and_users(TRIGGERS)
        np.testing.assert_allclose(rows.toarray(), plain_rows(USERS.toarray(), TRIGGERS, min_users), rtol=1e-6)
        assert rows.has_sorted_indices
        both = (USERS.T @ USERS).toarray()[TRIGGERS]
        both[np.arange(len(TRIGGERS)), TRIGGERS] = 0
        assert num_users.tolist() == [int(num) for row in both for num in row if num >= min_users]
        assert (rows.data > 0).all(), "a pair below the minimum leaves no cell"


def test_saved_and_mapped_rows_are_the_same(tmp_path: Path) -> None:
    made = UserLevel.of(USERS, min_users=3)
    made.save(tmp_path)
    opened = UserLevel.open(tmp_path)
    np.testing.assert_array_equal(opened.rows(TRIGGERS).toarray(), made.rows(TRIGGERS).toarray())
    assert opened.rows(TRIGGERS[:0]).shape == (0, 12)


def test_a_world_without_users() -> None:
    nobody = UserLevel.of(csr_array((0, 5), dtype=np.float32), min_users=2)
    assert not nobody.rows(np.array([0, 4], np.int32)).nnz
