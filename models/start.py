"""Where a training starts: weights chosen on the last slice of engagements, a scorer fitted there, and the encoder at its starting point.

    choose      the factorization's weights, by what followed the history before the holdout
    rehearse    train an encoder on that history as the night's own will be, and fit the merge scorer beside it
    prepare     both, and the factorization of everything known with those weights

The rehearsal is what the scorer's weights mean: beside an encoder at its starting point it would learn how far to trust another one than
that which it reads afterwards. Rank 0 chooses and fits; all workers train.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from conf.errors import TableError, TrainingError
from conf.settings import ModelSettings
from models.data import Floats, Ints, TrainingData
from models.factorization import Calibrated, Factorization, ScoreWeights, calibrate, factorize, log_popularity, sample_triggers
from models.fine_tuning import fine_tune
from models.mtmh import Mtmh, SignalStart, Start
from models.resume import Keeper, Saved
from models.scorer import MIN_TRIGGERS, CandidateSource, HeadVectors, Scorer, fit_scorer
from models.spec import REHEARSAL, Progress, Stopwatch, TrainingSpec
from models.user_level import UserLevel
from models.workers import Workers

_STAY = 2.0  # standard errors that a gain on the holdout must exceed to move a weight from last night's
_START_TEMPERATURE = 3.0  # likelihood chose 2 to 4 on the development sets; what stands without a holdout


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What rank 0 chose on the holdout.

    Attributes:
        weights: of the engagement score.
        content_share: of the relevance head's start.
        search: every setting tried, with its recall.
        metrics: numbers for the gates.
        notes: sentences for the ledger.
    """

    weights: ScoreWeights
    content_share: float
    search: list[dict[str, float]]
    metrics: dict[str, float]
    notes: list[str]

    def to_content(self) -> dict[str, Any]:
        """As JSON."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(Choice)} | {
            "weights": dataclasses.asdict(self.weights)
        }

    @classmethod
    def from_content(cls, content: Mapping[str, Any]) -> Self:
        """What `to_content` wrote."""
        return cls(**{**content, "weights": ScoreWeights(**content["weights"])})


@dataclass(frozen=True, kw_only=True)
class Plan(Choice):
    """The choice, and the merge scorer that was fitted by it; `metrics` include what that reached."""

    scorer: Scorer

    def to_content(self) -> dict[str, Any]:
        """As JSON."""
        return {**super().to_content(), "scorer": self.scorer.to_content()}

    @classmethod
    def from_content(cls, content: Mapping[str, Any]) -> Self:
        """What `to_content` wrote."""
        return super().from_content({**content, "scorer": Scorer.from_content(content["scorer"], where="the saved training")})


def prepare(
    data: TrainingData, spec: TrainingSpec, workers: Workers, *, progress: Progress | None, clock: Stopwatch, saved: Saved | None
) -> tuple[Plan | None, Mtmh]:
    """Rank 0's plan (None elsewhere), and the encoder at its starting point on every worker.

    Args:
        data: of the night.
        spec: of the training.
        workers: all that take part.
        progress: rank 0's.
        clock: told what calibration and rehearsal took.
        saved: a rehearsal that was killed, to go on from.

    Raises:
        TrainingError: the loss of the rehearsal is not a number.
    """
    choice, fit = _choose(data, spec, workers, progress, saved)
    clock.stop("calibration_seconds")
    scorer, reached = _rehearse(data, spec, workers, choice, fit, progress, saved)
    clock.stop("rehearsal_seconds")
    if choice is None:
        return None, _shared_model(data, spec, workers, [], content_share=0.5)
    plan = Plan(**{**vars(choice), "metrics": choice.metrics | reached}, scorer=scorer)
    seed, alone = spec.training.seed, plan.weights.changed("prior_users", 0.0)
    full = factorize(data.full, data.content, weights=plan.weights, seed=seed)
    signals = [factorize(data.history_of(name), data.content, weights=alone, seed=seed) for name in data.signals]
    return plan, _shared_model(data, spec, workers, [full, *signals], content_share=plan.content_share)


def go_on(data: TrainingData, spec: TrainingSpec, saved: Saved) -> tuple[Plan, Mtmh]:
    """Plan and encoder of a killed training as they were saved."""
    plan = Plan.from_content(saved.plan)
    return plan, _restored_model(data, spec, saved, plan)


def user_level_weight(choice: Choice | None, workers: Workers) -> float:
    """Rank 0's, for every worker."""
    value = torch.tensor([choice.weights.user_level_weight if choice else 0.0], dtype=torch.float64)
    return float(workers.share(value))


