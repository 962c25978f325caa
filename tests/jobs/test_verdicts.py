"""Which settings validation chooses, and what is compared with what, on boards made by hand."""

import numpy as np
import pytest

from jobs.verdicts import Board, choose, compare
from models.metrics import hypervolume
from models.scoreboard import Scored

RECALL, RELEVANCE, DEBIASED = ("recall@100", "all"), ("relevance@100", "all"), ("debiased_recall@100", "all")


class AnExam:
    """All that verdicts ask of an exam."""

    relevance_metric = RELEVANCE


DIALS = ("mtmh_dial", "mtmh_new_pairs", "mtmh_new_items")


def scored(recall, relevance, debiased=0.1, new=None, cold=None):
    """Three triggers around the given means; recall of new pairs and of cold targets is that of all unless it is given."""
    around = np.array([-0.01, 0.0, 0.01])
    parts = {("recall@100", part): recall + around for part in ("new_pairs", "cold_triggers", "cold_targets")}
    parts |= {} if new is None else {("recall@100", "new_pairs"): new + around}
    parts |= {} if cold is None else {("recall@100", "cold_targets"): cold + around}
    return Scored(values={RECALL: recall + around, RELEVANCE: relevance + around, DEBIASED: debiased + around, **parts})


def board():
    return Board(
        exam=AnExam(),
        methods={
            ("mtmh", "engagement"): scored(0.6, 0.1),
            ("mtmh", "merged"): scored(0.55, 0.5),
            ("counts", "-"): scored(0.4, 0.1),
            ("smooth", "-"): scored(0.5, 0.2),
            ("content", "-"): scored(0.9, 0.9),  # not engagement-only: never the baseline to beat
        },
        families={
            "mtmh_blend": {"0": scored(0.6, 0.1), "0.1": scored(0.55, 0.5), "1": scored(0.3, 0.9)},
            "late_blend": {"0": scored(0.5, 0.2), "0.1": scored(0.45, 0.4)},
            "quota": {"0.5": scored(0.2, 0.1)},
            "mtmh_dial": {"0": scored(0.55, 0.5, 0.2), "0.3": scored(0.45, 0.5, 0.3), "0.5": scored(0.35, 0.5, 0.4)},
            "mtmh_new_pairs": {"0": scored(0.6, 0.1, new=0.1), "0.5": scored(0.55, 0.1, new=0.4), "1": scored(0.45, 0.1, new=0.6)},
            "mtmh_new_items": {"0": scored(0.6, 0.1, cold=0.1), "2": scored(0.52, 0.1, cold=0.5), "3": scored(0.45, 0.1, cold=0.9)},
        },
    )


def test_mixes_are_chosen_with_one_axis_held():
    choice = choose([board()])
    assert choice.baseline == ("smooth", "-")
    held = [{family: mix for family, mix in mixes.items() if family not in DIALS} for mixes in (choice.at_recall, choice.at_relevance)]
    assert held == [{"mtmh_blend": "0.1", "late_blend": "0", "quota": None}] * 2
    assert choice.described()["quota at recall kept"] == "no mix holds it"


def test_popularity_is_discounted_as_far_as_recall_stays_that_of_counts():
    choice = choose([board()])
    assert choice.exponent == "0.3"  # 0.5 has more debiased recall, and less recall than counts
    assert choice.described()["mtmh_dial at recall of counts"] == "0.3"
    found = {c.what: c for c in compare(board(), choice, num_resamples=50, seed=0) if c.name == "popularity discounted at recall of counts"}
    assert found["debiased_recall@100"].value == pytest.approx(0.2)
    assert (found["recall@100"].theirs, found["recall@100"].value) == ("counts", pytest.approx(0.05))
    without = board()
    del without.families["mtmh_dial"]
    assert choose([without]).described()["mtmh_dial at recall of counts"] == "no exponent holds it"


def test_new_pairs_and_new_items_are_raised_as_far_as_recall_stays_that_of_the_best_baseline():
    choice = choose([board()])
    assert choice.bonuses == {"mtmh_new_pairs": "0.5", "mtmh_new_items": "2"}  # 1 and 3 find more, with less recall than the baseline
    assert choice.described()["mtmh_new_pairs at recall kept"] == "0.5"
    found = {c.name: c for c in compare(board(), choice, num_resamples=50, seed=0)}
    raised, kept = found["new pairs found at recall kept"], found["recall kept with new pairs raised"]
    assert (raised.ours, raised.theirs, raised.value) == ("mtmh_new_pairs 0.5", "content", pytest.approx(0.4 - 0.9))
    assert (kept.theirs, kept.value) == ("smooth", pytest.approx(0.05))
    raised, kept = found["new items found at recall kept"], found["recall kept with new items raised"]
    assert (raised.ours, raised.theirs, raised.value) == ("mtmh_new_items 2", "content", pytest.approx(0.5 - 0.9))
    assert (kept.theirs, kept.value) == ("smooth", pytest.approx(0.02))
    unmet = board()
    for scored_mix in unmet.families["mtmh_new_items"].values():
        scored_mix.values["recall@100", "cold_targets"][:] = np.nan  # validation has no such target
    assert choose([unmet]).bonuses == {"mtmh_new_pairs": "0.5", "mtmh_new_items": None}
    without = board()
    del without.families["mtmh_new_items"]
    assert choose([without]).described()["mtmh_new_items at recall kept"] == "no bonus holds it"


