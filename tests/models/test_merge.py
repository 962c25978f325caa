from itertools import pairwise

import numpy as np
import pytest

from conf.errors import SettingsError
from models.merge import CandidateSet, FillOrder, Policies, Policy, merge_candidates, read_policies
from models.ranking import best_per_row, best_per_segment, ends


def row(scope="default", kind="blend", value=0.0, popularity_exponent=0.0, relevance_share=None, new_pair_bonus=None, new_item_bonus=None):
    return {
        "scope": scope,
        "kind": kind,
        "value": value,
        "popularity_exponent": popularity_exponent,
        "relevance_share": relevance_share,
        "new_pair_bonus": new_pair_bonus,
        "new_item_bonus": new_item_bonus,
    }


def candidates(*triggers, new=(), uncounted=()):
    """Each trigger: rows of (p, relevance, popularity, found by the relevance head); positions in the flat list of new items, and of those
    that have no counted pair.
    """
    columns = np.array([candidate for trigger in triggers for candidate in trigger], dtype=np.float32).reshape(-1, 4).T
    return CandidateSet(
        offsets=ends(np.array([len(trigger) for trigger in triggers])),
        log_p=np.log(columns[0]),
        relevance=columns[1],
        log_popularity=np.log(columns[2]),
        found_by_relevance=columns[3] > 0,
        counted=~np.isin(np.arange(columns.shape[1]), uncounted),
        new=np.isin(np.arange(columns.shape[1]), new),
    )


def merged(candidate_set, *rows, coarsest=None, k):
    """Per trigger: positions within its candidates, scores, filled."""
    num_triggers = len(candidate_set.offsets) - 1
    policies = Policies.for_triggers(read_policies(rows), coarsest or [None] * num_triggers)
    out = merge_candidates(candidate_set, policies, k=k)
    parts = [slice(*out.offsets[b : b + 2]) for b in range(num_triggers)]
    return [
        ((out.position[part] - candidate_set.offsets[b]).tolist(), out.score[part].tolist(), out.filled[part].tolist())
        for b, part in enumerate(parts)
    ]


FOUR = [(0.4, 0.0, 0.4, 1), (0.3, -0.9, 0.4, 1), (0.2, 0.5, 0.1, 1), (0.1, 1.0, 0.1, 1)]


@pytest.mark.parametrize(
    ("value", "exponent", "order", "scores"),
    [
        (0.0, 0.0, [0, 1, 2, 3], [0.4, 0.3, 0.2, 0.1]),  # probability alone
        (0.5, 0.0, [3, 2, 0, 1], [0.6, 0.45, 0.4, 0.3]),  # a negative relevance costs nothing
        # p / popularity = 1, .75, 2, 1, which sum to 4.75; 0 and 3 tie and fall by position
        (0.0, 1.0, [2, 0, 3, 1], [2 / 4.75, 1 / 4.75, 1 / 4.75, 0.75 / 4.75]),
    ],
)
def test_blend_by_hand(value, exponent, order, scores):
    positions, found, filled = merged(candidates(FOUR), row(value=value, popularity_exponent=exponent), k=4)[0]
    assert positions == order
    assert found == pytest.approx(scores, rel=1e-5)
    assert not any(filled)


# engagement order 0..9; relevance order 9, 8, 7, ... of those that its head found
TEN = [((10 - n) / 55, n / 10, 0.1, 1) for n in range(10)]


def found_by_relevance(*which):
    return [(p, r, pop, float(n in which)) for n, (p, r, pop, _) in enumerate(TEN)]


@pytest.mark.parametrize(
    ("trigger", "share", "k", "order", "filled"),
    [
        (TEN, 0.5, 6, [0, 9, 1, 8, 2, 7], []),  # every second position is relevance's
        (TEN, 0.3, 7, [0, 1, 2, 9, 3, 4, 8], []),  # floor(.3 t): positions 4 and 7
        (TEN, 0.0, 3, [0, 1, 2], []),
        (TEN, 1.0, 3, [9, 8, 7], []),
        # no repeats: 0 stands first for engagement and second for relevance; 2 moves up from position 5, and is no filling
        (found_by_relevance(0, 9), 0.5, 4, [0, 9, 1, 2], []),
        # relevance found one item only: 0, 1 and 2 hold engagement's positions 1, 3 and 5, so 3 and 4 come from beyond 6
        (found_by_relevance(9), 0.5, 6, [0, 9, 1, 2, 3, 4], [3, 4]),
        (found_by_relevance(), 1.0, 3, [0, 1, 2], [0, 1, 2]),  # relevance found nothing at all
    ],
)
def test_quota_by_hand(trigger, share, k, order, filled):
    positions, scores, flags = merged(candidates(trigger), row(kind="quota", value=share), k=k)[0]
    assert positions == order
    assert [position for position, flag in zip(positions, flags, strict=True) if flag] == filled
    assert scores == pytest.approx([TEN[n][0] for n in order])  # the probability, whatever the order


