"""One training: calibrate on the last slice of engagements, start the encoder there, fine-tune it, write everything a night needs.

`run_rank` is what each torch worker runs. The output folder then holds

    status/rank-N.json   ok, error (traceback), seconds, metrics: what the job believes
    progress.json        done and total steps, loss, items_per_s: rewritten about once a second by rank 0
    history.json         loss of each task per step; now and then the cosine between the tasks' gradients on the shared encoder
    metrics.json, notes.json   numbers for the gates, sentences for the ledger
    checkpoint/          models.checkpoint
    embeddings/*.parquet item_id, head, trigger_vector, target_vector
    scorer.json          models.scorer
    signals/             what else the scorer reads: trends.npy (N, S), and models.user_level

and, until the job has taken these over, models.resume: a training that was killed goes on from there.

Deterministic for a seed and a thread count, on the processor. Several workers take the rows of one global batch and add up gradients: the
result is one worker's to rounding. Shapes as in models.batches.
"""

import dataclasses
import json
import math
import os
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from conf.errors import TableError, TrainingError
from conf.faults import reach
from conf.settings import ModelSettings, TrainingSettings
from models import losses
from models.batches import Batch, Batches
from models.checkpoint import save_checkpoint
from models.data import Floats, TableRef, TrainingData, load_training_data
from models.factorization import Calibrated, CoEngagement, Factorization, ScoreWeights, calibrate, factorize, sample_triggers
from models.losses import Loss
from models.mtmh import COSINE_TASKS, Head, Mtmh, SignalStart, Start
from models.resume import Keeper, Optimization, Saved, training_key
from models.scorer import MIN_TRIGGERS, READS, CandidateSource, HeadVectors, Scorer, Widths, fit_scorer
from models.user_level import UserLevel
from models.workers import COSINE, Workers, on

_CONFLICT_EVERY = 10  # steps between looks at the gradients' cosine
_PART_ITEMS = 50_000  # rows of an embeddings file


