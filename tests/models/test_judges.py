import math
import re

import numpy as np
import pytest

from models import judges
from models.judges import Judge, LabelJudge, PairJudge, TaxonomyJudge, judged_lists, word_documents

NUM_ITEMS = 40
GRADES = (0.2, 0.6, 1.0)
# 0 and 1 share all levels, 2 ends at the second one, 3 shares the first, 4 is elsewhere, 5 and 6 have no category
CODES = np.array([[0, 1, 2], [0, 1, 2], [0, 1, -1], [0, 3, 4], [5, 6, 7], [-1, -1, -1], [-1, -1, -1]], np.int32)


def random_codes(rng):
    """A code stands for the whole path down to its level."""
    steps, lengths = rng.integers(0, 3, (NUM_ITEMS, 3)), rng.integers(0, 4, NUM_ITEMS)
    whole = np.stack([steps[:, 0], 3 + 3 * steps[:, 0] + steps[:, 1], 12 + 9 * steps[:, 0] + 3 * steps[:, 1] + steps[:, 2]], axis=1)
    return np.where(np.arange(3) < lengths[:, None], whole, -1).astype(np.int32)


def random_documents(rng):
    words = [f"w{number}" for number in range(15)]
    counts = [rng.choice(15, rng.integers(0, 5), replace=False) for _ in range(NUM_ITEMS)]
    return [{words[word]: float(rng.integers(1, 4)) for word in chosen} or None for chosen in counts]


def random_pairs(rng):
    return rng.integers(-1, NUM_ITEMS + 2, 100), rng.integers(-1, NUM_ITEMS + 2, 100), rng.integers(0, 5, 100) / 4


def slow_taxonomy(codes, level_grades, a, b):
    shared = 0
    while shared < codes.shape[1] and codes[a, shared] == codes[b, shared] >= 0:
        shared += 1
    return level_grades[shared - 1] if shared else 0.0


def slow_cosine(documents, a, b):
    labeled = [document for document in documents if document]

    def idf(word):
        return math.log(len(labeled) / sum(word in document for document in labeled))

    def vector(document):
        return {word: weight * idf(word) for word, weight in (document or {}).items()}

    left, right = vector(documents[a]), vector(documents[b])
    dot = sum(weight * right.get(word, 0) for word, weight in left.items())
    return dot / (math.hypot(*left.values()) * math.hypot(*right.values())) if dot else 0.0


def slow_pairs(pairs, a, b, *, symmetric):
    found = [grade for left, right, grade in zip(*pairs, strict=True) if (left, right) == (a, b) or (symmetric and (right, left) == (a, b))]
    return float(np.mean(found)) if found else 0.0


def every_judge():
    rng = np.random.default_rng(3)
    codes, documents, pairs = random_codes(rng), random_documents(rng), random_pairs(rng)
    yield TaxonomyJudge(codes=codes, level_grades=GRADES), lambda a, b: slow_taxonomy(codes, GRADES, a, b)
    yield LabelJudge.from_documents(documents), lambda a, b: slow_cosine(documents, a, b)
    for symmetric in (True, False):
        judge = PairJudge.from_pairs(*pairs, num_items=NUM_ITEMS, symmetric=symmetric)
        yield judge, lambda a, b, symmetric=symmetric: slow_pairs(pairs, a, b, symmetric=symmetric)


@pytest.mark.parametrize(("judge", "slow"), [pytest.param(*found, id=type(found[0]).__name__) for found in every_judge()])
def test_contract(judge: Judge, slow):
    assert judge.num_items == NUM_ITEMS
    wanted = np.array([[slow(a, b) if a != b else 0.0 for b in range(NUM_ITEMS)] for a in range(NUM_ITEMS)])
    left, right = (side.ravel().astype(np.int32) for side in np.meshgrid(range(NUM_ITEMS), range(NUM_ITEMS), indexing="ij"))
    grades = judge.grades(left, right)
    assert grades.dtype == np.float64
    assert grades.reshape(NUM_ITEMS, NUM_ITEMS) == pytest.approx(wanted, abs=1e-12)
    assert 0 < grades.max() <= 1
    rows = judge.rows(np.arange(NUM_ITEMS, dtype=np.int32))
    assert rows.dtype == np.float32
    assert rows.ravel() == pytest.approx(grades, abs=1e-7)
    assert not np.diag(rows).any()
    # whom it cannot speak about has grade 0 with everybody
    assert judge.defined.dtype == bool
    assert not judge.defined.all()
    assert not wanted[~judge.defined].any()
    assert not wanted[:, ~judge.defined].any()


