from functools import partial

import numpy as np
import pytest
from scipy.sparse import csr_array

from models.baselines import content_lists, count_lists, popularity_lists

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
    monkeypatch.setattr("models.baselines._CELLS_AT_ONCE", 100)  # two or three triggers at once
    assert (content_lists(triggers, content=content, eligible=eligible, k=5) == whole).all()
    cosine = np.where(eligible & ~np.eye(50, dtype=bool), content @ content.T, -np.inf)
    assert (whole == np.argsort(-cosine, axis=1, kind="stable")[:, :5]).all()
