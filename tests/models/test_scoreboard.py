"""The protocol on exams small enough to be worked out by hand."""

import numpy as np
import pytest
from scipy.sparse import csr_array

from models.judges import TaxonomyJudge
from models.scoreboard import Exam, measure, measure_axes

# Items 0..5; 6 came after the cut. Triggers 0 and 1 and 2. Categories: 0, 1, 2 alike; 3, 4, 5 alike.
CODES = np.array([[0], [0], [0], [1], [1], [1]], np.int32)
POPULARITY = np.array([100.0, 50.0, 4.0, 9.0, 1.0, 16.0, 0.0])
FUTURE = np.zeros((3, 7))
FUTURE[0, [1, 3]] = 1, 3  # trigger 0: partners 1 and 3
FUTURE[1, [4, 6]] = 1, 1  # trigger 1: one of two partners did not exist
FUTURE[2, 5] = 2
KNOWN = np.zeros((3, 7))
KNOWN[0, 1] = 1
LISTS = np.full((3, 100), -1, np.int32)
LISTS[0, :3] = 3, 2, 4
LISTS[1, :2] = 4, 0
LISTS[2, :1] = 0


def exam(**changed):
    judge = TaxonomyJudge(codes=CODES, level_grades=(1.0,))
    content = np.eye(6, 3, dtype=np.float32)
    return Exam(
        **{
            "triggers": np.array([0, 1, 2], np.int32),
            "future": csr_array(FUTURE),
            "popularity": POPULARITY,
            "known_pairs": csr_array(KNOWN),
            "eligible": np.ones(6, np.bool_),
            "content": content,
            "judges": {"path": judge},
            "independent": {"path": True},
            **changed,
        }
    )


def test_recall_over_all_and_by_slice():
    values = measure(LISTS, exam()).values
    np.testing.assert_allclose(values["recall@100", "all"], [3 / 4, 1 / 2, 0])
    np.testing.assert_allclose(values["recall@100", "new_pairs"], [1, 1 / 2, 0])  # trigger 0 knew partner 1
    np.testing.assert_allclose(values["recall@100", "cold_targets"], [np.nan, 1 / 2, np.nan])  # 4 and 6 have fewer than 5 user-days
    np.testing.assert_allclose(values["recall@100", "cold_triggers"], [np.nan, np.nan, 0])  # trigger 2 has 4
    found = (3 / 3) / (1 / np.sqrt(50) + 3 / 3)
    np.testing.assert_allclose(values["debiased_recall@100", "all"], [found, 1 / 2, 0])
    deciles = np.stack([values["recall@100", f"target_decile_{d}"] for d in range(1, 11)])
    assert np.isfinite(deciles).any(axis=0).all()  # every trigger's partners fall into some decile
    by_trigger = np.stack([values["recall@100", f"trigger_decile_{d}"] for d in range(1, 11)])
    assert (np.isfinite(by_trigger).sum(axis=0) == 1).all()  # and every trigger into exactly one


def test_relevance_ndcg_and_the_shape_of_lists():
    scored = measure(LISTS, exam())
    np.testing.assert_allclose(scored.values["relevance@10", "all"], [0.1, 0.1, 0.1])  # 2 for trigger 0; 0 for 1; 0 for 2
    ideal = 1 + 1 / np.log2(3)  # two others of the category
    np.testing.assert_allclose(scored.values["rel_ndcg@10", "all"], [1 / np.log2(3) / ideal, 1 / np.log2(3) / ideal, 1 / ideal])
    assert scored.whole["coverage@10", "all"] == pytest.approx(4 / 6)
    micro = dict(scored.estimates(num_resamples=20, seed=0))["micro_recall@100", "all"]
    assert micro.value == pytest.approx((3 + 1) / (4 + 2 + 2))
    assert exam().unreachable_share == pytest.approx(1 / 8)


def test_judges_of_two_kinds_never_share_a_name():
    judges = {name: TaxonomyJudge(codes=CODES, level_grades=(1.0,)) for name in ("a", "b", "c")}
    mixed = exam(judges=judges, independent={"a": False, "b": True, "c": True})
    values = measure(LISTS, mixed).values
    for measured in ("relevance@10", "relevance@100", "rel_ndcg@10"):
        assert {key for key in values if key[0].endswith(measured)} == {
            (f"same_source_{measured}", "all"),
            (f"same_source_{measured}", "judge:a"),
            (measured, "all"),
            (measured, "judge:b"),
            (measured, "judge:c"),
        }
        np.testing.assert_array_equal(values[measured, "all"], values[measured, "judge:b"])
    assert mixed.relevance_metric == ("relevance@100", "all")
    alone = exam(judges={"a": judges["a"]}, independent={"a": False})
    assert alone.relevance_metric == ("same_source_relevance@100", "all")
    assert not [key for key in measure(LISTS, alone).values if key[1].startswith("judge:")], "one judge is told by its metric alone"


def test_axes_are_those_of_the_whole_measurement():
    judge = TaxonomyJudge(codes=CODES, level_grades=(1.0,))
    two = exam(judges={"a": judge, "b": judge}, independent={"a": True, "b": False})
    whole, axes = measure(LISTS, two), measure_axes(LISTS, two)
    assert {key for key in axes.values if "relevance" in key[0]} == {key for key in whole.values if key[0].endswith("relevance@100")}
    for key, values in axes.values.items():
        np.testing.assert_array_equal(values, whole.values[key])
