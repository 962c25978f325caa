"""Kept libraries on two clusters of items that no user crosses; the last item is new."""

import sys

import numpy as np
import pytest
from scipy.sparse import csr_array

from conf.errors import MachineError
from models.external import als_lists, als_vectors, item2vec_lists, item2vec_vectors

NUM_ITEMS = 13  # 0..5, 6..11 and the new one
TRIGGERS = np.array([0, 7, 12, 13], np.int32)  # 12 has no user, 13 was not known yet
ELIGIBLE = np.arange(NUM_ITEMS) != 3


def sessions() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [(6 * (user % 2) + rng.permutation(6)[:4]).tolist() for user in range(200)]


def user_items() -> csr_array:
    rows = np.zeros((200, NUM_ITEMS), np.float32)
    for user, items in enumerate(sessions()):
        rows[user, items] = 1
    return csr_array(rows)


def als(k: int = 4) -> np.ndarray:
    pytest.importorskip("implicit")
    return als_lists(TRIGGERS, user_items=user_items(), eligible=ELIGIBLE, k=k, factors=4, seed=3)


def item2vec(k: int = 4) -> np.ndarray:
    pytest.importorskip("gensim")
    return item2vec_lists(TRIGGERS, sequences=sessions(), eligible=ELIGIBLE, k=k, dimension=16, num_epochs=150, seed=3)


@pytest.mark.parametrize("lists_of", [als, item2vec])
def test_neighbors_stay_in_the_cluster(lists_of):
    lists = lists_of()
    assert (lists.shape, lists.dtype) == ((4, 4), np.int32)
    assert set(lists[0].tolist()) == {1, 2, 4, 5}  # 3 is ineligible
    assert set(lists[1].tolist()) < {6, 8, 9, 10, 11}
    assert (lists[2:] == -1).all()
    assert (lists_of() == lists).all(), "the same seed gives the same lists"
    longer = lists_of(k=20)
    assert (longer[:, :4] == lists).all()
    assert (longer[:2, 11:] == -1).all()
    assert not np.isin(longer, [3, 12]).any()
    assert 0 not in longer[0]
    assert 7 not in longer[1]


def test_vectors_are_of_unit_length_or_nothing():
    pytest.importorskip("implicit")
    pytest.importorskip("gensim")
    by_als = als_vectors(user_items(), factors=4, seed=3, num_threads=2)
    by_word = item2vec_vectors(sessions(), num_items=NUM_ITEMS, dimension=16, window=5, num_epochs=2, seed=3)
    for vectors in (by_als, by_word):
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [1] * 12 + [0], rtol=1e-5)
    assert not item2vec_vectors([[], []], num_items=3, dimension=16, window=5, num_epochs=2, seed=3).any()


@pytest.mark.parametrize(("module", "package", "lists_of"), [("implicit.als", "implicit", als), ("gensim.models", "gensim", item2vec)])
def test_a_missing_library_is_named(module, package, lists_of, monkeypatch):
    monkeypatch.setattr("pytest.importorskip", lambda name: None)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MachineError, match=f"pip install {package}"):
        lists_of()
