"""The merge scorer: features, candidates, fit."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conf.errors import TableError
from models.data import TRENDS, TrainingData
from models.draws import item_keys
from models.factorization import factorize
from models.scorer import (
    FEATURES,
    PRIOR_WEIGHT,
    USER_LEVEL_PRIOR_WEIGHT,
    Candidates,
    HeadVectors,
    Scorer,
    Widths,
    candidate_features,
    fit_scorer,
    log_softmax,
)
from models.start import build_model
from tests.models.small_world import make_spec, source_of
from tests.models.test_factorization import WEIGHTS


def planted(num_triggers: int = 150, length: int = 40, *, of_trigger: bool = False) -> Candidates:
    """The partner is popular where it, or the trigger, is counted often, and not where it is not: no linear scorer can say so."""
    rng = np.random.default_rng(2)
    features = rng.standard_normal((num_triggers * length, len(FEATURES))).astype(np.float32)
    segment = np.repeat(np.arange(num_triggers, dtype=np.int32), length)
    often = FEATURES.index("trigger_log_count" if of_trigger else "log_count")
    features[:, often] = features[segment * length, often] if of_trigger else features[:, often]
    logit = 3 * features[:, 2] * np.sign(features[:, often])
    gain = np.exp(log_softmax(logit.astype(np.float32), segment))
    return Candidates(segment=segment, target=np.zeros(len(segment), np.int32), features=features, gain=gain)


KEYS = item_keys(map(str, range(150)))


def test_features_and_softmax_against_plain_formulas() -> None:
    count, popularity = np.array([0.0, 4.0], np.float32), np.array([0.1, 0.3], np.float32)
    head, trends = np.array([0.5, -1.0], np.float32), np.arange(2 * len(TRENDS), dtype=np.float32).reshape(2, -1)
    trends[:, -1] = np.log([1, 11])  # new, and ten days old
    sums = {"count_row_sum": np.array([6.0, 6.0], np.float32), "user_level_row_sum": np.array([2.0, 2.0], np.float32)}
    of_trigger = sums | {"trigger_log_age": trends[:, -1] + 1}
    made = candidate_features(head_log_p=head, count=count, user_level=count / 8, popularity_p=popularity, trends=trends, **of_trigger)
    columns = dict(zip(FEATURES, made.T, strict=True))
    np.testing.assert_allclose(np.exp(columns["smooth_log_p"]), (count + PRIOR_WEIGHT * popularity) / (6 + PRIOR_WEIGHT), rtol=1e-6)
    of_users = (count / 8 + USER_LEVEL_PRIOR_WEIGHT * popularity) / (2 + USER_LEVEL_PRIOR_WEIGHT)
    np.testing.assert_allclose(np.exp(columns["user_level_log_p"]), of_users, rtol=1e-6)
    np.testing.assert_allclose(columns["log_popularity"], np.log(popularity), rtol=1e-6)
    np.testing.assert_allclose(columns["log_count"], np.log(1 + count), rtol=1e-6)
    np.testing.assert_array_equal(columns["head_log_p"], head)
    np.testing.assert_array_equal(columns["log_age"], trends[:, -1])
    np.testing.assert_array_equal(columns["trigger_log_age"], trends[:, -1] + 1)
    np.testing.assert_allclose(np.exp(columns["log_days_apart"]), 1 + np.array([1, 11]) * (np.e - 1), rtol=1e-6)
    np.testing.assert_allclose(columns["trigger_log_count"], np.log(7), rtol=1e-6)
    np.testing.assert_allclose(columns["trigger_user_level_log_count"], np.log(3), rtol=1e-6)
    logits, segment = np.array([1, 2, 800, 801, 5], np.float32), np.array([0, 0, 3, 3, 7], np.int32)
    wanted = [-np.log(1 + np.e), 1 - np.log(1 + np.e), -np.log(1 + np.e), 1 - np.log(1 + np.e), 0]
    np.testing.assert_allclose(log_softmax(logits, segment), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("of_trigger", [False, True])
def test_the_fit_finds_a_planted_rule_and_repeats(tmp_path: Path, of_trigger: bool) -> None:
    candidates = planted(of_trigger=of_trigger)
    scorer, reached = fit_scorer(candidates, keys=KEYS, num_folds=2, seed=3)
    best = -(candidates.gain * np.log(np.maximum(candidates.gain, 1e-30))).sum() / 150  # entropy of the truth
    assert reached["scorer_loss"] < best + 0.35 * (reached["mixture_loss"] - best)
    again, _ = fit_scorer(candidates, keys=KEYS, num_folds=2, seed=3)
    np.testing.assert_array_equal(scorer.logits(candidates.features), again.logits(candidates.features))
    scorer.save(tmp_path / "scorer.json")
    loaded = Scorer.load(tmp_path / "scorer.json")
    np.testing.assert_array_equal(scorer.logits(candidates.features), loaded.logits(candidates.features))
    total = np.bincount(candidates.segment, weights=np.exp(loaded.log_probability(candidates.features, candidates.segment)))
    np.testing.assert_allclose(total, 1, rtol=1e-5)


def test_a_fit_goes_on_from_an_earlier_one_and_leaves_it_only_for_a_gain() -> None:
    candidates = planted()
    before, cold = fit_scorer(candidates, keys=KEYS, num_folds=2, seed=3)
    again, warm = fit_scorer(candidates, keys=KEYS, num_folds=2, seed=4, previous=before)
    anew, _ = fit_scorer(candidates, keys=KEYS, num_folds=2, seed=4)
    assert warm["scorer_loss"] <= cold["scorer_loss"] + 0.01
    known, gone_on, made_anew = (scorer.log_probability(candidates.features, candidates.segment) for scorer in (before, again, anew))
    assert np.abs(gone_on - known).mean() < np.abs(made_anew - known).mean() / 2
    assert again.hidden is not None
    assert again.hidden.shape == (len(FEATURES), 24)  # it does not grow from night to night
    flipped = candidates.features * np.where(np.arange(len(FEATURES)) == 3, -1, 1).astype(np.float32)  # the rule has turned round
    _, found = fit_scorer(replace(candidates, features=flipped), keys=KEYS, num_folds=2, seed=4, previous=before)
    untouched = -(candidates.gain * before.log_probability(flipped, candidates.segment)).sum() / 150
    assert found["scorer_loss"] < untouched - 1
    mixture, _ = fit_scorer(candidates, keys=KEYS, num_folds=2, seed=3, previous=Scorer.mixture())
    np.testing.assert_array_equal(mixture.linear, before.linear)


def test_the_mixture_stands_in_and_strange_files_are_refused(tmp_path: Path) -> None:
    features = np.zeros((2, len(FEATURES)), np.float32)
    features[:, 0], features[:, 1] = np.log([0.5, 0.1]), np.log([0.2, 0.4])
    Scorer.mixture().save(tmp_path / "scorer.json")
    np.testing.assert_allclose(np.exp(Scorer.load(tmp_path / "scorer.json").logits(features)), [0.47, 0.13], rtol=1e-5)
    (tmp_path / "scorer.json").write_text((tmp_path / "scorer.json").read_text().replace("log_count", "log_clicks"))
    with pytest.raises(TableError, match=r"log_clicks.*run the night again"):
        Scorer.load(tmp_path / "scorer.json")


def test_a_feature_that_said_nothing_says_little_later() -> None:
    """No pair of the holdout's triggers had enough users before it; tonight some have."""
    rng = np.random.default_rng(0)
    segment = np.repeat(np.arange(60, dtype=np.int32), 8)
    features = rng.standard_normal((len(segment), len(FEATURES))).astype(np.float32)
    silent = [FEATURES.index(name) for name in ("log_count", "trigger_log_count")]
    features[:, silent] = 0
    gain = (rng.random(len(segment)) * (features[:, 0] > 0)).astype(np.float32)
    candidates = Candidates(segment=segment, target=np.zeros(len(segment), np.int32), features=features, gain=gain)
    scorer, _ = fit_scorer(candidates, keys=item_keys(map(str, range(60))), seed=0)
    later = features.copy()
    later[:, silent] = np.log1p(2.0)
    moved = scorer.logits(later) - scorer.logits(features)
    assert np.abs(moved).max() < 1
    assert np.corrcoef(scorer.logits(later), scorer.logits(features))[0, 1] > 0.9


