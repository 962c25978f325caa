"""One training: find where to start (models.start), fine-tune the encoder from there, write everything a night needs.

`run_rank` is what each torch worker runs. The output folder then holds

    status/rank-N.json   ok, error (traceback), seconds, metrics: what the job believes
    progress.json        done and total steps, loss, items_per_s: rewritten about once a second by rank 0
    history.json         loss of each task per step; now and then the cosine between the tasks' gradients on the shared encoder
    metrics.json, notes.json   numbers for the gates, sentences for the ledger
    checkpoint/          models.checkpoint
    embeddings/*.parquet item_id, head, trigger_vector, target_vector, of every head and models.distillation
    scorer.json          models.scorer
    signals/             what else the scorer reads: trends.npy (N, S), and models.user_level

and, until the job has taken these over, models.resume: a training that was killed goes on from there.

Deterministic for a seed and a thread count, on the processor. Several workers take the rows of one global batch and add up gradients: the
result is one worker's to rounding. Shapes as in models.batches.
"""

import os
import time
import traceback
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from conf.errors import TrainingError
from conf.faults import reach
from models.checkpoint import save_checkpoint
from models.data import Floats, TrainingData, load_training_data
from models.distillation import DISTILLED, distil
from models.fine_tuning import fine_tune
from models.resume import Saved
from models.scorer import CandidateSource, HeadVectors
from models.spec import DISTILLATION, REHEARSAL, TRAINING, Progress, Stopwatch, TrainingSpec, write_json
from models.start import Plan, candidate_source, find_saved, go_on, head_vectors, keeper, prepare, user_level_weight
from models.user_level import UserLevel
from models.workers import Workers

_PART_ITEMS = 50_000  # rows of an embeddings file


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
            workers.prepare(num_threads=spec.training.num_threads, mixed_precision=spec.training.mixed_precision)
            reach("train_model.rank.started")
            decay: dict[str, Any] = {"half_life_days": spec.half_life_days, "signals": spec.signals}
            data = load_training_data(spec.tables, run_date=spec.run_date, symmetric=spec.symmetric, **decay)
            metrics = train(data, spec, workers)
            reach("train_model.rank.written")
    except BaseException:
        write_json(status, {"ok": False, "error": traceback.format_exc(), "seconds": time.monotonic() - started, "metrics": {}})
        raise
    write_json(status, {"ok": True, "error": None, "seconds": time.monotonic() - started, "metrics": metrics})


def train(data: TrainingData, spec: TrainingSpec, workers: Workers) -> dict[str, float]:
    """Start, fine-tune, write; returns the metrics (only rank 0 writes).

    Raises:
        TrainingError: there is no item, or the loss is not a number.
    """
    if data.num_items < 2:
        raise TrainingError(f"item_features holds {data.num_items} items; wanted at least 2: check the catalog and the run date")
    folder = Path(spec.folder)
    folder.mkdir(parents=True, exist_ok=True)
    progress = Progress(folder, total=spec.training.num_steps) if workers.rank == 0 else None
    clock = Stopwatch()
    saved = find_saved(spec, workers)
    workers.wait()  # nobody saves before all have read
    further = saved if saved and saved.phase == TRAINING else None
    plan, model = go_on(data, spec, further) if further else prepare(data, spec, workers, progress=progress, clock=clock, saved=saved)
    weight = user_level_weight(plan, workers)
    saves = keeper(spec, TRAINING, plan) if plan and workers.rank == 0 else None
    history = fine_tune(model, data, spec, workers, user_level_weight=weight, progress=progress, saved=further, keeper=saves)
    clock.stop("training_seconds")
    if plan is None or progress is None:
        return clock.seconds
    vectors, user_level = head_vectors(model), UserLevel.of(data.full.user_items, min_users=spec.min_users)
    metrics = {**plan.metrics, **_final(history), **_describe(vectors)}
    if data.num_items <= spec.training.distil_max_items:
        vectors[DISTILLED] = _distilled(candidate_source(data, vectors, user_level), spec, plan, progress)
        clock.stop("distillation_seconds")
    progress.show("writing", spec.training.num_steps)
    version = save_checkpoint(folder / "checkpoint", model, vocabulary=data.vocabulary, run={"metrics": metrics, "search": plan.search})
    write_embeddings(folder / "embeddings", vectors, data)
    plan.scorer.save(folder / "scorer.json")
    write_signals(folder / "signals", data, user_level)
    clock.stop("writing_seconds")
    write_json(folder / "history.json", {"model_version": version, "steps": history})
    write_json(folder / "metrics.json", metrics | clock.seconds)
    write_json(folder / "notes.json", [*plan.notes, *_resumption(saved, spec)])
    return metrics | clock.seconds


