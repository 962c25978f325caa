"""Filters and limits against a loop over every item: lists hold the best of what they may, and are full when there is enough."""

from collections import Counter
from datetime import date, timedelta

import numpy as np
import pytest

from conf.settings import FilterSettings, LimitSettings, RetrievalSettings
from models.eligibility import FilterColumns, Rules
from models.merge import read_policies
from models.neighbors import Retriever
from models.search import ItemIndex
from tests.models.test_neighbors import BLEND, NIGHT, QUOTA, SETTINGS, SHARED, World, rows_of

NARROW = SETTINGS.model_copy(update={"num_candidates_head": 8, "num_candidates_content": 4})
FILTERS = {
    "in stock": FilterSettings(column="stock", rule="any_of", values=["yes", "soon"], missing=False),
    "not hidden": FilterSettings(column="flags", rule="none_of", values=["hidden"], heads=["relevance", "merged"]),
    "released": FilterSettings(column="released", rule="released"),
    "same market": FilterSettings(column="market", rule="shared", missing=False),
    "same market or none": FilterSettings(column="market", rule="shared"),
    "no variants": FilterSettings(column="parent", rule="different"),
    "toys stay among toys": FilterSettings(
        column="kind", rule="any_of", values=["toy"], scopes=["category 0", "market=fr"], heads=["merged"]
    ),
}
LIMITS = {
    "two of a brand": LimitSettings(by="brand", at_most=2),
    "one of a category": LimitSettings(by="category", at_most=1, heads=["merged", "relevance"]),
}


