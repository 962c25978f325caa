"""Lists against a plain loop over every item, in a world of known neighbors, and the contract that every list keeps."""

import hashlib
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from scipy.sparse import csr_array

from conf.errors import TableError, TrainingError
from conf.settings import MOST_HEADS, LimitSettings, RetrievalSettings
from models.data import TRENDS
from models.eligibility import FilterColumn, FilterColumns
from models.factorization import log_popularity
from models.kept import KeptCandidates
from models.list_rows import ARROW_SCHEMA
from models.merge import Policies, read_policies
from models.neighbors import Counted, NeighborLists, Retriever, build_index
from models.scorer import FEATURES, Scorer, candidate_features, log_softmax
from models.user_level import UserLevel

NIGHT = date(2024, 3, 31)
BLEND = {"scope": "default", "kind": "blend", "value": 0.02, "popularity_exponent": 0.3, "new_pair_bonus": 0.5, "new_item_bonus": 0.7}
QUOTA = {"scope": "default", "kind": "quota", "value": 0.4, "popularity_exponent": 0.0}
SHARED = BLEND | {"relevance_share": 0.25}
SETTINGS = RetrievalSettings(
    list_length=8,
    num_candidates_counts=5,
    num_candidates_users=4,
    num_candidates_head=12,
    num_candidates_content=10,
    num_candidates_popular=3,
    block_size=16,
)


def unit(vectors):
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)


def with_bias(vectors, bias):
    return np.column_stack([vectors, np.broadcast_to(bias, len(vectors))]).astype(np.float32)