def _distilled(source: CandidateSource, spec: TrainingSpec, plan: Plan, progress: Progress) -> HeadVectors:
    """What the scorer expects of everything known."""
    return distil(
        source,
        plan.scorer,
        weights=plan.weights,
        dimension=spec.model.dimension,
        widths=spec.widths,
        seed=spec.training.seed,
        watch=partial(progress.show, DISTILLATION),
    )


def _resumption(saved: Saved | None, spec: TrainingSpec) -> list[str]:
    """That a killed training went on, and from where."""
    if saved is None:
        return []
    what = " of the rehearsal" if saved.phase == REHEARSAL else ""
    return [f"training was interrupted, and went on from step {saved.num_steps} of {spec.training.num_steps}{what}"]


def _final(history: list[dict[str, float]]) -> dict[str, float]:
    """Mean loss of the first and the last tenth of the steps; 0 when there were none, as nothing is unfinished then."""
    tail = max(1, len(history) // 10)
    if not history:
        return {"first_loss": 0.0, "final_loss": 0.0, "num_steps": 0.0}
    first, last = ([entry["loss"] for entry in part] for part in (history[:tail], history[-tail:]))
    return {"first_loss": sum(first) / tail, "final_loss": sum(last) / tail, "num_steps": float(len(history))}


def _describe(vectors: Mapping[str, HeadVectors]) -> dict[str, float]:
    """Per head, of the target vectors (bias and zero vectors aside): mean pairwise cosine, shortest length, dimensions in use.

    These are the participation ratio (sum of the eigenvalues)^2 / sum of their squares of the unit vectors' covariance: D where they
    spread evenly over D dimensions, 1 where they lie on a line, 0 where they are equal.
    """
    out = {}
    for name, head in vectors.items():
        target = torch.from_numpy(head.target)
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


def write_embeddings(folder: Path, vectors: Mapping[str, HeadVectors], data: TrainingData) -> None:
    """Parquet parts with item_id, head, trigger_vector and target_vector, in item order; what an earlier attempt left is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("part-*.parquet"):
        stale.unlink()
    ids = pa.array(data.item_ids.tolist(), pa.string())
    part = 0
    for name, head in vectors.items():
        for start in range(0, data.num_items, _PART_ITEMS):
            stop = min(start + _PART_ITEMS, data.num_items)
            columns = {
                "item_id": ids[start:stop],
                "head": pa.array([name] * (stop - start), pa.string()),
                "trigger_vector": _lists(head.trigger[start:stop]),
                "target_vector": _lists(head.target[start:stop]),
            }
            pq.write_table(pa.table(columns), folder / f"part-{part:04d}.parquet", use_dictionary=["head"])
            part += 1


def write_signals(folder: Path, data: TrainingData, user_level: UserLevel) -> None:
    """What the scorer reads beside vectors, pairs and popularity, as of the run date, in item order."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "trends.npy", data.full.trends)
    user_level.save(folder)


def _lists(rows: Floats) -> pa.Array:
    offsets = np.arange(0, rows.size + 1, rows.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(np.ascontiguousarray(rows).ravel()))
