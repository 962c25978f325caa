"""Which settings validation chooses, and what is compared with what, on boards made by hand."""

import numpy as np
import pytest

from jobs.verdicts import Board, choose, compare
from models.scoreboard import Scored

RECALL, RELEVANCE = ("recall@100", "all"), ("relevance@100", "all")


class AnExam:
    """All that verdicts ask of an exam."""

    relevance_metric = RELEVANCE


def scored(recall, relevance):
    """Three triggers around the given means."""
    around = np.array([-0.01, 0.0, 0.01])
    parts = {("recall@100", part): recall + around for part in ("new_pairs", "cold_triggers", "cold_targets")}
    return Scored(values={RECALL: recall + around, RELEVANCE: relevance + around, **parts})


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
        },
    )


def test_mixes_are_chosen_with_one_axis_held():
    choice = choose([board()])
    assert choice.baseline == ("smooth", "-")
    assert choice.at_recall == {"mtmh_blend": "0.1", "late_blend": "0", "quota": None}
    assert choice.at_relevance == {"mtmh_blend": "0.1", "late_blend": "0", "quota": None}
    assert choice.described()["quota at recall kept"] == "no mix holds it"


def test_several_validation_slices_decide_by_their_mean():
    other = board()
    worse = {"0": scored(0.6, 0.1), "0.1": scored(0.40, 0.5), "1": scored(0.3, 0.9)}
    second = Board(exam=AnExam(), methods=other.methods, families={**other.families, "mtmh_blend": worse})
    assert choose([board(), second]).at_recall["mtmh_blend"] == "0"  # 0.1 reaches (.55 + .40) / 2 < .5


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