def test_new_items_are_raised_as_far_as_recall_stays_that_of_the_baseline_that_finds_most():
    """Content finds most of them, and has little recall: any bonus may be kept against it."""
    of_content = board()
    of_content.methods["content", "-"] = scored(0.3, 0.9, cold=0.7)
    choice = choose([of_content])
    assert choice.finders_bonuses == {"mtmh_new_pairs": "0.5", "mtmh_new_items": "3"}  # smooth finds most new pairs
    words = "at the recall of the baseline that finds most"
    assert choice.described()[f"mtmh_new_items {words}"] == "3"
    found = [c for c in compare(of_content, choice, num_resamples=50, seed=0) if c.name == f"new items found {words}"]
    assert [(c.ours, c.theirs) for c in found] == [("mtmh_new_items 3", "content")] * 2
    assert [c.value for c in found] == [pytest.approx(0.9 - 0.7), pytest.approx(0.45 - 0.3)]


def test_frontiers_of_recall_and_new_items_are_compared_with_those_of_the_blends():
    found = {(c.name, c.what, c.theirs): c for c in compare(board(), choose([board()]), num_resamples=50, seed=0)}
    area = found["whole frontier of recall and new items", "hypervolume", "late_blend"]
    assert area.ours == "mtmh_new_items"
    assert found["whole frontier of recall and new items", "hypervolume with mixtures", "late_blend"].value > area.value
    theirs = 0.5 * 0.5  # of late_blend, whose recall of new items is that of all
    assert area.value == pytest.approx(hypervolume(np.array([[0.6, 0.1], [0.52, 0.5], [0.45, 0.9]])) - theirs)
    assert ("whole frontier of recall and new pairs", "hypervolume", "quota") in found
    without = board()
    del without.families["mtmh_new_items"]
    assert "whole frontier of recall and new items" not in {c.name for c in compare(without, choose([without]), num_resamples=50, seed=0)}


def test_vectors_alone_are_compared_where_there_are_some():
    found = {c.name for c in compare(board(), choose([board()]), num_resamples=50, seed=0)}
    assert not {name for name in found if "vectors alone" in name}
    distilled = board()
    distilled.methods["mtmh", "distilled"] = scored(0.57, 0.3)
    chosen = [c for c in compare(distilled, choose([distilled]), num_resamples=50, seed=0) if "vectors alone" in c.name]
    assert {c.name for c in chosen} == {"distilled vectors alone against the best baseline"}
    assert (chosen[0].what, chosen[0].theirs, chosen[0].value) == ("recall@100", "smooth", pytest.approx(0.07))


def test_a_baseline_that_a_slice_lacks_is_neither_chosen_nor_missed():
    """As EASE where the catalog has outgrown it."""
    large, small = board(), board()
    small.methods["ease", "-"] = scored(0.58, 0.2, new=0.9)
    assert choose([small, large]).baseline == choose([large, small]).baseline == ("smooth", "-")
    choice = choose([small])
    assert choice.baseline == choice.finders["mtmh_new_pairs"] == ("ease", "-")
    found = compare(large, choice, num_resamples=50, seed=0)
    assert "ease" not in {c.theirs for c in found}
    assert {c.theirs for c in found if c.name == "merged list against the best baseline"} == {"smooth"}


def test_several_validation_slices_decide_by_their_mean():
    other = board()
    worse = {"0": scored(0.6, 0.1), "0.1": scored(0.40, 0.5), "1": scored(0.3, 0.9)}
    second = Board(exam=AnExam(), methods=other.methods, families={**other.families, "mtmh_blend": worse})
    assert choose([board(), second]).at_recall["mtmh_blend"] == "0"  # 0.1 reaches (.55 + .40) / 2 < .5


def test_a_mix_that_only_luck_may_have_kept_is_not_chosen():
    lucky = board()
    values = np.array([0.52, 0.49, 0.51])  # .0067 above the baseline's mean, and as far below on another draw
    lucky.families["mtmh_blend"]["1"] = Scored(values={**scored(0.5, 0.9).values, RECALL: values})
    assert choose([lucky]).at_recall["mtmh_blend"] == "0.1"
    lucky.families["mtmh_blend"]["1"].values[RECALL] = values + 0.04
    assert choose([lucky]).at_recall["mtmh_blend"] == "1"


def test_comparisons_are_paired_and_skip_what_holds_nothing():
    found = {(c.name, c.what, c.theirs): c for c in compare(board(), choose([board()]), num_resamples=50, seed=0)}
    headline = found["relevance at recall kept", "relevance@100", "smooth"]
    assert headline.value == pytest.approx(0.3)
    assert headline.low == pytest.approx(0.3)  # the same triggers differ alike, so that nothing is left to chance
    assert headline.relative == pytest.approx(1.5)
    assert headline.verdict == "wins"
    assert found["whole frontier", "hypervolume", "late_blend"].verdict == "wins"
    assert ("at recall kept against a blend", "relevance@100", "quota 0.5") not in found
    assert found["engagement list on new pairs against the baseline that is best there", "recall@100", "content"].verdict == "loses"