def keeper(spec: TrainingSpec, phase: str, choice: Choice) -> Keeper:
    """Saves what rank 0 has of a phase; `choice` is a `Plan` where the scorer is fitted."""
    return Keeper(Path(spec.folder), key=spec.key, phase=phase, plan=choice.to_content(), every_seconds=spec.training.checkpoint_seconds)


def find_saved(spec: TrainingSpec, workers: Workers) -> Saved | None:
    """What an earlier attempt at this training has left, for all workers or for none.

    Raises:
        TrainingError: rank 0 finds it, and another worker does not.
    """
    folder = Path(spec.folder)
    saved = Saved.find(folder, key=spec.key) if workers.rank == 0 else None
    if not int(workers.share(torch.tensor([saved is not None], dtype=torch.int64))):
        return None
    saved = saved or Saved.find(folder, key=spec.key)
    if saved is None:
        raise TrainingError(f"rank {workers.rank} does not find the saved training in {folder}, which rank 0 reads; all workers must share "
                            "this folder: set lake.artifacts to one that they do")  # fmt: skip
    return saved


# --- the choice, on rank 0 ---


def _choose(
    data: TrainingData, spec: TrainingSpec, workers: Workers, progress: Progress | None, saved: Saved | None
) -> tuple[Choice | None, Factorization | None]:
    """The weights, and the factorization with them of the history before the holdout, unless a saved rehearsal knows both better."""
    if workers.rank:
        return None, None
    if saved:
        return Choice.from_content(saved.plan), None
    largest = min(spec.model.dimension, data.num_items - 1)
    if progress:
        progress.show("calibration")
    usable, num_triggers = _holdout_triggers(data, spec)
    before = Before.read(spec)
    calibrated = calibrate(
        data.fit,
        data.content,
        data.holdout,
        usable,
        start=dataclasses.replace(before.weights, dimension=min(before.weights.dimension, largest)),
        largest=largest,
        content_share=before.content_share,
        seed=spec.training.seed,
        stay=_STAY if before.scorer else 0.0,
        watch=partial(progress.show, "calibration") if progress else None,
    )
    chosen = {name: float(value) for name, value in dataclasses.asdict(calibrated.weights).items()}
    reached = {"holdout_recall_at_100": calibrated.recall} if len(usable) else {}
    choice = Choice(
        weights=calibrated.weights,
        content_share=calibrated.content_share,
        search=calibrated.log,
        metrics={**chosen, "content_share": calibrated.content_share, "num_holdout_triggers": float(num_triggers), **reached},
        notes=[before.said, *_notes(calibrated, num_triggers)],
    )
    return choice, calibrated.fit


def _holdout_triggers(data: TrainingData, spec: TrainingSpec) -> tuple[Ints, int]:
    """(T,) triggers to calibrate on, the same on every worker, none where they are too few; and how many there are."""
    keys, most = data.full.keys, spec.training.num_validation_triggers
    triggers = sample_triggers(data.holdout, keys=keys, maximum=most, seed=spec.training.seed)
    return (triggers if len(triggers) >= MIN_TRIGGERS else triggers[:0]), len(triggers)