@dataclass
class World:
    """Random items, some blank, some ineligible, and if `alike` some with equal content or popularity."""

    num_items: int = 70
    num_levels: int = 2
    alike: bool = True
    seed: int = 0
    arrays: dict = field(default_factory=dict)

    def __post_init__(self):
        n, rng = self.num_items, np.random.default_rng(self.seed)
        content = rng.standard_normal((n, 6))
        popularity = rng.pareto(1, n) * 4 + 1e-3
        if self.alike:
            content[n // 2 : n // 2 + 6] = content[1]
            popularity = np.round(popularity)
        content[rng.random(n) < 0.1] = 0
        popularity[rng.choice(n, n // 6)] = 0
        spectral = rng.standard_normal((2, n, 5)) * (popularity > 0)[:, None]
        relevance = unit(np.column_stack([content, spectral[0]]))
        coarse = rng.integers(-1, 3, n)
        codes = np.column_stack([coarse, np.where((coarse >= 0) & (rng.random(n) < 0.7), coarse * 2 + rng.integers(0, 2, n), -1)])
        bias = 0.5 * log_popularity(popularity.astype(np.float32))
        self.arrays = {
            "item_ids": [f"i{item:03d}" for item in range(n)],
            "head_vectors": {
                "engagement": (with_bias(spectral[0], 1), with_bias(unit(spectral[1]), bias)),
                "relevance": (with_bias(relevance, 1), with_bias(relevance, 0)),
                "purchase": (with_bias(rng.standard_normal((n, 3)), 1), with_bias(rng.standard_normal((n, 3)), bias)),
            },
            "content": unit(content),
            "popularity_p": popularity.astype(np.float32),
            "eligible": rng.random(n) < 0.8,
            "new": popularity < 3,
            "trends": rng.standard_normal((n, len(TRENDS))).astype(np.float32),
            "user_level": UserLevel.of(csr_array(self.draw_users(rng)), min_users=2),
            "category_codes": codes[:, : self.num_levels].astype(np.int32),
            "tags": FilterColumn.rarest([list("abcdefgh"[item % 5 : item % 5 + 3]) if item % 7 else None for item in range(n)], 8),
            "category_names": [f"category {code}" for code in range(9)],
            "filters": FilterColumns.encode({}, coarsest=[None if code < 0 else f"category {code}" for code in coarse], as_of=NIGHT),
        }
        self.weight = np.where(rng.random((n, n)) < 0.15, rng.exponential(1, (n, n)), 0).astype(np.float32)
        self.weight[: n // 8] = 0  # some items have no pairs
        np.fill_diagonal(self.weight, 0)

    def draw_users(self, rng):
        """(40, N) 1 where a user engaged with an item."""
        self.users = (rng.random((40, self.num_items)) < 0.12).astype(np.float32)
        return self.users

    def users_of_both(self, trigger):
        """Distinct users by item, where they are at least two."""
        both = (self.users[:, [trigger]] * self.users).sum(axis=0)
        return {item: int(num) for item, num in enumerate(both) if num >= 2 and item != trigger}

    def counted(self, triggers):
        rows = [np.flatnonzero(self.weight[trigger])[::-1] for trigger in triggers]  # order inside a row must not matter
        indptr = np.cumsum([0, *map(len, rows)])
        target = np.concatenate([*rows, np.zeros(0, int)]).astype(np.int32)
        weight = np.concatenate(
            [self.weight[trigger, row] for trigger, row in zip(triggers, rows, strict=True)] or [np.zeros(0, np.float32)]
        )
        return Counted(indptr=indptr, target=target, weight=weight, num_user_days=np.ceil(weight * 3).astype(np.int64))

    def open(self, folder, scorer=None, **changed):
        file = None
        if scorer is not None:
            file = folder / "fitted.json"
            scorer.save(file)
        arrays = {**self.arrays, "settings": SETTINGS, **changed}
        build_index(folder / "index", **arrays, scorer_file=file)
        return Retriever.open(folder / "index")

    def retrieve(self, retriever, policy=BLEND, settings=SETTINGS, triggers=None):
        triggers = np.arange(self.num_items, dtype=np.int32) if triggers is None else np.asarray(triggers, np.int32)
        policies = Policies.for_triggers(read_policies([policy]), [None] * len(triggers))
        return retriever.retrieve(triggers, self.counted(triggers), policies, settings=settings)


def a_scorer():
    rng = np.random.default_rng(9)
    draw = {"linear": len(FEATURES), "hidden": (len(FEATURES), 4), "hidden_bias": 4, "output": 4}
    one = np.ones(len(FEATURES), np.float32)
    return Scorer(mean=one, scale=2 * one, **{name: rng.normal(0, 0.5, size).astype(np.float32) for name, size in draw.items()})


def rows_of(lists: NeighborLists, head: str):
    """Per trigger, its neighbors as dictionaries."""
    table = lists.heads[head]
    names = ("neighbor", "score", "sources", "num_user_days", "num_users", "relevance", "filled", "shared_depth")
    columns = {name: getattr(table, name).tolist() for name in names}
    columns["sources"] = [{name for bit, name in enumerate(lists.source_names) if mask >> bit & 1} for mask in columns["sources"]]
    flat = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return [flat[a:b] for a, b in zip(table.offsets, table.offsets[1:], strict=False)]


def test_an_index_that_is_written_anew_leaves_its_readers_what_they_have(tmp_path):
    """They have its files mapped: written over in place, these would change or end under them."""
    world, other = World(num_items=60, seed=1), World(num_items=30, seed=2)
    retriever = world.open(tmp_path, a_scorer())
    wanted = [rows_of(world.retrieve(retriever), head) for head in ("engagement", "merged")]
    again = other.open(tmp_path, a_scorer())
    assert [rows_of(world.retrieve(retriever), head) for head in ("engagement", "merged")] == wanted
    assert len(again.item_ids) == 30
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["index"]


# --- against a loop over everything ---


def best(scores, allowed, k):
    """Plain ranking: score descending, then index."""
    return sorted(np.flatnonzero(allowed).tolist(), key=lambda item: (-scores[item], item))[:k]


def plain_lists(world, trigger, scorer, policy, settings):
    """One trigger's lists by brute force: ids and scores per head, with a blend policy."""
    a = world.arrays
    scores = {name: np.einsum("ij,j->i", target, source[trigger]) for name, (source, target) in a["head_vectors"].items()}
    cosine = np.einsum("ij,j->i", a["content"], a["content"][trigger])
    counts, others = world.weight[trigger], np.arange(world.num_items) != trigger
    users = a["user_level"].rows(np.array([trigger], np.int32)).toarray()[0]
    allowed = a["eligible"] & others
    described = a["content"].any(axis=1)
    informed = described | (a["popularity_p"] > 0)
    log_p = log_popularity(a["popularity_p"])
    width = settings.num_candidates_head
    counted = set(best(counts, allowed & (counts > 0), settings.num_candidates_counts))
    known = set(best(users, allowed & (users > 0), settings.num_candidates_users))
    # FAISS returns one more than asked for, in case the trigger is among them
    found = {name: set(best(scores[name], a["eligible"], width + 1)) - {trigger} for name in ("engagement", "purchase")}
    found["relevance"] = set(best(scores["relevance"], a["eligible"] & informed, width + 1) if informed[trigger] else []) - {trigger}
    near = set(best(cosine, a["eligible"] & described, settings.num_candidates_content + 1) if described[trigger] else []) - {trigger}
    popular = set(best(log_p, a["eligible"], settings.num_candidates_popular)) - {trigger}
    pool = np.array(sorted(counted.union(known, near, popular, *found.values())))
    segment = np.zeros(len(pool), np.int32)
    features = candidate_features(
        head_log_p=log_softmax(scores["engagement"][pool], segment),
        count=counts[pool],
        count_row_sum=np.full(len(pool), counts.sum()),
        user_level=users[pool],
        user_level_row_sum=np.full(len(pool), users.sum()),
        popularity_p=np.exp(log_p[pool]),
        trends=a["trends"][pool],
        trigger_log_age=np.full(len(pool), a["trends"][trigger, -1]),
    )
    probability = np.zeros(world.num_items)
    probability[pool] = np.exp(scorer.log_probability(features, segment))
    lists, ordered_by = {}, scores | {"engagement": probability}
    for name, own in found.items():
        own = own | ({item for item in pool if counts[item] > 0} if name != "relevance" else set())
        own = set(pool.tolist()) if name == "engagement" else own
        order = best(ordered_by[name], np.isin(np.arange(world.num_items), list(own)), settings.list_length)
        lists[name] = (order, ordered_by[name][order])
    p = probability[pool] / np.exp(log_p[pool]) ** policy["popularity_exponent"]
    p *= np.where(counts[pool] > 0, 1, np.exp(policy["new_pair_bonus"])) * np.where(a["new"][pool], np.exp(policy["new_item_bonus"]), 1)
    value = p / p.sum() + policy["value"] * np.maximum(scores["relevance"][pool], 0)
    dense, relevant = np.zeros(world.num_items), np.zeros(world.num_items)
    dense[pool], relevant[pool] = value, scores["relevance"][pool] + np.log(p / p.sum()) / 80
    by_score, by_relevance = (
        best(key, np.isin(np.arange(world.num_items), list(some)), settings.list_length)
        for key, some in ((dense, pool), (relevant, found["relevance"]))
    )
    slot, share = {}, policy.get("relevance_share", 0.0)
    for place in range(1, 2 * settings.list_length + 1):  # each takes the first place that one of its ranks gives it
        turn = by_relevance if int(place * share + 1e-6) > int((place - 1) * share + 1e-6) else by_score
        rank = int(place * share + 1e-6) - 1 if turn is by_relevance else place - int(place * share + 1e-6) - 1
        slot |= {turn[rank]: place} if rank < len(turn) and turn[rank] not in slot else {}
    order = sorted(slot, key=slot.get)[: settings.list_length]
    return lists | {"merged": (order, dense[order])}


@pytest.mark.parametrize("policy", [BLEND, SHARED], ids=["blend", "share"])
@pytest.mark.parametrize("scorer", [None, a_scorer()], ids=["mixture", "fitted"])
def test_every_list_against_brute_force(tmp_path, scorer, policy):
    world = World(alike=False)  # where a search ends amid equals, which of them it returns is FAISS's choice
    lists = world.retrieve(world.open(tmp_path, scorer), policy)
    heads = {name: rows_of(lists, name) for name in lists.heads}
    for trigger in range(world.num_items):
        wanted = plain_lists(world, trigger, scorer or Scorer.mixture(), policy, SETTINGS)
        for name, (order, scores) in wanted.items():
            found = heads[name][trigger]
            assert [row["neighbor"] for row in found] == order, (name, trigger)
            assert [row["score"] for row in found] == pytest.approx(scores, rel=1e-4, abs=1e-6)


def test_equal_vectors_tie_by_index(tmp_path):
    # BLAS may round equal rows differently by their place in a matrix
    world = World(alike=False)
    rng = np.random.default_rng(8)
    same = {
        name: (rng.standard_normal((70, 131)).astype(np.float32), np.tile(rng.standard_normal(131), (70, 1)).astype(np.float32))
        for name in ("engagement", "relevance", "purchase")
    }
    everyone = {"head_vectors": same, "eligible": np.ones(70, bool)}
    lists = world.retrieve(world.open(tmp_path, **everyone), settings=SETTINGS.model_copy(update={"num_candidates_head": 70}))
    for trigger, found in enumerate(rows_of(lists, "purchase")):
        assert [row["neighbor"] for row in found] == [item for item in range(9) if item != trigger][:8]


# --- a world whose answers are known ---


def test_bundles_and_categories(tmp_path):
    # item (bundle, category) is engaged with inside its bundle; content and category tell the category alone
    num_bundles, num_categories = 6, 4
    bundle, category = np.divmod(np.arange(num_bundles * num_categories), num_categories)
    same_bundle, same_category = bundle[:, None] == bundle, category[:, None] == category
    by_bundle, by_category = np.eye(num_bundles)[bundle], np.eye(num_categories, dtype=np.float32)[category]
    world = World(num_items=len(bundle))
    world.weight = (5.0 * (same_bundle & ~np.eye(len(bundle), dtype=bool))).astype(np.float32)
    changed = {
        "head_vectors": {
            "engagement": (with_bias(5 * by_bundle, 1), with_bias(by_bundle, 0)),
            "relevance": (with_bias(by_category, 1), with_bias(by_category, 0)),
        },
        "content": by_category,
        "popularity_p": np.ones(len(bundle)),
        "eligible": np.ones(len(bundle), bool),
        "category_codes": category[:, None].astype(np.int32),
    }
    retriever = world.open(tmp_path, **changed)
    settings = SETTINGS.model_copy(update={"list_length": 8, "num_candidates_head": 20})
    for policy, first in ((BLEND | {"value": 0.0, "popularity_exponent": 0.0}, same_bundle), (BLEND | {"value": 9.0}, same_category)):
        lists = world.retrieve(retriever, policy, settings)
        for name, partners in (("engagement", same_bundle), ("relevance", same_category), ("merged", first)):
            for trigger, found in enumerate(rows_of(lists, name)):
                wanted = set(np.flatnonzero(partners[trigger]).tolist()) - {trigger}
                assert {row["neighbor"] for row in found[: len(wanted)]} == wanted, (name, trigger)
    of_first = {row["neighbor"]: row for row in rows_of(lists, "engagement")[0]}
    assert of_first[1]["num_user_days"] == 15
    assert {"counts", "engagement"} <= of_first[1]["sources"]
    assert (of_first[1]["shared_depth"], of_first[4]["shared_depth"]) == (0, 1)
    assert (of_first[1]["relevance"], of_first[4]["relevance"]) == (0.0, 1.0)


# --- what every list keeps, whatever the head, policy and settings ---


@pytest.mark.parametrize("policy", [BLEND, QUOTA, SHARED], ids=["blend", "quota", "share"])
@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS,
        RetrievalSettings(
            list_length=8, num_candidates_counts=1, num_candidates_head=1, num_candidates_content=0, num_candidates_popular=0
        ),
        RetrievalSettings(list_length=100, block_size=7),  # longer than the catalog
    ],
    ids=["usual", "narrow", "longer than the catalog"],
)
def test_retrieval_contract(tmp_path, policy, settings):
    world = World(seed=3)
    retriever = world.open(tmp_path, settings=settings)
    lists = world.retrieve(retriever, policy, settings)
    eligible, codes = world.arrays["eligible"], world.arrays["category_codes"]
    assert list(lists.heads) == ["engagement", "relevance", "purchase", "merged"]
    for name in lists.heads:
        for trigger, found in enumerate(rows_of(lists, name)):
            neighbors = [row["neighbor"] for row in found]
            assert trigger not in neighbors
            assert eligible[neighbors].all()
            assert len(set(neighbors)) == len(neighbors) <= settings.list_length
            if not (name == "merged" and policy in (QUOTA, SHARED)):
                assert neighbors == sorted(neighbors, key=lambda item: (-found[neighbors.index(item)]["score"], item))
            if name == "merged":
                assert len(neighbors) == min(settings.list_length, eligible.sum() - eligible[trigger]), "merged lists are full"
            for row in found:
                weight, other = world.weight[trigger, row["neighbor"]], row["neighbor"]
                assert row["num_user_days"] == np.ceil(weight * 3)
                assert row["sources"]
                assert not row["filled"] or name == "merged"
                assert -1 <= row["relevance"] <= 1
                equal = [a == b >= 0 for a, b in zip(codes[trigger], codes[other], strict=True)]
                assert row["shared_depth"] == (2 if all(equal) else int(equal[0]))
    at_once = world.retrieve(retriever, policy, settings.model_copy(update={"block_size": 1000}))
    assert retriever.to_arrow(at_once).equals(retriever.to_arrow(lists)), "lists depend on the block size"


# --- corners ---


def test_lists_under_several_policies_are_those_of_each(tmp_path):
    world = World(seed=4)
    retriever = world.open(tmp_path)
    rows = [BLEND, QUOTA, SHARED, BLEND | {"value": 0.0}]
    policies = [read_policies([row])["default"] for row in rows]
    trigger = np.arange(world.num_items, dtype=np.int32)
    swept = retriever.merge_under(trigger, world.counted(trigger), policies, settings=SETTINGS)
    for row, found in zip(rows, swept, strict=True):
        alone = world.retrieve(retriever, row, SETTINGS).heads["merged"]
        np.testing.assert_array_equal(found.neighbor, alone.neighbor)
        np.testing.assert_array_equal(found.offsets, alone.offsets)
        np.testing.assert_allclose(found.score, alone.score)


@pytest.mark.parametrize("narrow", [False, True])
def test_merging_again_from_what_was_kept_gives_the_lists_of_a_retrieval(tmp_path, narrow):
    limits = [LimitSettings(by="category", at_most=2)]
    few = {"num_candidates_counts": 1, "num_candidates_head": 1, "num_candidates_content": 0, "limits": limits, "list_length": 30}
    settings, world = SETTINGS.model_copy(update=few if narrow else {}), World(seed=4)
    retriever, trigger = world.open(tmp_path), np.arange(world.num_items, dtype=np.int32)
    before = read_policies([BLEND])
    lists = retriever.retrieve(trigger, world.counted(trigger), retriever.policies_for(before, trigger), settings=settings, keep=True)
    for kept in lists.kept:
        kept.save(tmp_path)
    files = sorted(tmp_path.glob("*.arrow"))
    assert len(files) == -(-world.num_items // settings.block_size)
    for row in (QUOTA, SHARED, BLEND | {"value": 1.0}, QUOTA | {"kind": "rrf"}):
        policies, wanted = read_policies([row]), world.retrieve(retriever, row, settings)
        again = []
        for file in files:
            kept = KeptCandidates.open(file)
            again.append(retriever.remerge(kept, retriever.policies_for(policies, kept.trigger), settings=settings))
        assert [name for part in again for name in part.heads] == ["merged"] * len(files)
        found = [batch for part in again for batch in retriever.to_arrow(part).to_pylist()]
        assert found == [batch for batch in retriever.to_arrow(wanted).to_pylist() if batch["head"] == "merged"]


def test_blank_items(tmp_path):
    world = World()
    # nothing is known of item 5; a trained encoder may give it any vector all the same. Of item 6 only its history is known.
    for item, popularity in ((5, 0), (6, 4)):
        world.arrays["content"][item], world.arrays["popularity_p"][item], world.arrays["eligible"][item] = 0, popularity, True
        world.weight[item], world.weight[:, item] = 0, 0
    lists = world.retrieve(world.open(tmp_path), settings=SETTINGS.model_copy(update={"list_length": 100}))
    relevance = rows_of(lists, "relevance")
    assert relevance[5] == []
    assert all(row["neighbor"] != 5 for found in relevance for row in found)
    assert relevance[6]
    assert rows_of(lists, "engagement")[5]
    assert rows_of(lists, "merged")[5]


def test_short_lists_are_filled_by_category_then_popularity(tmp_path):
    world = World(seed=3)
    narrow = RetrievalSettings(
        list_length=30,
        num_candidates_counts=1,
        num_candidates_users=0,
        num_candidates_head=1,
        num_candidates_content=0,
        num_candidates_popular=0,
    )
    eligible = world.arrays["eligible"]
    retriever = world.open(tmp_path)
    blind = {name: replace(head, flat=replace(head.flat, items=head.flat.items[:0])) for name, head in retriever.heads.items()}
    retriever = replace(retriever, heads=blind)  # no search finds anything: one counted pair is all there is
    lists = rows_of(world.retrieve(retriever, settings=narrow), "merged")
    coarse, popularity = world.arrays["category_codes"][:, 0], log_popularity(world.arrays["popularity_p"])
    for trigger, found in enumerate(lists):
        counted, filled = [row for row in found if not row["filled"]], [row for row in found if row["filled"]]
        assert [row["sources"] for row in counted] in ([], [{"counts"}])
        taken = {row["neighbor"] for row in counted} | {trigger}
        rest = [item for item in best(popularity, eligible, 99) if item not in taken]
        same = [item for item in rest if coarse[item] == coarse[trigger] >= 0]
        wanted = [(item, "category") for item in same] + [(item, "popularity") for item in rest if item not in same]
        assert [(row["neighbor"], *row["sources"]) for row in filled] == wanted[: 30 - len(counted)]
        assert {row["score"] for row in filled} == {0.0}


@pytest.mark.parametrize(
    "changed",
    [
        {"eligible": np.zeros(70, bool)},
        {"content": np.zeros((70, 6), np.float32)},
        {"content": np.zeros((70, 0), np.float32)},
        {"category_codes": np.zeros((70, 0), np.int32)},
        {"popularity_p": np.zeros(70)},
    ],
    ids=["nothing eligible", "no content", "no content dimensions", "no category levels", "no engagement"],
)
def test_catalogs_that_lack_something(tmp_path, changed):
    world = World()
    retriever = world.open(tmp_path, **changed)
    for policy in (BLEND, QUOTA, SHARED):
        lists = world.retrieve(retriever, policy)
        lengths = np.diff(lists.heads["merged"].offsets)
        assert (lengths == (0 if "eligible" in changed else 8)).all()
    assert retriever.to_arrow(world.retrieve(retriever, triggers=[])).num_rows == 0


def test_candidates_kept_by_older_code_are_refused(tmp_path):
    flat = pa.StructArray.from_arrays([pa.array([1], pa.int32())], names=["item"])
    lists = pa.LargeListArray.from_arrays(pa.array([0, 1], pa.int64()), flat)
    batch = pa.record_batch([pa.array([0], pa.int32()), lists, lists], names=["trigger", "candidates", "counted"])
    with pa.OSFile(str(tmp_path / "000000000.arrow"), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    with pytest.raises(TableError, match=r"lack \['log_p', 'num_users', 'relevance', 'sources'\].*run the night again"):
        KeptCandidates.open(tmp_path / "000000000.arrow")


def test_two_items(tmp_path):
    world = World(num_items=2)
    world.weight[:] = 0
    retriever = world.open(tmp_path, eligible=np.array([True, True]))
    assert [[row["neighbor"] for row in found] for found in rows_of(world.retrieve(retriever), "merged")] == [[1], [0]]


def test_what_found_a_neighbor_is_a_bit_also_with_the_most_heads(tmp_path):
    retriever = World().open(tmp_path)
    assert len(retriever.source_names) - len(retriever.heads) + MOST_HEADS <= np.iinfo(np.uint16).bits  # as kept candidates are written


def test_arrow_rows(tmp_path):
    world = World()
    all_tags = [tag for item in range(70) for tag in ("abcdefgh"[item % 5 : item % 5 + 3] if item % 7 else "")]

    def tags_of(item):
        """The rarest first."""
        return sorted("abcdefgh"[item % 5 : item % 5 + 3] if item % 7 else "", key=lambda tag: (all_tags.count(tag), tag))

    retriever = world.open(tmp_path)
    lists = world.retrieve(retriever, triggers=[9, 40])
    known = {f"i{trigger:03d}": world.users_of_both(trigger) for trigger in (9, 40)}
    batch = retriever.to_arrow(lists)
    assert batch.schema == ARROW_SCHEMA
    batch.validate(full=True)
    rows = batch.to_pylist()
    assert [(row["item_id"], row["head"]) for row in rows[:3]] == [("i009", "engagement"), ("i040", "engagement"), ("i009", "relevance")]
    for row, found in zip(rows[-2:], rows_of(lists, "merged"), strict=True):
        codes = world.arrays["category_codes"][int(row["item_id"][1:])]
        for neighbor, one in zip(row["neighbors"], found, strict=True):
            depth = one.pop("shared_depth")
            users, days = one.pop("num_users"), one["num_user_days"]
            assert users == (0 if one["filled"] else known[row["item_id"]].get(one["neighbor"], 0))
            often = f", together on {days} user-days" if days else ""
            reason = [f"{users} users engaged with both{often}" if users else f"engaged with both{often}"] if users or days else []
            reason += [f"same category {codes[depth - 1]}"] if depth else []
            shared = [tag for tag in tags_of(int(row["item_id"][1:])) if tag in tags_of(one["neighbor"])]
            reason += ["both " + ", ".join(shared[:2])] if shared else []
            by = ", ".join(name for name in lists.source_names if name in one["sources"])
            reason.append("fills up the list" if one["filled"] else f"found by {by}")
            assert neighbor.pop("reason") == "; ".join(reason)
            assert neighbor | {"sources": set(neighbor["sources"])} == {"neighbor_id": f"i{one.pop('neighbor'):03d}"} | one
        ids = "\x1f".join(neighbor["neighbor_id"] for neighbor in row["neighbors"])
        assert row["list_hash"] == hashlib.sha1(ids.encode()).hexdigest()
    assert pa.types.is_list(batch.schema.field("neighbors").type)


def test_a_bad_index_is_refused(tmp_path: Path):
    world = World()
    vectors = world.arrays["head_vectors"]
    broken = vectors["relevance"][1].copy()
    broken[3, 2] = np.nan
    for changed, message in (
        ({"head_vectors": {"engagement": vectors["engagement"]}}, r"heads \['relevance'\] are missing"),
        ({"content": world.arrays["content"][1:]}, "content holds 69 rows, wanted one for each of the 70 items"),
        (
            {"head_vectors": vectors | {"relevance": (vectors["relevance"][0], broken)}},
            "target vectors of head relevance holds numbers that",
        ),
    ):
        with pytest.raises(TrainingError, match=message):
            world.open(tmp_path, **changed)
