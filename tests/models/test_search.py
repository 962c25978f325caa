"""IVF against exact search: accepted at the recall that was asked for, given up below it, and never a shorter list."""

import numpy as np
import pytest

from conf.settings import RetrievalSettings
from models.neighbors import Retriever
from models.search import ItemIndex, estimate_search, write_index
from tests.models.test_eligibility import FILTERS, values_of
from tests.models.test_neighbors import BLEND, NIGHT, SETTINGS, FilterColumns, World, rows_of


def grouped(num_items, dimension, spread, seed=0):
    """Unit vectors around 60 centers."""
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((60, dimension))
    vectors = centers[rng.integers(0, 60, num_items)] + spread * rng.standard_normal((num_items, dimension))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def settings(**changed):
    return RetrievalSettings(list_length=20, search="ivf", **changed)


def test_an_accepted_index_reaches_the_recall_on_other_queries(tmp_path):
    vectors, items = grouped(6000, 24, 0.4), np.arange(10_000, 16_000, dtype=np.int32)
    whole = np.vstack([np.ones((10_000, 24), np.float32), vectors])  # of items that may not be found, too
    report = write_index(tmp_path, "head", whole, items, queries=vectors[:300], settings=settings())
    assert (report.method, report.recall >= 0.98, 8 <= report.effort <= 77) == ("ivf", True, True)
    opened, queries = ItemIndex.open(tmp_path, "head"), vectors[3000:3400]
    found = opened.search(queries, 20)
    exact = items[np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :20]]
    assert np.mean([len(set(a) & set(b)) / 20 for a, b in zip(found.tolist(), exact.tolist(), strict=True)]) > 0.95
    everything = opened.search(queries[:2], 6000)
    assert all(sorted(row) == items.tolist() for row in everything.tolist())
    # more than the probed groups hold: the search looks everywhere
    wide = opened.search(queries[:50], 3000)
    assert (wide >= 0).all()
    assert not opened.search(np.zeros((1, 24), np.float32), 5)[0].max() >= 0


def test_effort_rises_and_then_the_search_is_exact(tmp_path):
    vectors, items = grouped(3000, 32, 9.0), np.arange(3000, dtype=np.int32)  # no groups to speak of
    low = write_index(tmp_path, "low", vectors, items, queries=vectors[:200], settings=settings(min_search_recall=0.3))
    assert low.method == "ivf"
    report = write_index(tmp_path, "high", vectors, items, queries=vectors[:200], settings=settings(min_search_recall=0.999))
    assert (report.method, report.effort) == ("exact", 0)
    assert low.recall <= report.recall < 0.999
    assert str(report) == f"exact, as IVF reached recall {report.recall:.4f} only"
    exact = np.argsort(-(vectors[:40] @ vectors.T), axis=1, kind="stable")[:, :20]
    np.testing.assert_array_equal(ItemIndex.open(tmp_path, "high").search(vectors[:40], 20), exact)


def test_the_choice_is_counted_not_timed():
    auto = RetrievalSettings()
    small, large = (estimate_search(n, n, 128, num_cores=2, settings=auto) for n in (20_000, 1_000_000))
    assert (small.chosen, large.chosen) == ("exact", "ivf")
    assert large.exact_seconds > 8 * large.ivf_seconds / 2
    assert large.ivf_mb < 2 * large.exact_mb
    assert "1,000,000 items: exact about" in str(large)
    assert estimate_search(1_000_000, 1_000_000, 128, num_cores=2, settings=RetrievalSettings(search="exact")).chosen == "exact"


@pytest.mark.parametrize("filtered", [False, True])
def test_lists_by_ivf_are_those_by_exact_search_where_every_group_is_probed(tmp_path, filtered):
    world = World(alike=False, num_items=120)
    filters = [FILTERS["same market"], FILTERS["no variants"]] if filtered else []
    world.arrays["filters"] = FilterColumns.encode(values_of(120), coarsest=[None] * 120, as_of=NIGHT)
    lists = {}
    for name, asked in (("exact", SETTINGS), ("ivf", SETTINGS.model_copy(update={"search": "ivf", "min_search_recall": 0.9}))):
        (tmp_path / name).mkdir()
        retriever: Retriever = world.open(tmp_path / name, settings=asked)
        found = world.retrieve(retriever, BLEND, asked.model_copy(update={"filters": filters}))
        lists[name] = {head: rows_of(found, head) for head in found.heads}
    for head, exact in lists["exact"].items():
        shared = [len({r["neighbor"] for r in a} & {r["neighbor"] for r in b}) for a, b in zip(exact, lists["ivf"][head], strict=True)]
        assert sum(shared) >= 0.9 * sum(map(len, exact))
        assert list(map(len, exact)) == list(map(len, lists["ivf"][head])), "as full as by exact search"