@dataclass(frozen=True, kw_only=True)
class Before:
    """What the calibration starts from: the settings, or an earlier night's model, which has a scorer; and a word about it."""

    weights: ScoreWeights
    content_share: float
    scorer: Scorer | None = None
    said: str = "starts cold"

    @classmethod
    def read(cls, spec: TrainingSpec) -> Self:
        """From `spec.previous`; a model of other code, which cannot be read, is said and left alone."""
        settings = spec.model
        cold = cls(
            weights=ScoreWeights(
                user_level_weight=settings.user_level_weight,
                dimension=settings.dimension,
                target_norm_exponent=settings.target_norm_exponent,
                popularity_weight=settings.popularity_weight,
                temperature=_START_TEMPERATURE,
                prior_users=1.0,
            ),
            content_share=settings.content_share,
        )
        if spec.previous is None:
            return cold
        folder = Path(spec.previous)
        try:
            chosen = json.loads((folder / "metrics.json").read_text())
            weights = {field.name: chosen[field.name] for field in dataclasses.fields(ScoreWeights)}
            return cls(
                weights=ScoreWeights(**weights | {"dimension": int(weights["dimension"])}),
                content_share=chosen["content_share"],
                scorer=Scorer.load(folder / "scorer.json"),
                said=f"starts from the weights and the scorer of {folder.parent.name}",
            )
        except (OSError, KeyError, ValueError, TableError) as error:
            return dataclasses.replace(cold, said=f"starts cold: the model in {folder} cannot be read ({error})")


def _notes(calibrated: Calibrated, num_triggers: int) -> list[str]:
    if not calibrated.log:
        stands = "the settings' weights and a fixed mixture stand"
        return [f"scores not calibrated: {num_triggers} triggers in the holdout, {MIN_TRIGGERS} wanted; {stands}"]
    weights = ", ".join(f"{name} {value:g}" for name, value in dataclasses.asdict(calibrated.weights).items())
    reached = f"content_share {calibrated.content_share:g}, holdout recall@100 {calibrated.recall:.4f}"
    return [f"calibrated on {num_triggers} holdout triggers: {weights}, {reached}"]


# --- the rehearsal, on all workers ---


def _rehearse(
    data: TrainingData,
    spec: TrainingSpec,
    workers: Workers,
    choice: Choice | None,
    fit: Factorization | None,
    progress: Progress | None,
    saved: Saved | None,
) -> tuple[Scorer, dict[str, float]]:
    """Rank 0's scorer (elsewhere one that nobody reads), and what it reached.

    Signals and exposures are not counted before the holdout; what a head learns of signals it learns here of all co-engagement.
    """
    earlier = Before.read(spec).scorer or Scorer.mixture()
    usable, _ = _holdout_triggers(data, spec)
    if not len(usable):
        return earlier, {}
    past = dataclasses.replace(data, full=data.fit, signals={}, exposures=None)
    weight = user_level_weight(choice, workers)
    saves = keeper(spec, REHEARSAL, choice) if choice else None
    spec = dataclasses.replace(spec, model=_without_signals(spec.model), signals={})
    if saved:
        model = _restored_model(past, spec, saved, Choice.from_content(saved.plan))
    else:
        model = _shared_model(past, spec, workers, [fit] if fit else [], content_share=choice.content_share if choice else 0.5)
    fine_tune(model, past, spec, workers, user_level_weight=weight, phase=REHEARSAL, progress=progress, saved=saved, keeper=saves)
    if choice is None:
        return earlier, {}
    user_level = UserLevel.of(past.full.user_items, min_users=spec.min_users)
    source = candidate_source(past, head_vectors(model), user_level)
    candidates = source.propose(usable, data.holdout[usable], widths=spec.widths)
    keys = data.full.keys[usable[np.unique(candidates.segment)]]
    return fit_scorer(candidates, keys=keys, seed=spec.training.seed, previous=earlier)


def _without_signals(model: ModelSettings) -> ModelSettings:
    heads = {
        name: head.model_copy(update={"engagement": head.engagement + sum(head.signals.values()), "signals": {}})
        for name, head in model.heads.items()
    }
    return model.model_copy(update={"heads": heads})


def head_vectors(model: Mtmh) -> dict[str, HeadVectors]:
    """Of the whole catalog, by head."""
    return {name: HeadVectors(trigger=trigger.numpy(), target=target.numpy()) for name, (trigger, target) in model.vectors().items()}