def values_of(num_items):
    """Per column, each item's values."""
    rng = np.random.default_rng(11)

    def some(names, most=1, missing=0.2):
        counts = np.where(rng.random(num_items) < missing, 0, rng.integers(1, most + 1, num_items))
        return [list(rng.choice(names, count, replace=False)) or None for count in counts]

    days = [str(NIGHT + timedelta(days=int(shift))) for shift in (-9, 0, 1, 30)]
    return {
        "stock": some(["yes", "soon", "no"]),
        "flags": some(["new", "hidden", "sale"], most=3),
        "released": some([*days, f"{NIGHT} 23:00:00", "20240101", "some day"]),
        "market": some(["de", "fr", "at"], most=2),
        "parent": some([f"p{n}" for n in range(num_items // 3)]),
        "kind": some(["toy", "book"]),
        "brand": some([f"b{n}" for n in range(12)]),
    }


def world_of(tmp_path, settings):
    world = World(alike=False, num_items=120)
    rng = np.random.default_rng(5)
    for side in world.arrays["head_vectors"].values():  # no ties: where a search ends amid equals, FAISS chooses
        for vectors in side:
            vectors[:, :-1] += rng.normal(0, 1e-3, vectors[:, :-1].shape)
    values = values_of(world.num_items)
    codes = world.arrays["category_codes"][:, 0]
    coarsest = [None if code < 0 else f"category {code}" for code in codes]
    filters = FilterColumns.encode(values, coarsest=coarsest, as_of=NIGHT)
    eligible = world.arrays["eligible"] & filters.everywhere(settings.filters)
    world.arrays |= {"filters": filters, "eligible": eligible}
    return world, values, coarsest, world.open(tmp_path)


def passes(rule, values, coarsest, trigger, item):
    """One filter by its words."""
    mine, theirs = set(values[rule.column][trigger] or ()), set(values[rule.column][item] or ())
    ruled = [scope == coarsest[trigger] or scope.partition("=")[2] in (values["market"][trigger] or ()) for scope in rule.scopes]
    if rule.scopes and not any(ruled):
        return True
    if rule.rule == "different":
        return not mine & theirs
    if not theirs or (rule.rule == "shared" and not mine):
        return rule.missing
    if rule.rule == "released":
        return any(value.startswith("2024-") and date.fromisoformat(value[:10]) <= NIGHT for value in theirs)
    return {"any_of": bool(theirs & set(rule.values)), "none_of": not theirs & set(rule.values), "shared": bool(mine & theirs)}[rule.rule]


def kind_of(limit, world, values, item):
    if limit.by != "category":
        return (values[limit.by][item] or [None])[0]
    path = [code for code in world.arrays["category_codes"][item] if code >= 0]
    return path[-1] if path else None


def within(limits, head, order, world, values, k):
    """Greedy: the next best item unless there are enough of its kind."""
    kept, seen = [], Counter()
    for item in order:
        kinds = [(limit, kind_of(limit, world, values, item)) for limit in limits if not limit.heads or head in limit.heads]
        if all(kind is None or seen[limit.by, kind] < limit.at_most for limit, kind in kinds) and len(kept) < k:
            kept.append(item)
            seen.update((limit.by, kind) for limit, kind in kinds)
    return kept


CASES = [([name], []) for name in FILTERS] + [([], [name]) for name in LIMITS]
CASES += [(["in stock", "same market", "no variants"], ["two of a brand"]), (["released", "toys stay among toys"], ["one of a category"])]


@pytest.mark.parametrize("policy", [BLEND, QUOTA, SHARED], ids=["blend", "quota", "share"])
@pytest.mark.parametrize(("filters", "limits"), CASES, ids=[" and ".join(a + b) for a, b in CASES])
def test_lists_hold_the_best_that_they_may_and_are_full(tmp_path, filters, limits, policy):
    filters, limits = [FILTERS[name] for name in filters], [LIMITS[name] for name in limits]
    settings = NARROW.model_copy(update={"filters": filters, "limits": limits})
    world, values, coarsest, retriever = world_of(tmp_path, settings)
    lists = world.retrieve(retriever, policy, settings)
    catalog = World(alike=False, num_items=120).arrays["eligible"]  # what the index was told before any filter
    informed = world.arrays["content"].any(axis=1) | (world.arrays["popularity_p"] > 0)
    found = {head: rows_of(lists, head) for head in lists.heads}
    refused = 0
    for trigger in range(world.num_items):
        others = [item for item in np.flatnonzero(catalog).tolist() if item != trigger]
        allowed = dict.fromkeys(found, others)
        for rule in filters:
            passing = {item for item in others if passes(rule, values, coarsest, trigger, item)}
            allowed |= {head: [item for item in allowed[head] if item in passing] for head in rule.heads or found}
        refused += catalog.sum() - len(allowed["merged"])
        for head in ("relevance", "purchase"):  # ordered by one product of vectors
            source, target = world.arrays["head_vectors"][head]
            scores = np.einsum("ij,j->i", target, source[trigger])
            known = [item for item in allowed[head] if head != "relevance" or (informed[item] and informed[trigger])]
            order = sorted(known, key=lambda item, scores=scores: (-scores[item], item))
            assert [row["neighbor"] for row in found[head][trigger]] == within(limits, head, order, world, values, 8), (head, trigger)
        rules, eligible = retriever.rules(settings), np.flatnonzero(retriever.eligible).astype(np.int32)
        for head in ("engagement", "merged"):  # ordered by the scorer and the policy
            listed = [row["neighbor"] for row in found[head][trigger]]
            assert set(listed) <= set(allowed[head])
            assert within(limits, head, listed, world, values, 99) == listed, "more of a kind than the limit"
            possible = within(limits, head, allowed[head], world, values, 99)
            assert len(listed) == min(8, len(possible)), "full, as far as there are enough"
            assert rules.num_possible(head, trigger, eligible) == len(possible)
    assert refused > world.num_items or limits
    at_once = world.retrieve(retriever, policy, settings.model_copy(update={"block_size": 1000}))
    assert retriever.to_arrow(at_once).equals(retriever.to_arrow(lists)), "lists depend on the block size"


def test_a_search_widens_until_lists_are_full(tmp_path):
    # of 120 items two in the trigger's own market: neither the usual nor the wider search reaches them
    world = World(alike=False, num_items=120)
    markets = [["rare"] if item in (0, 60, 119) else ["usual"] for item in range(120)]
    world.arrays["filters"] = FilterColumns.encode({"market": markets}, coarsest=[None] * 120, as_of=NIGHT)
    world.arrays["eligible"] = np.ones(120, bool)
    settings = RetrievalSettings(list_length=2, num_candidates_head=2, filters=[FILTERS["same market"]])
    lists = world.retrieve(world.open(tmp_path), settings=settings)
    for head in ("engagement", "purchase", "merged"):
        for trigger, others in ((0, {60, 119}), (60, {0, 119}), (119, {0, 60})):
            assert {row["neighbor"] for row in rows_of(lists, head)[trigger]} == others


@pytest.mark.parametrize("name", ["same market", "same market or none", "toys", "one of a kind"])
def test_few_that_may_be_offered_are_found_without_a_look_at_everything(tmp_path, monkeypatch, name):
    # of 400 items 9 in the trigger's own market, or one of each of 5 kinds: no list can be full
    world = World(alike=False, num_items=400)
    rng = np.random.default_rng(3)
    markets = [["rare"] if item % 50 == 0 else ["usual"] for item in range(400)]
    markets[7] = None
    values = {"market": markets, "kind": [[f"kind {n}"] for n in rng.integers(0, 5, 400)]}
    world.arrays["filters"] = FilterColumns.encode(values, coarsest=[None] * 400, as_of=NIGHT)
    world.arrays["eligible"] = np.ones(400, bool)
    rule = {"toys": FilterSettings(column="market", rule="any_of", values=["rare"], missing=True, heads=["merged", "relevance"])}
    filters = [] if name == "one of a kind" else [(FILTERS | rule)[name]]
    limits = [LimitSettings(by="kind", at_most=1)] if name == "one of a kind" else []
    settings = SETTINGS.model_copy(update={"filters": filters, "limits": limits, "list_length": 12})
    retriever, triggers = world.open(tmp_path), [0, 50, 350]
    counts = []
    whole = Rules.admit
    monkeypatch.setattr(
        Rules, "admit", lambda self, head, trigger, listed, item: counts.append(len(item)) or whole(self, head, trigger, listed, item)
    )
    widths = []
    search = ItemIndex.search
    monkeypatch.setattr(ItemIndex, "search", lambda self, queries, k: widths.append(k) or search(self, queries, k))
    lists = world.retrieve(retriever, settings=settings, triggers=triggers)
    rules, eligible = retriever.rules(settings), np.arange(400, dtype=np.int32)
    for row, trigger in enumerate(triggers):
        possible = whole(rules, "merged", trigger, eligible[:0], eligible[eligible != trigger])
        assert len(possible) <= 9
        assert rules.num_possible("merged", trigger, eligible) == len(possible)
        found = [neighbor["neighbor"] for neighbor in rows_of(lists, "merged")[row]]
        assert len(found) == len(possible)
        assert set(found) == set(possible.tolist()) or limits
    assert max(widths) <= 4 * max(SETTINGS.num_candidates_head, 12)
    assert max(counts) < 200 or limits


def test_scopes_of_policies_by_market_and_category(tmp_path):
    world = World(num_items=6)
    columns = {"market": [["de"], ["fr"], None, ["fr", "de"], ["it"], None]}
    coarsest = ["toys", "toys", "toys", None, "books", None]
    filters = FilterColumns.encode(columns, coarsest=coarsest, as_of=NIGHT)
    retriever: Retriever = world.open(tmp_path, filters=filters)
    rows = [BLEND | {"scope": scope, "value": value} for scope, value in (("toys", 1), ("market=de", 2), ("market=fr", 3), ("default", 4))]
    chosen = retriever.policies_for(read_policies(rows), np.arange(6, dtype=np.int32))
    assert chosen.value.tolist() == [2, 3, 1, 2, 4, 4]  # a market goes before a category; of two markets the row that comes first
