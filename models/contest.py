"""Everything that MTMH has to beat on one cut, from what was known at that cut and weights that validation chose.

A baseline only ranks: association scores are columns of the pair table, computed once in Spark. Lists of association scores are offered
twice, as they are and with popularity behind them (`<name>+popularity`), since recall@K of a short list says how short it is.

Shapes: `T` judged triggers, `N` items known at the cut, `D` days.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from conf.errors import MachineError
from conf.settings import BacktestSettings
from models import baselines, external
from models.baselines import Smooth, SmoothSvd, SmoothWeights
from models.blends import Mixes, blend_lists
from models.data import Floats, History, Ints, Sparse, TrainingData
from models.factorization import PRIOR_USERS, Factorization, ScoreWeights, Spectral, recall

LIST_LENGTH = 100
TRAINED = ("smooth", "smooth_svd", "ease", "als", "item2vec")
"""Baselines that cannot be looked up in the tables of a night."""
_HALF_LIVES = (7.0, 14.0, 30.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1e9)
_SEED = 0
_WINDOW, _MAX_WINDOW = 5, 60  # positions; the time of item2vec grows with it, and no more items of a session are judged either
_FAMILIES = {"late_blend": "late_blend", "reciprocal_rank_fusion": "rrf", "quota": "quota"}


@dataclass(frozen=True, kw_only=True)
class DailyCounts:
    """(D,) ages of days in days before the cut's end, ascending, and (D, N) users of each item on them."""

    ages: Floats
    counts: csr_array

    def popularity(self, half_life_days: float) -> Floats:
        """(N,) decayed user-days."""
        weight = np.exp2(-self.ages.astype(np.float64) / half_life_days)
        return np.asarray(weight @ self.counts, dtype=np.float32)


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What validation chose for the baselines, of use on any later cut; `ease` is None where the catalog was too large for it."""

    half_life_days: float
    smooth: SmoothWeights
    prior_users: float
    share: float
    ease: float | None

    def described(self) -> dict[str, str]:
        """For the report."""
        half_life = "none" if self.half_life_days >= 1e9 else f"{self.half_life_days:g} days"
        smooth = f"b {self.smooth.user_level_weight:g}, mu {self.smooth.prior_weight:g}, alpha {self.smooth.popularity_exponent:g}"
        smooth_svd = f"{self.share:g}, prior users {self.prior_users:g}"
        chosen = {"popularity half-life": half_life, "smooth": smooth, "smooth_svd share of the factorization": smooth_svd}
        return chosen if self.ease is None else chosen | {"ease lambda": f"{self.ease:g}"}


@dataclass(frozen=True, kw_only=True)
class Contest:
    """One cut.

    Attributes:
        known: what training read.
        associations: (N, N) per association column, filled at the rows of the triggers.
        daily: users per day and item.
        sequences: item indices in order of time, per session or user.
        sequences_are_sessions: whether it is per session.
        factors: weights of the factorization that the night calibrated on its own holdout.
        triggers: (T,) item indices.
    """

    known: TrainingData
    associations: Mapping[str, csr_array]
    daily: DailyCounts
    sequences: Sequence[Sequence[int]]
    sequences_are_sessions: bool
    factors: ScoreWeights
    triggers: Ints

    def tune(self, truth: Sparse, settings: BacktestSettings) -> Tuned:
        """Choose the baselines' weights on (T, N) future weight: plain recall@100 decides."""
        known, triggers, half_life = self.known, self.triggers, self._half_life(truth)
        history = self._history(half_life)
        smooth = baselines.tune_smooth(history, truth, triggers, eligible=known.eligible, seed=_SEED)
        counted = Smooth.of(history, smooth)
        factorizations = {prior: self._factorization(prior) for prior in PRIOR_USERS}
        prior, share = baselines.tune_smooth_svd(counted, factorizations, truth, triggers, eligible=known.eligible, seed=_SEED)
        ease = self._ease_lambda(truth, settings)
        return Tuned(half_life_days=half_life, smooth=smooth, prior_users=prior, share=share, ease=ease)

    def baselines(self, tuned: Tuned, settings: BacktestSettings, *, note: Callable[[str], None]) -> Iterator[tuple[str, Ints]]:
        """Name and (T, 100) lists of every baseline; one that cannot run here is noted and left out."""
        known, triggers, history = self.known, self.triggers, self._history(tuned.half_life_days)
        popularity = history.popularity
        common: dict[str, Any] = {"eligible": known.eligible, "k": LIST_LENGTH}
        yield "popularity", baselines.popularity_lists(triggers, popularity=popularity, **common)
        yield "counts", baselines.count_lists(triggers, counts=known.full.pairs, popularity=popularity, **common)
        yield "smooth", baselines.smooth_lists(triggers, history=history, weights=tuned.smooth, **common)
        yield "smooth_svd", baselines.engagement_lists(triggers, engagement=self.engagement(tuned), **common)
        for name, scores in self.associations.items():
            for suffix, backfill in (("", False), ("+popularity", True)):
                found = baselines.pair_score_lists(triggers, scores=scores, popularity=popularity, backfill=backfill, **common)
                yield name + suffix, found
        yield "content", baselines.content_lists(triggers, content=known.content, **common)
        yield from self._ease(tuned, settings, popularity, note)
        if settings.external_baselines:
            yield from self._external(note)

    def engagement(self, tuned: Tuned) -> SmoothSvd:
        """The best engagement-only scores, which the blends start from."""
        smooth = Smooth.of(self._history(tuned.half_life_days), tuned.smooth)
        return SmoothSvd(smooth=smooth, factorization=self._factorization(tuned.prior_users), share=tuned.share)

    def _history(self, half_life_days: float) -> History:
        """The cut's, with the popularity that counts are smoothed by under the half-life that suits popularity alone best."""
        return replace(self.known.full, popularity=self.daily.popularity(half_life_days))

    @cached_property
    def _spectral(self) -> Spectral:
        """Made once, as the tuning, the baselines and the families all start from it."""
        no_content = np.zeros((self.known.num_items, 0), dtype=np.float32)
        weight, dimension = self.factors.user_level_weight, self.factors.dimension
        return Spectral(self.known.full, no_content, user_level_weight=weight, dimension=dimension, seed=_SEED)

    def _factorization(self, prior_users: float) -> Factorization:
        """By the weights that the night calibrated. Without content there is nothing to predict a row from: `prior_users` shortens the
        rows of rare triggers, for which popularity then says more.
        """
        return self._spectral.factorization(replace(self.factors, prior_users=prior_users))

    def families(self, tuned: Tuned, settings: BacktestSettings) -> dict[str, dict[str, Ints]]:
        """Family -> mix -> (T, 100) lists of the blends of the best engagement-only scores with content."""
        mixes = Mixes(late_blend=settings.blend_values, reciprocal_rank_fusion=settings.content_shares, quota=settings.content_shares)
        known = self.known
        found = blend_lists(
            self.triggers,
            engagement=self.engagement(tuned),
            content=known.content,
            eligible=known.eligible,
            k=LIST_LENGTH,
            mixes=mixes,
        )
        return {_FAMILIES[name]: {f"{mix:g}": lists for mix, lists in swept.items()} for name, swept in found.items()}

    def _half_life(self, truth: Sparse) -> float:
        """Of popularity, by recall@100."""
        rows = np.broadcast_to(np.float32(0), (len(self.triggers), self.known.num_items))
        inside = np.minimum(self.triggers, self.known.num_items - 1)

        def reached(half_life_days: float) -> float:
            popularity = np.where(self.known.eligible, self.daily.popularity(half_life_days), -np.inf).astype(np.float32)
            some = np.flatnonzero(np.asarray(truth.sum(axis=1)).ravel() > 0)[:500]  # everybody gets the same list: 500 triggers suffice
            return recall(rows[some] + popularity, inside[some], truth[some], LIST_LENGTH)

        return max(_HALF_LIVES, key=reached)

    def _ease_lambda(self, truth: Sparse, settings: BacktestSettings) -> float | None:
        if self.known.num_items > settings.ease_max_items:
            return None
        return baselines.tune_ease(
            self.known.full, truth, self.triggers, eligible=self.known.eligible, max_items=settings.ease_max_items, seed=_SEED
        )

    def _ease(
        self, tuned: Tuned, settings: BacktestSettings, popularity: Floats, note: Callable[[str], None]
    ) -> Iterator[tuple[str, Ints]]:
        """The catalog is looked at again: it grows from the cut that lambda was chosen on to this one."""
        found, allowed = self.known.num_items, settings.ease_max_items
        if found > allowed:
            note(f"EASE is left out: found {found:,} items, allowed are {allowed:,}; raise backtest.ease_max_items to run it")
            return
        if tuned.ease is None:
            note(
                "EASE is left out: found no lambda, as the cut where that is chosen had more items than allowed, "
                f"{allowed:,}; raise backtest.ease_max_items to run it"
            )
            return
        weights = baselines.ease_weights(self.known.full.user_items, regularization=tuned.ease, max_items=allowed)
        lists = baselines.ease_lists(
            self.triggers, weights=weights, popularity=popularity, eligible=self.known.eligible, k=LIST_LENGTH, backfill=True
        )
        yield "ease", lists

    def _external(self, note: Callable[[str], None]) -> Iterator[tuple[str, Ints]]:
        """Each library for itself: where one is missing, the other one still runs."""
        for name, lists_of in {"als": self._als, "item2vec": self._item2vec}.items():
            try:
                lists = lists_of()
            except MachineError as error:
                note(str(error))
                continue
            yield name, lists

    def _als(self) -> Ints:
        known = self.known
        return external.als_lists(self.triggers, user_items=known.full.user_items, eligible=known.eligible, k=LIST_LENGTH, seed=_SEED)

    def _item2vec(self) -> Ints:
        """With a window over the whole session, up to 60 items: what lies in a basket is often engaged at one time and then ordered by
        id, so that any two of its items are as near as any other two. A user's items have an order, and keep the usual window.
        """
        longest = max(map(len, self.sequences), default=1)
        return external.item2vec_lists(
            self.triggers,
            sequences=self.sequences,
            eligible=self.known.eligible,
            k=LIST_LENGTH,
            window=min(longest, _MAX_WINDOW) if self.sequences_are_sessions else _WINDOW,
            seed=_SEED,
        )