def candidate_source(data: TrainingData, vectors: Mapping[str, HeadVectors], user_level: UserLevel) -> CandidateSource:
    """Candidates as of what `data.full` knows, from vectors and user-level co-engagement that know no more."""
    return CandidateSource(
        history=data.full,
        user_level=user_level,
        content=data.content,
        engagement=vectors["engagement"],
        relevance=vectors["relevance"],
        popularity_p=np.exp(log_popularity(data.full.popularity)),
        eligible=data.eligible,
    )


# --- the encoder ---


def build_model(
    start: Factorization,
    content: Floats,
    settings: ModelSettings,
    content_share: float,
    *,
    seed: int,
    signals: Mapping[str, Factorization] | None = None,
) -> Mtmh:
    """An encoder at its starting point, with that of each signal; the residual layers' first weights are drawn by seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Mtmh(
            start=Start(
                **_id_parts(start),
                content=torch.tensor(content),  # a copy: the table hands out read-only memory
                signals={name: SignalStart(**_id_parts(of)) for name, of in (signals or {}).items()},
                log_popularity=torch.from_numpy(start.log_popularity),
                log_prior=torch.from_numpy(start.log_prior),
                known=torch.from_numpy(start.known),
            ),
            hidden_dimension=settings.hidden_dimension,
            heads={name: head.tasks for name, head in settings.heads.items()},
            temperature=start.weights.temperature,
            popularity_weight=start.weights.popularity_weight,
            content_share=content_share,
            max_id_rows=settings.max_id_rows,
            shared=settings.encoder == "shared",
            blind={"trigger", "target"} - set(settings.content_sides),
        )


def _id_parts(start: Factorization) -> dict[str, Tensor]:
    names = ("trigger", "target", "content_to_trigger", "content_to_target")
    return {name: torch.from_numpy(getattr(start, name)) for name in names}


def _shared_model(
    data: TrainingData, spec: TrainingSpec, workers: Workers, starts: Sequence[Factorization], *, content_share: float
) -> Mtmh:
    """The encoder at rank 0's `starts`, of everything and of each signal (none elsewhere), on every worker."""
    shape = torch.tensor([starts[0].trigger.shape[1], int(starts[0].known.sum())] if starts else [0, 0])
    dimension, num_known = workers.share(shape).tolist()
    full, *of_signals = starts or [_blank(data, dimension, num_known)] * (1 + len(data.signals))
    signals = dict(zip(data.signals, of_signals, strict=True))
    model = build_model(full, data.content, spec.model, content_share, seed=spec.training.seed, signals=signals)
    for tensor in model.state_dict().values():
        workers.share(tensor)
    return model


def _restored_model(data: TrainingData, spec: TrainingSpec, saved: Saved, choice: Choice) -> Mtmh:
    blank = _blank(data, min(choice.weights.dimension, data.num_items - 1), saved.num_id_rows)
    signals = dict.fromkeys(data.signals, blank)
    model = build_model(blank, data.content, spec.model, choice.content_share, seed=spec.training.seed, signals=signals)
    saved.restore_model(model)
    return model


def _blank(data: TrainingData, dimension: int, num_known: int = 0) -> Factorization:
    """Zeros of the right shape, with so many known items, for a worker that is about to receive the numbers."""
    items, content = data.content.shape
    weights = ScoreWeights(
        user_level_weight=0, dimension=dimension, target_norm_exponent=0, popularity_weight=0, temperature=1, prior_users=0
    )
    return Factorization(
        trigger=np.zeros((items, dimension), np.float32),
        target=np.zeros((items, dimension), np.float32),
        content_to_trigger=np.zeros((content, dimension), np.float32),
        content_to_target=np.zeros((content, dimension), np.float32),
        log_popularity=np.zeros(items, np.float32),
        log_prior=np.zeros(items, np.float32),
        known=np.arange(items) < num_known,
        weights=weights,
    )