def test_items_of_which_nothing_is_said_are_no_candidates_by_content(data: TrainingData, tmp_path: Path) -> None:
    """As in lists, or the scorer would learn of candidates that they never have."""
    start = factorize(data.fit, data.content, weights=WEIGHTS, seed=0)
    model = build_model(start, data.content, make_spec(tmp_path).model, 0.3, seed=0)
    content = data.content.copy()
    content[::2] = 0
    source = replace(source_of(replace(data, full=data.fit), model, min_users=2), content=content)
    triggers = np.array([4, 5, 41], np.int32)
    made = source.propose(triggers, data.holdout[triggers], widths=Widths(counts=0, users=0, head=0, content=20, popular=0))
    assert set(made.segment.tolist()) == {1, 2}
    assert (made.target % 2 == 1).all()


def test_candidates_hold_every_source_and_nothing_forbidden(data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.ranking._CELLS_AT_ONCE", 3 * data.num_items)
    start = factorize(data.fit, data.content, weights=WEIGHTS, seed=0)
    model = build_model(start, data.content, make_spec(tmp_path).model, 0.3, seed=0)
    source = source_of(replace(data, full=data.fit), model, min_users=2)
    triggers = np.array([3, 11, 40, data.num_items - 1], np.int32)
    made = source.propose(triggers, data.holdout[triggers], widths=Widths(counts=3, users=2, head=2, content=2, popular=2))
    assert (np.diff(made.segment) >= 0).all()
    assert set(made.segment.tolist()) == {0, 1, 2, 3}
    assert isinstance(source.engagement, HeadVectors)
    for row, trigger in enumerate(triggers):
        mine = made.target[made.segment == row].tolist()
        assert len(mine) == len(set(mine)) <= 13
        assert trigger not in mine
        assert data.num_items - 2 not in mine  # not eligible
        counts = data.fit.pairs[[trigger]].toarray()[0]
        strongest = np.argsort(-counts)[:3]
        assert set(strongest[counts[strongest] > 0].tolist()) <= set(mine)
        of_users = source.user_level.rows(np.array([trigger], np.int32)).toarray()[0]
        strongest = np.argsort(-of_users)[:2]
        assert set(strongest[of_users[strongest] > 0].tolist()) - {data.num_items - 2} <= set(mine)
        future = data.holdout[[trigger]].toarray()[0]
        wanted = future[mine] / max(future.sum(), 1)
        np.testing.assert_allclose(made.gain[made.segment == row], wanted, rtol=1e-6)