@pytest.mark.parametrize("judge", [pytest.param(judge, id=type(judge).__name__) for judge, _ in every_judge()])
def test_items_outside_the_catalog_have_grade_0(judge: Judge):
    known = int(np.flatnonzero(judge.rows(np.arange(NUM_ITEMS)).any(axis=1))[0])
    left, right = np.array([-1, NUM_ITEMS, known, known, NUM_ITEMS + 7, -1]), np.array([known, known, -1, NUM_ITEMS, NUM_ITEMS + 7, -1])
    assert judge.grades(left, right).tolist() == [0] * 6
    assert judge.grades(np.empty(0, np.int32), np.empty(0, np.int32)).shape == (0,)
    rows = judge.rows(np.array([NUM_ITEMS, known, -1]))
    assert rows.shape == (3, NUM_ITEMS)
    assert rows.any(axis=1).tolist() == [False, True, False]
    assert judge.rows(np.empty(0, np.int32)).shape == (0, NUM_ITEMS)


def test_taxonomy_by_hand():
    judge = TaxonomyJudge(codes=CODES, level_grades=GRADES)
    assert judge.rows(np.array([0, 2, 5])) == pytest.approx(
        np.array([[0, 1, 0.6, 0.2, 0, 0, 0], [0.6, 0.6, 0, 0.2, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]])  # no category is not a shared one
    )
    assert judge.defined.tolist() == [True] * 5 + [False] * 2
    assert not TaxonomyJudge(codes=np.zeros((3, 0), np.int32), level_grades=()).rows(np.arange(3)).any()  # nobody has a category


def test_taxonomy_needs_a_grade_for_each_level():
    with pytest.raises(ValueError, match=r"paths of 3 levels in codes and level_grades of 2 levels \(0.5, 1.0\)"):
        TaxonomyJudge(codes=CODES, level_grades=(0.5, 1.0))
    TaxonomyJudge(codes=CODES[2:3], level_grades=(0.5, 1.0))  # the third level is empty
    with pytest.raises(ValueError, match=r"level_grades \[1.5\]"):
        TaxonomyJudge(codes=CODES, level_grades=(0.2, 1.0, 1.5))


def test_labels_by_hand():
    # everybody is a game; four have a label, two of them are horror, one is long, one is short
    documents = [{"Game": 1, "horror": 2, "long": 1}, {"game": 1, "HORROR": 5}, {"game": 3}, {"game": 1, "short": 1}, None]
    judge = LabelJudge.from_documents(documents)
    horror, long = 2 * math.log(4 / 2), math.log(4 / 1)
    assert judge.grades(np.array([0, 0, 1]), np.array([1, 3, 2])) == pytest.approx([horror / math.hypot(horror, long), 0, 0])
    assert judge.defined.tolist() == [True, True, False, True, False]  # what all have in common tells nothing
    plain = LabelJudge.from_documents(documents, weighted=False)
    assert plain.grades(np.array([0]), np.array([1])) == pytest.approx([1 / math.hypot(1, 2)])  # ln 2 against ln 4


def test_ignored_labels_match_as_a_whole_in_any_case():
    documents = [{"XYZZY Awards 2019": 1, "sci-fi": 1}, {"xyzzy awards 2020": 1, "sci-fi": 1}, {"not an award": 1}, {"fantasy": 1}]
    assert LabelJudge.from_documents(documents, ignored=[r"XYZZY.*\d+", "award"]).grades(np.array([0]), np.array([1])) == pytest.approx([1])
    judge = LabelJudge.from_documents(documents, ignored=[r".*award.*"])
    assert judge.defined.tolist() == [True, True, False, True]
    assert judge.vectors.shape == (4, 2)
    with pytest.raises(re.error):
        LabelJudge.from_documents(documents, ignored=["("])