@pytest.mark.parametrize(
    ("trigger", "value", "share", "k", "order"),
    [
        (TEN, 0.0, 0.5, 6, [0, 9, 1, 8, 2, 7]),  # as a quota of the same share
        (TEN, 9.0, 0.5, 6, [9, 8, 7, 6, 5, 4]),  # both orders are the same
        # p + .02 r = (10 - n) / 55 + n / 500: 0, 1, 2, ...; every third position is of 9 and 8
        (TEN, 0.02, 1 / 3, 7, [0, 1, 9, 2, 3, 8, 4]),
        (found_by_relevance(), 0.02, 0.5, 3, [0, 1, 2]),  # relevance found nothing: all places are the blend's
    ],
)
def test_a_blend_leaves_a_share_of_the_positions_to_relevance(trigger, value, share, k, order):
    positions, scores, filled = merged(candidates(trigger), row(value=value, relevance_share=share), k=k)[0]
    assert positions == order
    assert scores == pytest.approx([TEN[n][0] + value * TEN[n][1] for n in order])
    assert not any(filled)


def test_a_fusion_leaves_a_share_too_and_rows_do_not_mix():
    shared, plain = row("toys", "rrf", 0.0, relevance_share=0.5), row("books", "rrf", 0.0)
    lists = merged(candidates(TEN, TEN, TEN), row(), shared, plain, coarsest=["toys", "books", None], k=4)
    assert [positions for positions, _, _ in lists] == [[0, 9, 1, 8], [0, 1, 2, 3], [0, 1, 2, 3]]


def test_of_what_is_about_as_relevant_the_likelier_comes_first_in_a_share():
    # p .4 .3 .2 .1; log p / 80 is -.011, -.015, -.020, -.029: it decides between 1 and 2, and not between 2 and 3
    trigger = [(0.4, 0.0, 0.1, 0), (0.3, 0.500, 0.1, 1), (0.2, 0.504, 0.1, 1), (0.1, 0.520, 0.1, 1)]
    shared, quota = row(relevance_share=1.0), row(kind="quota", value=1.0)
    assert merged(candidates(trigger), shared, k=3)[0][0] == [3, 1, 2]
    assert merged(candidates(trigger), quota, k=3)[0][0] == [3, 2, 1], "a quota is relevance's order as it is"
    discounted = [(p, r, {0.3: 1.0}.get(p, 0.1), f) for p, r, _, f in trigger]
    assert merged(candidates(discounted), shared | {"popularity_exponent": 1.0}, k=3)[0][0] == [3, 2, 1], "p as the policy wants it"


def test_triggers_of_one_block_keep_their_own_policies():
    rows = [row(), row("toys", relevance_share=0.5), row("books", "quota", 0.5), row("games", "rrf", 0.0, relevance_share=0.5)]
    names = ["games", "toys", None, "books", "toys"]
    together = merged(candidates(*[TEN] * 5, new=(3, 25), uncounted=(14,)), *rows, coarsest=names, k=6)
    for position, name in enumerate(names):
        alone = [n for n, other in enumerate(names) if other == name]
        some = candidates(*[TEN] * 5, new=(3, 25), uncounted=(14,))
        apart = merged(some, *rows, coarsest=[name if n in alone else None for n in range(5)], k=6)
        assert together[position] == apart[position], name
    assert together[1][0] == together[0][0] == [0, 9, 1, 8, 2, 7]


def test_a_policy_reads_as_it_was_written():
    policy = Policy(kind="blend", value=0.01, popularity_exponent=0.3, relevance_share=0.1, new_pair_bonus=0.3, new_item_bonus=1.5)
    assert Policies.same(policy, 3).of(1) == policy


