"""The steps of a training: batches of the full history, the loss of every head's tasks, one gradient of all workers.

Several workers take the rows of one global batch and add up gradients: the result is one worker's to rounding. Shapes as in models.batches.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conf.errors import TrainingError
from conf.faults import reach
from models import losses
from models.batches import Batch, Batches
from models.data import Floats, TrainingData
from models.factorization import CoEngagement, log_popularity
from models.losses import Loss
from models.mtmh import COSINE_TASKS, Head, Mtmh
from models.resume import Keeper, Optimization, Saved
from models.spec import REHEARSAL, TRAINING, Progress, TrainingSpec
from models.workers import COSINE, Workers, on

_CONFLICT_EVERY = 10  # steps between looks at the gradients' cosine


def fine_tune(
    model: Mtmh,
    data: TrainingData,
    spec: TrainingSpec,
    workers: Workers,
    *,
    user_level_weight: float,
    progress: Progress | None = None,
    phase: str = TRAINING,
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
        phase: what it is told these steps are.
        saved: an earlier attempt, to go on from.
        keeper: saves the state after a step when it is time, and before the first one.

    Raises:
        TrainingError: the loss is not a number.
    """
    settings = spec.training
    batches = make_batches(data, spec, workers, user_level_weight=user_level_weight, log_prior=model.log_prior.numpy())
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
            reach("train_model.rank.rehearsal") if phase == REHEARSAL else reach("train_model.rank.training")
        work.clear()
        compare = step % _CONFLICT_EVERY == 0
        said = backward(model, batches.batch(step), workers, affinity_weight=settings.affinity_weight, compare=compare)
        entry = workers.add_up(model, said)
        if not math.isfinite(entry["loss"]):
            raise TrainingError(f"loss is {entry['loss']} at step {step}: {entry}; lower training.learning_rate")
        work.step(entry)
        if progress:
            progress.show(phase, step + 1, work.history[-1]["loss"], batches.batch_size, now=step + 1 == settings.num_steps)
    model.cpu()
    return work.history


def make_batches(
    data: TrainingData, spec: TrainingSpec, workers: Workers, *, user_level_weight: float, log_prior: Floats | None = None
) -> Batches:
    """Batches of the full history. A signal is its counted pairs alone: user-level co-engagement knows no window.

    Args:
        data: of the night.
        spec: of the training.
        workers: all that take part.
        user_level_weight: b of the co-engagement to learn.
        log_prior: (N,) log popularity that the model's biases start from, under which counts are taught; None: that of the pairs.
    """
    settings, counted = spec.training, log_popularity(data.full.popularity)
    everything = CoEngagement(pairs=data.full.pairs, user_items=data.full.user_items, user_level_weight=user_level_weight)
    nobody = data.full.user_items[:0]
    signals = {name: CoEngagement(pairs=pairs, user_items=nobody, user_level_weight=0) for name, pairs in data.signals.items()}
    return Batches(
        matrices={"engagement": everything} | signals,
        content=data.content,
        examples=data.examples,
        popularity=data.full.popularity,
        keys=data.full.keys,
        prior_shift=np.exp((counted if log_prior is None else log_prior) - counted),
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
    device, mine = model.log_prior.device, workers.part(len(batch.items))
    index, dropped = on(device, batch.items).long(), on(device, batch.dropped[mine])
    partners = {task: positives.partners for task, positives in batch.positives.items()}
    wanted = (batch.triggers, batch.candidates, batch.examples, batch.random, *partners.values())
    places = [on(device, np.searchsorted(batch.items, part.ravel())) for part in wanted]
    rows = _Rows(dict(zip(partners, places[4:], strict=True)), *places[:4])
    entry = {"loss": model.log_prior.new_zeros(())}
    for encoder, names in model.groups.items():
        trunk = workers.gather(model.trunk(encoder, index[mine], dropped), len(index))  # (I, D)
        shared, gradients = trunk.detach().requires_grad_(), dict[str, Tensor]()
        for name in names:
            for term, weight, loss in head_terms(model.head(name), shared, model.log_prior[index], rows, batch, affinity_weight):
                before = shared.grad.clone() if compare and shared.grad is not None else 0
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


def head_terms(head: Head, trunk: Tensor, log_prior: Tensor, rows: _Rows, batch: Batch, affinity_weight: float) -> list[Term]:
    """(`head/task`, weight, loss) of every task of a head, from the (I, D) trunk of the distinct items."""
    trigger = head.trigger_vectors(trunk[rows.trigger])  # (B, V)
    target = head.target_vectors(trunk, log_prior)  # (I, V)
    weights, terms = head.task_weights, list[Term]()
    mass, log_inclusion = on(trunk.device, batch.positives["engagement"].mass), on(trunk.device, batch.log_inclusion)
    for task in (name for name in weights if name not in COSINE_TASKS):
        terms.append((f"{head.name}/{task}", weights[task], _softmax(task, trigger, target, rows, batch)))
    unit_trigger, unit_target = _cosine_rows(trigger), _cosine_rows(target)
    if "relevance" in weights:
        terms.append((f"{head.name}/relevance", weights["relevance"], _relevance(unit_trigger, unit_target, rows, batch)))
    if "affinity" in weights:
        scores = _masked(unit_trigger / losses.AFFINITY_TEMPERATURE @ unit_target[rows.candidate].T, batch)  # (B, M)
        popularity, num = log_prior[rows.candidate], batch.num_triggers
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
        weight=on(device, positives.weight),
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