@dataclass(frozen=True, kw_only=True)
class TrainingSpec:
    """Everything a worker must know, as JSON.

    Attributes:
        tables: pinned versions by table name.
        run_date: last day that counts.
        half_life_days: of the landmark weights.
        symmetric: whether the window of the pairs is.
        min_users: distinct users below which nothing is known of two items.
        folder: where the output goes; for several machines a shared one.
        model: encoder and heads.
        training: optimization.
        signals: half-life in days of the signals that heads train on, by name.
        previous: folder of the model of an earlier night to start from; None: start cold.
    """

    tables: Mapping[str, TableRef]
    run_date: date
    half_life_days: float
    symmetric: bool
    min_users: int
    folder: str
    model: ModelSettings
    training: TrainingSettings
    signals: Mapping[str, float] = dataclasses.field(default_factory=dict)
    previous: str | None = None

    def to_json(self) -> str:
        """What `from_json` reads."""
        content = {
            "tables": {name: dataclasses.asdict(ref) for name, ref in self.tables.items()},
            "run_date": self.run_date.isoformat(),
            "half_life_days": self.half_life_days,
            "symmetric": self.symmetric,
            "min_users": self.min_users,
            "folder": self.folder,
            "model": self.model.model_dump(mode="json"),
            "training": self.training.model_dump(mode="json"),
            "signals": dict(self.signals),
            "previous": self.previous,
        }
        return json.dumps(content)

    @property
    def key(self) -> str:
        """Hash of what decides the numbers that come out, and not where they go."""
        return training_key(dataclasses.replace(self, folder="").to_json() + json.dumps(READS))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` wrote."""
        content = json.loads(text)
        return cls(
            tables={name: TableRef(**ref) for name, ref in content["tables"].items()},
            run_date=date.fromisoformat(content["run_date"]),
            half_life_days=content["half_life_days"],
            symmetric=content["symmetric"],
            min_users=content["min_users"],
            folder=content["folder"],
            model=ModelSettings.model_validate(content["model"]),
            training=TrainingSettings.model_validate(content["training"]),
            signals=content["signals"],
            previous=content["previous"],
        )


class Progress:
    """Rank 0's `progress.json`, replaced at most once a second."""

    def __init__(self, folder: Path, *, total: int) -> None:
        self.path, self.total = folder / "progress.json", total
        self.started = self.written = time.monotonic()

    def show(self, phase: str, done: int = 0, loss: float | None = None, num_triggers: int = 0, *, now: bool = False) -> None:
        """State of the work; `loss` and speed once there are some."""
        clock = time.monotonic()
        if phase != "training" or done == 0:
            self.started = clock
        elif clock - self.written < 1 and not now:
            return
        self.written = clock
        speed = done * num_triggers / max(clock - self.started, 1e-9)
        _write(self.path, {"phase": phase, "done": done, "total": self.total, "loss": loss, "items_per_s": round(speed, 1)})


def run_rank(spec_json: str) -> None:
    """One worker's whole life. Any exception is left in its status file and raised again.

    Args:
        spec_json: `TrainingSpec.to_json()`.
    """
    spec = TrainingSpec.from_json(spec_json)
    rank, started = int(os.environ.get("RANK", "0")), time.monotonic()
    status = Path(spec.folder) / "status" / f"rank-{rank}.json"
    status.parent.mkdir(parents=True, exist_ok=True)
    try:
        with Workers.join(device=spec.training.device, timeout_seconds=spec.training.timeout_seconds) as workers:
            workers.prepare(mixed_precision=spec.training.mixed_precision)
            reach("train_model.rank.started")
            decay: dict[str, Any] = {"half_life_days": spec.half_life_days, "signals": spec.signals}
            data = load_training_data(spec.tables, run_date=spec.run_date, symmetric=spec.symmetric, **decay)
            metrics = train(data, spec, workers)
            reach("train_model.rank.written")
    except BaseException:
        _write(status, {"ok": False, "error": traceback.format_exc(), "seconds": time.monotonic() - started, "metrics": {}})
        raise
    _write(status, {"ok": True, "error": None, "seconds": time.monotonic() - started, "metrics": metrics})


def train(data: TrainingData, spec: TrainingSpec, workers: Workers) -> dict[str, float]:
    """Calibrate, start, fine-tune, write; returns the metrics (only rank 0 writes).

    Raises:
        TrainingError: there is no item, or the loss is not a number.
    """
    if data.num_items < 2:
        raise TrainingError(f"item_features holds {data.num_items} items; wanted at least 2: check the catalog and the run date")
    folder = Path(spec.folder)
    folder.mkdir(parents=True, exist_ok=True)
    progress = Progress(folder, total=spec.training.num_steps) if workers.rank == 0 else None
    clock = _Stopwatch()
    saved = _saved(folder, spec, workers)
    plan, model = _resumed(data, spec, saved) if saved else _started(data, spec, progress, workers)
    clock.stop("calibration_seconds")
    workers.wait()  # nobody saves before all have read
    keeper = _keeper(folder, spec, plan) if plan and progress else None
    weight = _user_level_weight(plan, workers)
    history = fine_tune(model, data, spec, workers, user_level_weight=weight, progress=progress, saved=saved, keeper=keeper)
    clock.stop("training_seconds")
    if plan is None or progress is None:
        return clock.seconds
    progress.show("writing", spec.training.num_steps)
    metrics = {**plan.metrics, **_final(history), **_describe(model)}
    version = save_checkpoint(folder / "checkpoint", model, vocabulary=data.vocabulary, run={"metrics": metrics, "search": plan.search})
    write_embeddings(folder / "embeddings", model, data)
    plan.scorer.save(folder / "scorer.json")
    write_signals(folder / "signals", data, min_users=spec.min_users)
    clock.stop("writing_seconds")
    _write(folder / "history.json", {"model_version": version, "steps": history})
    _write(folder / "metrics.json", metrics | clock.seconds)
    _write(folder / "notes.json", [*plan.notes, *_resumption(saved, spec)])
    return metrics | clock.seconds


class _Stopwatch:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def stop(self, name: str) -> None:
        """Seconds since the last stop."""
        now = time.monotonic()
        self.seconds[name], self._last = round(now - self._last, 3), now


def _write(path: Path, content: Any) -> None:
    """Whole, or not at all: a reader never sees half of it, and a full disk leaves no empty file."""
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(content))
    beside.replace(path)


# --- calibration, on rank 0 ---


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What rank 0 found out before training: weights, the settings tried for them, the merge scorer, and what to say about it."""

    weights: ScoreWeights
    content_share: float
    search: list[dict[str, float]]
    scorer: Scorer
    metrics: dict[str, float]
    notes: list[str]

    def to_content(self) -> dict[str, Any]:
        """As JSON."""
        rest = {name: getattr(self, name) for name in ("content_share", "search", "metrics", "notes")}
        return {"weights": dataclasses.asdict(self.weights), "scorer": self.scorer.to_content(), **rest}

    @classmethod
    def from_content(cls, content: Mapping[str, Any]) -> Self:
        """What `to_content` wrote."""
        scorer = Scorer.from_content(content["scorer"], where="the saved training")
        return cls(**{**content, "weights": ScoreWeights(**content["weights"]), "scorer": scorer})


def _plan(data: TrainingData, spec: TrainingSpec, progress: Progress | None) -> tuple[Plan, list[Factorization]]:
    """Choose weights on the holdout, fit the merge scorer there, then factorize everything known, and each signal."""
    settings, seed, largest = spec.model, spec.training.seed, min(spec.model.dimension, data.num_items - 1)
    if progress:
        progress.show("calibration")
    triggers = sample_triggers(data.holdout, keys=data.full.keys, maximum=spec.training.num_validation_triggers, seed=seed)
    usable = triggers if len(triggers) >= MIN_TRIGGERS else triggers[:0]
    before = Before.read(spec)
    calibrated = calibrate(
        data.fit,
        data.content,
        data.holdout,
        usable,
        start=dataclasses.replace(before.weights, dimension=min(before.weights.dimension, largest)),
        largest=largest,
        content_share=before.content_share,
        seed=seed,
        stay=_STAY if before.scorer else 0.0,
        watch=partial(progress.show, "calibration") if progress else None,
    )
    scorer, reached = before.scorer or Scorer.mixture(), dict[str, float]()
    if len(usable):
        blank = dict.fromkeys(data.signals, _blank(data, calibrated.fit.trigger.shape[1]))  # heads of signals propose nothing here
        fit_model = build_model(calibrated.fit, data.content, settings, calibrated.content_share, seed=seed, signals=blank)
        source = candidate_source(data, fit_model, calibrated.fit, min_users=spec.min_users)
        candidates = source.propose(usable, data.holdout[usable], widths=Widths())
        keys = data.full.keys[usable[np.unique(candidates.segment)]]
        scorer, reached = fit_scorer(candidates, keys=keys, seed=seed, previous=before.scorer)
    full = factorize(data.full, data.content, weights=calibrated.weights, seed=seed)
    alone = calibrated.weights.changed("prior_users", 0.0)
    signals = [factorize(data.history_of(name), data.content, weights=alone, seed=seed) for name in data.signals]
    chosen = {name: float(value) for name, value in dataclasses.asdict(calibrated.weights).items()}
    metrics = {**chosen, "content_share": calibrated.content_share, "num_holdout_triggers": float(len(triggers)), **reached}
    if len(usable):
        metrics["holdout_recall_at_100"] = calibrated.recall
    plan = Plan(
        weights=calibrated.weights,
        content_share=calibrated.content_share,
        search=calibrated.log,
        scorer=scorer,
        metrics=metrics,
        notes=[before.said, *_notes(calibrated, len(triggers))],
    )
    return plan, [full, *signals]


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


_STAY = 2.0  # standard errors that a gain on the holdout must exceed to move a weight from last night's
_START_TEMPERATURE = 3.0  # likelihood chose 2 to 4 on the development sets; what stands without a holdout


def _notes(calibrated: Calibrated, num_triggers: int) -> list[str]:
    if not calibrated.log:
        stands = "the settings' weights and a fixed mixture stand"
        return [f"scores not calibrated: {num_triggers} triggers in the holdout, {MIN_TRIGGERS} wanted; {stands}"]
    weights = ", ".join(f"{name} {value:g}" for name, value in dataclasses.asdict(calibrated.weights).items())
    reached = f"content_share {calibrated.content_share:g}, holdout recall@100 {calibrated.recall:.4f}"
    return [f"calibrated on {num_triggers} holdout triggers: {weights}, {reached}"]


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


def candidate_source(data: TrainingData, model: Mtmh, start: Factorization, *, min_users: int) -> CandidateSource:
    """Candidates before the holdout, from an encoder that knows no more."""
    vectors = {name: HeadVectors(trigger=pair[0].numpy(), target=pair[1].numpy()) for name, pair in model.vectors().items()}
    return CandidateSource(
        history=data.fit,
        user_level=UserLevel.of(data.fit.user_items, min_users=min_users),
        content=data.content,
        engagement=vectors["engagement"],
        relevance=vectors["relevance"],
        popularity_p=np.exp(start.log_popularity),
        eligible=data.eligible,
    )


def _user_level_weight(plan: Plan | None, workers: Workers) -> float:
    value = torch.tensor([plan.weights.user_level_weight if plan else 0.0], dtype=torch.float64)
    return float(workers.share(value))


def _started(data: TrainingData, spec: TrainingSpec, progress: Progress | None, workers: Workers) -> tuple[Plan | None, Mtmh]:
    """Rank 0's plan (None elsewhere), and its starting point on every worker."""
    plan, starts = _plan(data, spec, progress) if workers.rank == 0 else (None, [])
    shape = torch.tensor([starts[0].trigger.shape[1], int(starts[0].known.sum())] if starts else [0, 0])
    dimension, num_known = workers.share(shape).tolist()
    full, *of_signals = starts or [_blank(data, dimension, num_known)] * (1 + len(data.signals))
    signals = dict(zip(data.signals, of_signals, strict=True))
    model = build_model(full, data.content, spec.model, plan.content_share if plan else 0.5, seed=spec.training.seed, signals=signals)
    for tensor in model.state_dict().values():
        workers.share(tensor)
    return plan, model


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
        known=np.arange(items) < num_known,
        weights=weights,
    )


# --- a training that was killed ---


def _saved(folder: Path, spec: TrainingSpec, workers: Workers) -> Saved | None:
    """What an earlier attempt at this training has left, for all workers or for none."""
    saved = Saved.find(folder, key=spec.key) if workers.rank == 0 else None
    if not int(workers.share(torch.tensor([saved is not None], dtype=torch.int64))):
        return None
    saved = saved or Saved.find(folder, key=spec.key)
    if saved is None:
        raise TrainingError(f"rank {workers.rank} does not find the saved training in {folder}, which rank 0 reads; all workers must share "
                            "this folder: set lake.artifacts to one that they do")  # fmt: skip
    return saved


def _resumed(data: TrainingData, spec: TrainingSpec, saved: Saved) -> tuple[Plan, Mtmh]:
    """Plan and encoder as they were saved."""
    plan = Plan.from_content(saved.plan)
    blank = _blank(data, min(plan.weights.dimension, data.num_items - 1), saved.num_id_rows)
    signals = dict.fromkeys(data.signals, blank)
    model = build_model(blank, data.content, spec.model, plan.content_share, seed=spec.training.seed, signals=signals)
    saved.restore_model(model)
    return plan, model


def _keeper(folder: Path, spec: TrainingSpec, plan: Plan) -> Keeper:
    return Keeper(folder, key=spec.key, plan=plan.to_content(), every_seconds=spec.training.checkpoint_seconds)


def _resumption(saved: Saved | None, spec: TrainingSpec) -> list[str]:
    return [f"training was interrupted, and went on from step {saved.num_steps} of {spec.training.num_steps}"] if saved else []


# --- fine-tuning ---


def fine_tune(
    model: Mtmh,
    data: TrainingData,
    spec: TrainingSpec,
    workers: Workers,
    *,
    user_level_weight: float,
    progress: Progress | None = None,
    saved: Saved | None = None,
    keeper: Keeper | None = None,
) -> list[dict[str, float]]:
    """Adam with a one-cycle learning rate on all heads' tasks; returns the history, one entry a step.

    Args:
        model: at its starting point, or where `saved` left it; on the processor, before and after.
        data: of the night.
        spec: of the training.
        workers: all that take part.
        user_level_weight: b of the co-engagement to learn.
        progress: told of every step.
        saved: an earlier attempt, to go on from.
        keeper: saves the state after a step when it is time, and before the first one.

    Raises:
        TrainingError: the loss is not a number.
    """
    settings = spec.training
    batches = make_batches(data, spec, workers, user_level_weight=user_level_weight)
    if settings.num_steps == 0 or batches.batch_size == 0:
        return []
    model.to(workers.device)
    work = Optimization(model, learning_rate=settings.learning_rate, num_steps=settings.num_steps)
    if saved:
        saved.restore(work)
    first = len(work.history)
    for step in range(first, settings.num_steps):
        if keeper:
            keeper.look(work)
        if step == settings.num_steps // 2 > first:
            reach("train_model.rank.training")
        work.optimizer.zero_grad(set_to_none=True)
        compare = step % _CONFLICT_EVERY == 0
        said = backward(model, batches.batch(step), workers, affinity_weight=settings.affinity_weight, compare=compare)
        entry = workers.add_up(model, said)
        if not math.isfinite(entry["loss"]):
            raise TrainingError(f"loss is {entry['loss']} at step {step}: {entry}; lower training.learning_rate")
        work.step(entry)
        if progress:
            progress.show("training", step + 1, work.history[-1]["loss"], batches.batch_size, now=step + 1 == settings.num_steps)
    model.cpu()
    return work.history


def make_batches(data: TrainingData, spec: TrainingSpec, workers: Workers, *, user_level_weight: float) -> Batches:
    """Batches of the full history. A signal is its counted pairs alone: user-level co-engagement knows no window."""
    settings = spec.training
    everything = CoEngagement(pairs=data.full.pairs, user_items=data.full.user_items, user_level_weight=user_level_weight)
    nobody = data.full.user_items[:0]
    signals = {name: CoEngagement(pairs=pairs, user_items=nobody, user_level_weight=0) for name, pairs in data.signals.items()}
    return Batches(
        matrices={"engagement": everything} | signals,
        content=data.content,
        examples=data.examples,
        popularity=data.full.popularity,
        keys=data.full.keys,
        batch_size=settings.batch_size,
        full_softmax_max_items=settings.full_softmax_max_items,
        num_sampled_items=settings.num_sampled_items,
        in_batch_negatives=settings.in_batch_negatives,
        id_dropout=spec.model.id_dropout,
        exposures=None if data.exposures is None else data.exposures * np.float32(spec.model.exposure_weight),
        seed=settings.seed,
        rank=workers.rank,
        world_size=workers.world_size,
    )


Term = tuple[str, float, Loss]


def backward(model: Mtmh, batch: Batch, workers: Workers, *, affinity_weight: float, compare: bool) -> dict[str, Tensor]:
    """Add the gradient of this worker's rows to every parameter; returns their losses, which nobody has waited for yet.

    An encoder's trunk is computed once per distinct item of the global batch, by one of the workers, and gathered. Each task is sent back
    to the trunk's output by itself, which costs the same as all at once and leaves each task's gradient on the shared representation to
    `compare`: a cosine below 0 means that two tasks pull apart. Tasks of separate encoders have nothing to compare.
    """
    device, mine = model.log_popularity.device, workers.part(len(batch.items))
    index, dropped = on(device, batch.items).long(), on(device, batch.dropped[batch.items[mine]])
    partners = {task: positives.partners for task, positives in batch.positives.items()}
    wanted = (batch.triggers, batch.candidates, batch.examples, batch.random, *partners.values())
    places = [on(device, np.searchsorted(batch.items, part.ravel())) for part in wanted]
    rows = _Rows(dict(zip(partners, places[4:], strict=True)), *places[:4])
    entry = {"loss": model.log_popularity.new_zeros(())}
    for encoder, names in model.groups.items():
        trunk = workers.gather(model.trunk(encoder, index[mine], dropped), len(index))  # (I, D)
        shared, gradients = trunk.detach().requires_grad_(), dict[str, Tensor]()
        for name in names:
            for term, weight, loss in head_terms(model.head(name), shared, model.log_popularity[index], rows, batch, affinity_weight):
                before = torch.zeros_like(trunk) if shared.grad is None else shared.grad.clone()
                torch.autograd.backward(weight * loss.value, retain_graph=True)
                if compare and shared.grad is not None:
                    gradients[term] = (shared.grad - before).flatten()
                entry["loss"] = entry["loss"] + weight * loss.value.detach()
                entry |= {f"{name}/{part}": value for part, value in loss.parts.items()}
        torch.autograd.backward(trunk, shared.grad)
        entry |= _cosines(gradients)
    return entry


def _cosines(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    names = list(gradients)
    pairs = ((a, b) for i, a in enumerate(names) for b in names[i + 1 :])
    return {f"{COSINE}{a} {b}": torch.nn.functional.cosine_similarity(gradients[a], gradients[b], dim=0) for a, b in pairs}


@dataclass(frozen=True)
class _Rows:
    """Rows of the trunk: by task (B * P,) partners, then (B,) triggers, (M,) candidates, (B * L,) own and (R,) shared examples."""

    partner: Mapping[str, Tensor]
    trigger: Tensor
    candidate: Tensor
    example: Tensor
    random: Tensor


def head_terms(head: Head, trunk: Tensor, log_popularity: Tensor, rows: _Rows, batch: Batch, affinity_weight: float) -> list[Term]:
    """(`head/task`, weight, loss) of every task of a head, from the (I, D) trunk of the distinct items."""
    trigger = head.trigger_vectors(trunk[rows.trigger])  # (B, V)
    target = head.target_vectors(trunk, log_popularity)  # (I, V)
    weights, terms = head.task_weights, list[Term]()
    mass, log_inclusion = on(trunk.device, batch.positives["engagement"].mass), on(trunk.device, batch.log_inclusion)
    for task in (name for name in weights if name not in COSINE_TASKS):
        terms.append((f"{head.name}/{task}", weights[task], _softmax(task, trigger, target, rows, batch)))
    unit_trigger, unit_target = _cosine_rows(trigger), _cosine_rows(target)
    if "relevance" in weights:
        terms.append((f"{head.name}/relevance", weights["relevance"], _relevance(unit_trigger, unit_target, rows, batch)))
    if "affinity" in weights:
        scores = _masked(unit_trigger / losses.AFFINITY_TEMPERATURE @ unit_target[rows.candidate].T, batch)  # (B, M)
        popularity, num = log_popularity[rows.candidate], batch.num_triggers
        loss = losses.affinity(scores, mass, log_popularity=popularity, log_inclusion=log_inclusion, num_triggers=num)
        terms.append((f"{head.name}/affinity", weights["affinity"] * affinity_weight, loss))
    return terms


def _softmax(task: str, trigger: Tensor, target: Tensor, rows: _Rows, batch: Batch) -> Loss:
    """Engagement or a signal: full softmax when the candidates are the catalog, else the sampled one."""
    positives, device = batch.positives[task], trigger.device
    scores = _masked(trigger @ target[rows.candidate].T, batch)  # (B, M)
    copies = None if batch.log_copies is None else on(device, batch.log_copies)
    common: dict[str, Any] = {"task": task, "num_triggers": batch.num_triggers, "log_copies": copies}
    if positives.partners.shape[1] == 0:
        return losses.full_engagement(scores, on(device, positives.mass), **common)
    partner = target[rows.partner[task]].view(*positives.partners.shape, -1)  # (B, P, V)
    return losses.sampled_engagement(
        torch.einsum("bv,bpv->bp", trigger, partner),
        scores,
        log_inclusion=on(device, batch.log_inclusion),
        position=on(device, positives.position).long(),
        valid=on(device, positives.valid),
        **common,
    )


def _relevance(trigger: Tensor, target: Tensor, rows: _Rows, batch: Batch) -> Loss:
    """Listwise, on unit vectors without the popularity dimension."""
    example = target[rows.example].view(*batch.examples.shape, -1)  # (B, L, V - 1)
    cosines = torch.cat([torch.einsum("bv,blv->bl", trigger, example), trigger @ target[rows.random].T], dim=1)  # (B, L + R)
    targets, present = on(trigger.device, batch.targets), on(trigger.device, batch.present)
    return losses.relevance(cosines, targets, present, num_triggers=batch.num_triggers)


def _masked(scores: Tensor, batch: Batch) -> Tensor:
    """(B, M) scores with a trigger's own cell out of the softmax; a few cells are set, not a whole mask laid over."""
    row, column = (on(scores.device, where) for where in batch.own)
    return scores.index_put((row, column), scores.new_tensor(losses.MASKED))


def _cosine_rows(vectors: Tensor) -> Tensor:
    """Unit rows without the last, popularity, dimension."""
    return torch.nn.functional.normalize(vectors[:, :-1], dim=1, eps=1e-6)


# --- results ---


def _final(history: list[dict[str, float]]) -> dict[str, float]:
    """Mean loss of the first and the last tenth of the steps; 0 when there were none, as nothing is unfinished then."""
    tail = max(1, len(history) // 10)
    if not history:
        return {"first_loss": 0.0, "final_loss": 0.0, "num_steps": 0.0}
    first, last = ([entry["loss"] for entry in part] for part in (history[:tail], history[-tail:]))
    return {"first_loss": sum(first) / tail, "final_loss": sum(last) / tail, "num_steps": float(len(history))}


def _describe(model: Mtmh) -> dict[str, float]:
    """Per head, of the target vectors (bias and zero vectors aside): mean pairwise cosine, shortest length, dimensions in use.

    These are the participation ratio (sum of the eigenvalues)^2 / sum of their squares of the unit vectors' covariance: D where they
    spread evenly over D dimensions, 1 where they lie on a line, 0 where they are equal.
    """
    out = {}
    for name, (_, target) in model.vectors().items():
        norm = target[:, :-1].norm(dim=1)
        some = norm > 1e-6
        unit = (target[some, :-1] / norm[some, None]).double()
        pairs = max(len(unit) * (len(unit) - 1), 1)
        out[f"{name}_mean_cosine"] = float((unit.sum(dim=0).square().sum() - len(unit)) / pairs)
        out[f"{name}_min_norm"] = float(norm[some].min()) if bool(some.any()) else 0.0
        out[f"{name}_num_zero_vectors"] = float((~some).sum())
        out[f"{name}_zero_share"] = out[f"{name}_num_zero_vectors"] / len(target)
        out[f"{name}_used_dimensions"] = _participation(unit)
    return out


def _participation(unit: Tensor) -> float:
    """Dimensions in use of unit rows, see `_describe`; 0 where all rows are equal, or there are none."""
    covariance = torch.cov(unit.T, correction=0) if len(unit) else unit.new_zeros(1, 1)
    trace = float(covariance.diagonal().sum())
    return trace**2 / float(covariance.square().sum()) if trace > 1e-9 else 0.0


def write_embeddings(folder: Path, model: Mtmh, data: TrainingData) -> None:
    """Parquet parts with item_id, head, trigger_vector and target_vector, in item order; what an earlier attempt left is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("part-*.parquet"):
        stale.unlink()
    ids = pa.array(data.item_ids.tolist(), pa.string())
    part = 0
    for name, (trigger, target) in model.vectors().items():
        for start in range(0, data.num_items, _PART_ITEMS):
            stop = min(start + _PART_ITEMS, data.num_items)
            columns = {
                "item_id": ids[start:stop],
                "head": pa.array([name] * (stop - start), pa.string()),
                "trigger_vector": _lists(trigger[start:stop].numpy()),
                "target_vector": _lists(target[start:stop].numpy()),
            }
            pq.write_table(pa.table(columns), folder / f"part-{part:04d}.parquet", use_dictionary=["head"])
            part += 1


def write_signals(folder: Path, data: TrainingData, *, min_users: int) -> None:
    """What the scorer reads beside vectors, pairs and popularity, as of the run date, in item order."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "trends.npy", data.full.trends)
    UserLevel.of(data.full.user_items, min_users=min_users).save(folder)


def _lists(rows: Floats) -> pa.Array:
    offsets = np.arange(0, rows.size + 1, rows.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(np.ascontiguousarray(rows).ravel()))