@pytest.mark.parametrize(
    ("policy", "order", "scores"),
    [
        # .4 .3 .2 .1, the last two twice as likely as before: divided by 1.3
        (row(new_pair_bonus=np.log(2)), [0, 2, 1, 3], [0.4 / 1.3, 0.4 / 1.3, 0.3 / 1.3, 0.2 / 1.3]),
        (row(new_pair_bonus=np.log(8)), [2, 3, 0, 1], [1.6 / 3.1, 0.8 / 3.1, 0.4 / 3.1, 0.3 / 3.1]),
        (row(new_pair_bonus=10), [2, 3, 0, 1], None),  # all new pairs before all others
        # of 1, .75, 2 and 1 (see above) the last two doubled, which sum to 7.75
        (row(popularity_exponent=1.0, new_pair_bonus=np.log(2)), [2, 3, 0, 1], [4 / 7.75, 2 / 7.75, 1 / 7.75, 0.75 / 7.75]),
        (row(kind="quota", value=0.5, new_pair_bonus=np.log(8)), [2, 3, 0, 1], None),
        (row(new_item_bonus=np.log(6)), [3, 0, 1, 2], [0.6 / 1.5, 0.4 / 1.5, 0.3 / 1.5, 0.2 / 1.5]),  # only the last is new
        (row(new_pair_bonus=np.log(2), new_item_bonus=np.log(3)), [3, 0, 2, 1], [0.6 / 1.7, 0.4 / 1.7, 0.4 / 1.7, 0.3 / 1.7]),
    ],
)
def test_new_pairs_and_new_items_are_raised_by_hand(policy, order, scores):
    positions, found, _ = merged(candidates(FOUR, uncounted=(2, 3), new=(3,)), policy, k=4)[0]
    assert positions == order
    assert scores is None or found == pytest.approx(scores)
    unraised = policy | {"new_pair_bonus": 0.0, "new_item_bonus": 0.0}
    (raised, before), (plain, after) = (merged(candidates(FOUR), row, k=4)[0][:2] for row in (policy, unraised))
    assert (raised, before) == (plain, pytest.approx(after)), "where all is known there is nothing to raise"


def test_a_table_of_an_earlier_release_has_no_share_and_no_bonus():
    old = row(value=2)
    del old["relevance_share"], old["new_pair_bonus"], old["new_item_bonus"]
    assert read_policies([old]) == {"default": Policy(kind="blend", value=2, popularity_exponent=0.0)}


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_rank_fusion_against_a_plain_loop(share):
    rng = np.random.default_rng(4)
    triggers = [
        [(p, r, 0.1, f) for p, r, f in zip(rng.random(n), rng.normal(size=n), rng.random(n) < 0.6, strict=True)] for n in (9, 0, 30)
    ]
    for trigger, (positions, scores, filled) in zip(
        triggers, merged(candidates(*triggers), row(kind="rrf", value=share), k=5), strict=True
    ):
        found = [n for n in range(len(trigger)) if trigger[n][3]]
        by_p = sorted(range(len(trigger)), key=lambda n: -trigger[n][0])
        by_relevance = sorted(found, key=lambda n: -trigger[n][1])
        fused = {
            n: (1 - share) / (61 + by_p.index(n)) + (share / (61 + by_relevance.index(n)) if n in found else 0) for n in range(len(trigger))
        }
        assert positions == sorted(fused, key=lambda n: -fused[n])[:5]
        assert scores == pytest.approx([trigger[n][0] for n in positions])
        assert not any(filled)


def test_policies_by_category_of_the_trigger():
    rows = (row(), row("toys", "quota", 1.0), row("books", "blend", 0.5))
    lists = merged(candidates(TEN, TEN, TEN, [], TEN), *rows, coarsest=[None, "toys", "books", "toys", "garden"], k=2)
    assert [positions for positions, _, _ in lists] == [[0, 1], [9, 8], [9, 8], [], [0, 1]]
    assert lists[1][1] == pytest.approx([1 / 55, 2 / 55])
    assert lists[2][1] == pytest.approx([1 / 55 + 0.45, 2 / 55 + 0.4])  # as a quota of .5 it would be 0, 9


