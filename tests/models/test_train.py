"""A whole training: files, determinism, two workers against one, and how a failure is told."""

import dataclasses
import json
import os
import socket
import time
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pytest
import torch
import torch.multiprocessing as mp
from safetensors.numpy import load_file

from conf.errors import TrainingError
from conf.settings import load_settings
from models.checkpoint import load_checkpoint
from models.data import TrainingData, sparse_rows
from models.scorer import HeadVectors, Scorer
from models.spec import TrainingSpec
from models.train import _describe, run_rank, train
from models.workers import Workers
from tests.models.small_world import SmallWorld, make_spec
from validation.gates import check_metrics
from validation.suites import GateContext, rules_for


def with_popularity(vectors: torch.Tensor) -> HeadVectors:
    """Given target vectors with a dimension of popularity behind them."""
    both = torch.cat([vectors, torch.ones(len(vectors), 1)], dim=1).numpy()
    return HeadVectors(trigger=both, target=both)


def test_vectors_that_have_collapsed_are_told_from_those_that_have_not() -> None:
    """Every way to collapse has a number of its own, and the gate of the stage a rule for it."""
    torch.manual_seed(1)
    spread = torch.randn(400, 16)
    line, angles = torch.randn(400, 1) @ torch.randn(1, 16), torch.linspace(0, 6.28, 400)
    circle = torch.cat([torch.stack([angles.cos(), angles.sin()], dim=1), torch.zeros(400, 14)], dim=1)
    heads = {"spread": spread, "point": torch.ones(400, 16) + 0.01 * spread, "line": line, "circle": circle, "nothing": 1e-9 * spread}
    found = _describe({name: with_popularity(vectors) for name, vectors in heads.items()})
    used = {name: found[f"{name}_used_dimensions"] for name in heads}
    assert used == {"spread": pytest.approx(16, abs=1), "point": pytest.approx(16, abs=1), "line": pytest.approx(1), **used} | {
        "circle": pytest.approx(2, abs=0.05),
        "nothing": 0.0,
    }
    settings = load_settings("demo")
    rules = rules_for("train_model", GateContext(gates=settings.gates, source=settings.source, values={"num_items": 400}))
    counts = {f"{name}_num_vectors": 400.0 for name in heads} | {"num_nonfinite": 0.0, "num_duplicate_keys": 0.0}
    report = check_metrics("train_model", found | counts, rules)
    assert {failure.rule.metric for failure in report.failures} == {"point_mean_cosine", "nothing_zero_share"}
    assert {warning.rule.metric for warning in report.warnings} == {"line_used_dimensions", "nothing_used_dimensions", "nothing_min_norm"}


def read(folder: Path, name: str):
    return json.loads((folder / name).read_text())


def test_a_run_writes_what_the_night_needs(world: SmallWorld, data: TrainingData, tmp_path: Path) -> None:
    spec = make_spec(tmp_path / "out", world.write(tmp_path / "lake"))
    assert TrainingSpec.from_json(spec.to_json()) == spec
    run_rank(spec.to_json())
    out = Path(spec.folder)
    assert read(out, "status/rank-0.json")["ok"]
    assert read(out, "progress.json")["done"] == 12
    metrics = read(out, "metrics.json")
    assert all(np.isfinite(value) for value in metrics.values())
    assert metrics["engagement_mean_cosine"] < 0.9
    assert metrics["final_loss"] < metrics["first_loss"]
    steps = read(out, "history.json")["steps"]
    assert len(steps) == 12
    assert {"engagement/engagement", "engagement/relevance", "relevance/relevance", "relevance/affinity"} <= set(steps[0])
    assert "cosine engagement/engagement relevance/relevance" in steps[10]
    model, content = load_checkpoint(out / "checkpoint", vocabulary=data.vocabulary)
    assert content["model_version"] == read(out, "history.json")["model_version"]
    assert read(out, "notes.json")
    Scorer.load(out / "scorer.json")
    rows = ds.dataset(out / "embeddings").to_table().to_pylist()
    assert [(row["head"], row["item_id"]) for row in rows] == [
        (head, item) for head in ("engagement", "relevance", "distilled") for item in world.item_ids
    ]
    vectors = model.vectors()["engagement"]
    np.testing.assert_allclose(rows[7]["trigger_vector"], vectors[0][7].numpy(), rtol=1e-6)
    np.testing.assert_allclose(rows[7]["target_vector"], vectors[1][7].numpy(), rtol=1e-6)


def test_training_teaches_each_head_its_goal_and_repeats_exactly(world: SmallWorld, data: TrainingData, tmp_path: Path) -> None:
    first, second = (make_spec(tmp_path / name) for name in "ab")
    train(data, first, Workers())
    train(data, second, Workers())
    versions = [read(Path(spec.folder), "checkpoint/model.json")["model_version"] for spec in (first, second)]
    assert versions[0] == versions[1]
    model, _ = load_checkpoint(Path(first.folder) / "checkpoint", vocabulary=data.vocabulary)
    wanted = {"engagement": world.bundle_of, "relevance": world.category_of}
    for head, (trigger, target) in model.vectors().items():
        scores = trigger[:20] @ target.T
        scores[range(20), range(20)] = -torch.inf
        near = scores.topk(4, dim=1).indices.tolist()
        hits = np.mean([len(set(items) & wanted[head](i)) / 4 for i, items in enumerate(near)])
        assert hits > 0.9, head