def test_labels_that_differ_in_case_are_one():
    once, twice, others = {"a": 3, "b": 1}, {"a": 1, "A": 2, "b": 1}, [{"a": 1}, {"c": 1}]
    for weighted in (True, False):
        rows = [LabelJudge.from_documents([first, *others], weighted=weighted).rows(np.arange(3)) for first in (once, twice)]
        assert rows[0].any()
        assert rows[0].tolist() == rows[1].tolist()


def test_label_weights_are_numbers_from_0():
    documents = [{"a": 1, "b": 0}, {"b": 1}, {"c": 1}]
    assert LabelJudge.from_documents(documents).grades(np.array([0]), np.array([1])).tolist() == [0]  # weight 0 is no label
    for wrong in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match="of label 'b' of document 1"):
            LabelJudge.from_documents([{"a": 1}, {"b": wrong}])
        LabelJudge.from_documents([{"a": 1}, {"b": wrong}], weighted=False)  # does not look at it
    nobody = LabelJudge.from_documents([None, {}, None])
    assert not nobody.defined.any()
    assert not nobody.rows(np.arange(3)).any()


def test_word_documents():
    titles = ["The Dark, dark Wood", "Élan 42", " - ", "", None]
    assert word_documents(titles) == [{"the": 1, "dark": 2, "wood": 1}, {"élan": 1, "42": 1}, None, None, None]
    judge = LabelJudge.from_documents(word_documents(["red wine", "Red Wine!", "white bread"]))
    assert judge.grades(np.array([0, 0]), np.array([1, 2])) == pytest.approx([1, 0])


def test_pairs_by_hand():
    left, right, grade = np.array([0, 1, 0, 3, 4, 2, 9]), np.array([1, 0, 2, 2, 4, -1, 0]), np.array([1.0, 0.5, 0.25, 0.0, 1, 1, 1])
    judge = PairJudge.from_pairs(left, right, grade, num_items=5)
    asked = np.array([0, 1, 2, 2, 0]), np.array([1, 0, 0, 3, 3])
    assert judge.grades(*asked).tolist() == [0.75, 0.75, 0.25, 0, 0]  # two grades of a pair are averaged
    assert judge.num_pairs == 3  # one of them was judged irrelevant; strangers and 4 with itself are left out
    assert judge.defined.tolist() == [True, True, True, True, False]
    directed = PairJudge.from_pairs(left, right, grade, num_items=5, symmetric=False)
    assert directed.grades(*asked).tolist() == [1, 0.5, 0, 0, 0]
    assert directed.num_pairs == 4
    assert directed.defined.tolist() == [True, True, True, True, False]
    nobody = PairJudge.from_pairs(left[:0], right[:0], grade[:0], num_items=5)
    assert nobody.num_pairs == 0
    assert not nobody.grades(*asked).any()


def test_pairs_are_checked():
    with pytest.raises(ValueError, match=r"found grade \[5.0\], 1 of 2"):
        PairJudge.from_pairs(np.array([0, 1]), np.array([1, 2]), np.array([1, 5.0]), num_items=3)
    with pytest.raises(ValueError, match="found 2 left items, 2 right items and 1 grades"):
        PairJudge.from_pairs(np.array([0, 1]), np.array([1, 2]), np.array([1.0]), num_items=3)


def test_judged_lists_in_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    judge = TaxonomyJudge(codes=random_codes(rng), level_grades=GRADES)
    triggers, lists = rng.integers(0, NUM_ITEMS + 3, 11), rng.integers(-1, NUM_ITEMS + 3, (11, 7))
    judged = judged_lists(judge, triggers, lists)
    wanted = [
        [np.nan if item < 0 else judge.grades(np.array([trigger]), np.array([item]))[0] for item in row]
        for trigger, row in zip(triggers, lists, strict=True)
    ]
    assert judged == pytest.approx(np.array(wanted), nan_ok=True)
    assert judged.dtype == np.float64
    monkeypatch.setattr(judges, "_PAIRS_AT_ONCE", 15)
    assert np.array_equal(judged_lists(judge, triggers, lists), judged, equal_nan=True)
    assert judged_lists(judge, triggers, np.empty((11, 0), np.int32)).shape == (11, 0)