def test_bad_policies_are_named_together():
    rows = [
        row("toys", "mix"),
        row("books", "quota", 1.5),
        row("games", value=float("nan"), popularity_exponent=2),
        row("toys"),
        row("bikes", relevance_share=-0.1),
        row("boats", new_item_bonus=11),
        row("trains", new_pair_bonus=-0.1),
        row("pens", "quota", 0.2, relevance_share=0.1),
    ]
    with pytest.raises(SettingsError) as raised:
        read_policies(rows)
    for text in (
        "row scope='toys': unknown kind 'mix'; wanted one of ['blend', 'quota', 'rrf']",
        "row scope='books': value 1.5 of kind quota; wanted a number from 0 to 1",
        "row scope='games': value nan",
        "row scope='games': popularity_exponent 2",
        "row scope='toys': found twice",
        "row scope='bikes': relevance_share -0.1",
        "row scope='boats': new_item_bonus 11; wanted a number from 0 to 10",
        "row scope='trains': new_pair_bonus -0.1; wanted a number from 0 to 10",
        "row scope='pens': relevance_share 0.1 of kind quota",
        "no row of scope 'default'",
    ):
        assert text in str(raised.value)
    assert read_policies([row(value=2)]) == {"default": Policy(kind="blend", value=2, popularity_exponent=0.0)}


def test_fill_takes_the_category_then_the_popular():
    # items 0..5; 3 is ineligible; categories a: 0, 1, 2, 3, b: 4, none: 5
    order = FillOrder.build(
        np.array([1, 2, 3, 9, 8, 7], np.float32), np.array([1, 1, 1, 0, 1, 1], np.bool_), np.array([0, 0, 0, 0, 1, -1], np.int32)
    )

    def fill(listed, **arguments):
        items, num_category = order.fill(np.array(listed, np.int32), **arguments)
        return items.tolist(), num_category

    assert fill([], trigger=2, coarsest=0, k=4) == ([1, 0, 4, 5], 2)
    assert fill([4], trigger=2, coarsest=0, k=2) == ([1], 1)
    assert fill([1, 4], trigger=5, coarsest=-1, k=9) == ([2, 0], 0)  # all there is
    assert fill([], trigger=0, coarsest=7, k=1) == ([4], 0)  # a category without eligible items
    some = order.narrowed(np.array([0, 3, 5, 77], np.int32))  # 3 is not eligible, 77 is no item
    assert [array.tolist() for array in (some.popular, some.by_category)] == [
        [item for item in order.popular.tolist() if item in (0, 5)],
        [item for item in order.by_category.tolist() if item in (0, 5)],
    ]
    assert some.category.tolist() == order.category_of(some.by_category).tolist()


def test_best_per_row_against_a_plain_sort():
    rng = np.random.default_rng(1)
    scores = rng.integers(-3, 4, (50, 40)).astype(np.float32) / 2  # many ties, both signs
    scores[rng.random(scores.shape) < 0.3] = -np.inf
    scores[rng.random(scores.shape) < 0.05] = -0.0
    for k in (1, 7, 40, 99):
        best = best_per_row(scores, k)
        for found, values in zip(best, scores, strict=True):
            wanted = [column for column in sorted(range(40), key=lambda c: (-values[c], c)) if values[column] > -np.inf][:k]
            assert found[: len(wanted)].tolist() == wanted
            assert (found[len(wanted) :] == -1).all()
    position, offsets = best_per_segment(np.array([1, 3, 3, 2], np.float32), np.array([0, 0, 3, 4]), 2)
    assert (position.tolist(), offsets.tolist()) == ([1, 2, 3], [0, 0, 2, 3])
    # segments of very unequal lengths are ranked in groups of like ones: the same as one after the other
    lengths = rng.permutation([0, 1, 2, 3, 5, 8, 9, 64, 65, 700, 1, 0])
    scores = rng.integers(0, 9, lengths.sum()).astype(np.float32)
    scores[rng.random(len(scores)) < 0.2] = -np.inf
    bounds = ends(lengths)
    position, offsets = best_per_segment(scores, bounds, 6)
    for number, (start, stop) in enumerate(pairwise(bounds)):
        wanted = [p for p in sorted(range(start, stop), key=lambda p: (-scores[p], p)) if scores[p] > -np.inf][:6]
        assert position[offsets[number] : offsets[number + 1]].tolist() == wanted