@pytest.mark.parametrize("sampled", [False, True], ids=["whole catalog", "sampled"])
def test_what_is_ignored_beside_a_trigger_falls_behind_there(data: TrainingData, tmp_path: Path, sampled: bool) -> None:
    over: dict[str, object] = {"num_steps": 60} | ({"full_softmax_max_items": 10, "num_sampled_items": 40} if sampled else {})
    partner, *_ = partners = data.full.pairs[[0]].indices.tolist()
    offer = next(item for item in range(1, data.num_items) if item not in partners)
    leads = []
    for exposures in (None, sparse_rows([0], [offer], [500.0], (data.num_items, data.num_items))):
        spec = make_spec(tmp_path / str(len(leads)), **over)
        train(dataclasses.replace(data, exposures=exposures), spec, Workers())
        model, _ = load_checkpoint(Path(spec.folder) / "checkpoint", vocabulary=data.vocabulary)
        triggers, targets = model.vectors()["engagement"]
        scores = targets @ triggers[0]
        leads.append(float(scores[partner] - scores[offer]))
    assert leads[1] > leads[0] + 0.1


def test_without_holdout_or_steps_the_factorization_stands(data: TrainingData, tmp_path: Path) -> None:
    quiet = dataclasses.replace(data, holdout=data.holdout * 0)
    quiet.holdout.eliminate_zeros()
    metrics = train(quiet, make_spec(tmp_path, num_steps=0), Workers())
    assert metrics["num_steps"] == 0
    assert "not calibrated" in read(tmp_path, "notes.json")[1]
    assert Scorer.load(tmp_path / "scorer.json").hidden is None
    with pytest.raises(TrainingError, match="holds 1 items"):
        train(dataclasses.replace(data, item_ids=data.item_ids[:1]), make_spec(tmp_path), Workers())


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _worker(rank: int, spec_json: str, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    run_rank(spec_json)


def test_two_workers_match_one(world: SmallWorld, tmp_path: Path) -> None:
    tables = world.write(tmp_path / "lake")
    sampled = {"full_softmax_max_items": 10, "num_sampled_items": 24, "in_batch_negatives": True, "num_steps": 6}
    one, two = (make_spec(tmp_path / name, tables, **sampled) for name in ("one", "two"))
    one, two = (dataclasses.replace(spec, model=spec.model.model_copy(update={"max_id_rows": 20})) for spec in (one, two))
    run_rank(one.to_json())
    mp.spawn(_worker, args=(two.to_json(), free_port()), nprocs=2)
    assert all(read(Path(two.folder), f"status/rank-{rank}.json")["ok"] for rank in (0, 1))
    weights = [load_file(Path(spec.folder) / "checkpoint" / "model.safetensors") for spec in (one, two)]
    for name, value in weights[0].items():
        np.testing.assert_allclose(weights[1][name], value, atol=1e-4, err_msg=name)
    scorers = [Scorer.load(Path(spec.folder) / "scorer.json") for spec in (one, two)]
    for name, value in vars(scorers[0]).items():
        np.testing.assert_allclose(vars(scorers[1])[name], value, atol=1e-3, err_msg=f"scorer: {name}")
    said = [read(Path(spec.folder), "history.json")["steps"] for spec in (one, two)]
    for alone, together in zip(*said, strict=True):
        losses = {name: value for name, value in alone.items() if not name.startswith("cosine")}
        assert {name: together[name] for name in losses} == pytest.approx(losses, rel=1e-4, abs=1e-5)


def _wait_for_rank_0(rank: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with Workers.join(device="cpu", timeout_seconds=2) as workers:
        if rank == 0:
            time.sleep(5)
        assert float(workers.share(torch.tensor([float(rank)]))) == 0


def test_what_rank_0_does_alone_may_take_longer_than_a_step() -> None:
    mp.spawn(_wait_for_rank_0, args=(free_port(),), nprocs=2)


def _gather(rank: int, folder: str, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with Workers.join(device="cpu", timeout_seconds=60) as workers:
        rows = torch.arange(10.0).reshape(5, 2)  # five rows for two workers: shares of two and three
        mine = rows[workers.part(5)].clone().requires_grad_()
        gathered = workers.gather(mine, 5)
        weights = torch.full((5, 2), 1.0 + rank)
        torch.autograd.backward((gathered * weights).sum())
        torch.save((gathered.detach(), mine.grad), f"{folder}/{rank}.pt")


def test_gathered_rows_send_their_gradient_to_whoever_computed_them(tmp_path: Path) -> None:
    mp.spawn(_gather, args=(str(tmp_path), free_port()), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for gathered, gradient in found:
        torch.testing.assert_close(gathered, torch.arange(10.0).reshape(5, 2))
        torch.testing.assert_close(gradient, torch.full_like(gradient, 1.0 + 2.0))  # of both workers' losses
    assert [len(gradient) for _, gradient in found] == [2, 3]


def test_a_failure_is_written_and_raised(tmp_path: Path) -> None:
    spec = make_spec(tmp_path / "out")
    with pytest.raises(KeyError):
        run_rank(spec.to_json())
    status = read(tmp_path / "out", "status/rank-0.json")
    assert not status["ok"]
    assert "Traceback" in status["error"]
    assert "item_features" in status["error"]
