"""The baselines of a cut: what cannot run is noted and leaves the others alone, and what validation chose serves later cuts."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from scipy.sparse import csr_array

from conf.errors import MachineError
from conf.settings import BacktestSettings
from models import contest as contests
from models import external
from models.baselines import SmoothWeights
from models.contest import Contest, DailyCounts, Tuned
from models.data import TrainingData
from models.factorization import ScoreWeights, Spectral, factorize

FACTORS = ScoreWeights(
    user_level_weight=0.5, dimension=8, target_norm_exponent=0.5, popularity_weight=0.4, temperature=2.0, prior_users=0.0
)
SETTINGS = BacktestSettings(external_baselines=False, blend_values=[0.0, 0.1], content_shares=[0.0, 0.5])
TUNED = Tuned(half_life_days=30.0, smooth=SmoothWeights(), prior_users=0.0, share=0.5, ease=100.0)


@pytest.fixture
def contest(data: TrainingData) -> Contest:
    ages = np.array([0.0, 3.0], np.float32)
    return Contest(
        known=data,
        associations={"cosine": data.full.pairs},
        daily=DailyCounts(ages=ages, counts=csr_array(np.stack([data.full.popularity, np.ones(data.num_items, np.float32)]))),
        sequences=[[0, 1, 2], [5, 6, 7, 8]],
        sequences_are_sessions=True,
        factors=FACTORS,
        triggers=np.array([0, 7, data.num_items], np.int32),  # the last one was not known yet
    )


def truth(data: TrainingData) -> csr_array:
    return csr_array(data.holdout[np.array([0, 7, 8])])


def played(contest: Contest, tuned: Tuned, settings: BacktestSettings) -> tuple[dict[str, np.ndarray], list[str]]:
    """Lists by baseline, and the notes."""
    notes: list[str] = []
    return dict(contest.baselines(tuned, settings, note=notes.append)), notes


def test_settings_of_an_earlier_cut_serve_a_later_one(contest: Contest, data: TrainingData) -> None:
    earlier = replace(contest, known=replace(data, full=data.fit))
    tuned = earlier.tune(truth(data), SETTINGS)
    lists, notes = played(contest, tuned, SETTINGS)
    assert list(lists) == ["popularity", "counts", "smooth", "smooth_svd", "cosine", "cosine+popularity", "content", "ease"]
    assert not notes
    assert set(contest.families(tuned, SETTINGS)) == {"late_blend", "rrf", "quota"}
    assert all(found.shape == (3, 100) for found in lists.values())


def test_counts_are_smoothed_by_the_popularity_that_ranks_best(contest: Contest, data: TrainingData) -> None:
    engagement = contest.engagement(TUNED)
    decayed = data.full.popularity + 2.0 ** (-3 / TUNED.half_life_days)
    np.testing.assert_allclose(engagement.smooth.popularity, decayed, rtol=1e-6)
    assert engagement.smooth.matrix.pairs is data.full.pairs
    lists, _ = played(contest, replace(TUNED, smooth=SmoothWeights(prior_weight=1e9)), SETTINGS)
    np.testing.assert_array_equal(lists["smooth"], lists["popularity"])


def test_a_prior_for_rare_items_gives_their_popularity_more_say(contest: Contest, data: TrainingData) -> None:
    wanted, found = (contest.engagement(replace(TUNED, prior_users=prior)).factorization for prior in (0.0, 3.0))
    num_users = data.full.num_users
    share = (num_users / (num_users + 3))[:, None]
    np.testing.assert_allclose(found.trigger, share * wanted.trigger, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.target, wanted.target)


def test_ease_that_is_left_out_is_noted(contest: Contest, data: TrainingData) -> None:
    small = SETTINGS.model_copy(update={"ease_max_items": data.num_items - 1})
    for tuned in (TUNED, contest.tune(truth(data), small)):  # lambda of an earlier cut that was small enough, and none at all
        lists, notes = played(contest, tuned, small)
        assert "ease" not in lists
        assert notes == ["EASE is left out: found 77 items, allowed are 76; raise backtest.ease_max_items to run it"]
    lists, (note,) = played(contest, replace(TUNED, ease=None), SETTINGS)  # the catalog has shrunk since
    assert "ease" not in lists
    assert "found no lambda" in note
    assert "backtest.ease_max_items" in note
    assert "ease" in played(contest, TUNED, SETTINGS.model_copy(update={"ease_max_items": data.num_items}))[0]


def _missing(package: str) -> Callable[..., np.ndarray]:
    def lists(*args: object, **kwargs: object) -> np.ndarray:
        raise MachineError(f"{package} is not installed")

    return lists


@pytest.mark.parametrize(("missing", "name", "other"), [("als_lists", "als", "item2vec"), ("item2vec_lists", "item2vec", "als")])
def test_a_missing_library_costs_only_its_own_baseline(
    contest: Contest, monkeypatch: pytest.MonkeyPatch, missing: str, name: str, other: str
) -> None:
    for function in ("als_lists", "item2vec_lists"):
        monkeypatch.setattr(external, function, lambda triggers, **options: np.full((len(triggers), options["k"]), -1, np.int32))
    monkeypatch.setattr(external, missing, _missing("that"))
    lists, notes = played(contest, TUNED, SETTINGS.model_copy(update={"external_baselines": True}))
    assert other in lists
    assert name not in lists
    assert notes == ["that is not installed"]


@pytest.mark.parametrize(
    ("longest", "sessions", "window"),
    [(4, True, 4), (60, True, 60), (200, True, 60), (0, True, 1), (200, False, 5), (4, False, 5)],
)
def test_the_window_of_item2vec_is_the_session(
    contest: Contest, monkeypatch: pytest.MonkeyPatch, longest: int, sessions: bool, window: int
) -> None:
    asked = {}

    def lists(triggers: np.ndarray, **options: object) -> np.ndarray:
        asked.update(options)
        return np.full((len(triggers), 100), -1, np.int32)

    monkeypatch.setattr(external, "item2vec_lists", lists)
    made = replace(contest, sequences=[[0] * longest, [1, 2]] if longest else [], sequences_are_sessions=sessions)
    played(made, TUNED, SETTINGS.model_copy(update={"external_baselines": True}))
    assert asked["window"] == window


def test_it_factorizes_once(contest: Contest, data: TrainingData, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*args: object, **kwargs: object) -> object:
        calls.append(args)
        return Spectral(*args, **kwargs)

    monkeypatch.setattr(contests, "Spectral", counted)
    played(contest, contest.tune(truth(data), SETTINGS), SETTINGS)
    contest.families(TUNED, SETTINGS)
    assert len(calls) == 1
    again = factorize(data.full, np.zeros((data.num_items, 0), np.float32), weights=FACTORS, seed=0)
    made = contest.engagement(TUNED).factorization
    np.testing.assert_array_equal(made.trigger, again.trigger)
    np.testing.assert_array_equal(made.target, again.target)
