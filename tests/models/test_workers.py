"""Where workers compute. That two of them match one stands in test_train.py."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from conf.errors import TrainingError
from models.data import TrainingData
from models.factorization import ScoreWeights, factorize
from models.fine_tuning import backward, fine_tune, make_batches
from models.start import build_model
from models.workers import Workers, own_device
from tests.models.small_world import make_spec

START = ScoreWeights(user_level_weight=0.5, dimension=8, target_norm_exponent=0.5, popularity_weight=0.5, temperature=3.0, prior_users=1.0)


@pytest.mark.parametrize(
    ("wanted", "workers", "gpus", "found"),
    [("auto", 1, 0, "cpu"), ("auto", 2, 2, "cuda:1"), ("auto", 2, 1, "cpu"), ("cpu", 1, 8, "cpu"), ("cuda", 2, 4, "cuda:1")],
)
def test_a_worker_takes_a_gpu_of_its_own_or_none(wanted: str, workers: int, gpus: int, found: str) -> None:
    assert str(own_device(wanted, local_rank=workers - 1, local_world_size=workers, num_gpus=gpus)) == found


def test_too_few_gpus_are_an_error_where_they_are_asked_for() -> None:
    with pytest.raises(TrainingError, match=r"training.device is cuda; found 1 GPUs for 2 workers .* lower training.num_processes"):
        own_device("cuda", local_rank=0, local_world_size=2, num_gpus=1)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("encoder", ["shared", "separate"])
def test_a_step_leaves_nothing_on_the_processor(
    data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampled: bool, encoder: str
) -> None:
    """On tensors that have a device and no numbers, which refuse to meet those of another device: no GPU is needed to see it."""
    spec = make_spec(tmp_path, **({"full_softmax_max_items": 10, "num_sampled_items": 24} if sampled else {}))
    settings = spec.model.model_copy(update={"encoder": encoder, "content_sides": ["trigger"]})
    model = build_model(factorize(data.full, data.content, weights=START, seed=0), data.content, settings, 0.3, seed=0)
    batch = make_batches(data, spec, Workers(), user_level_weight=0.5).batch(0)
    monkeypatch.setattr(torch.autograd, "backward", lambda *_, **__: None)  # the engine of autograd asks for a real one
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, value in [(name, value) for name, value in tensors.items() if value is not None]:
                    there = torch.empty(value.shape, dtype=value.dtype, device="cuda")
                    tensors[name] = nn.Parameter(there) if isinstance(value, nn.Parameter) else there
        said = backward(model, batch, Workers(device=torch.device("cuda", 0)), affinity_weight=1.0, compare=True)
    assert {str(value.device) for value in said.values()} == {"cuda:0"}
    assert {"loss", "engagement/engagement", "relevance/relevance", "relevance/affinity"} <= said.keys()


@pytest.mark.parametrize(("num_threads", "local_world_size", "taken"), [(0, 1, 8), (0, 3, 2), (0, 16, 1), (5, 3, 5)])
def test_workers_share_the_cores_or_take_as_many_threads_as_they_are_told(
    monkeypatch: pytest.MonkeyPatch, num_threads: int, local_world_size: int, taken: int
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    before = torch.get_num_threads()
    try:
        Workers(local_world_size=local_world_size).prepare(num_threads=num_threads, mixed_precision=True)
        assert torch.get_num_threads() == taken
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize(("mixed", "tolerance"), [(False, 1e-4), (True, 1e-2)])
def test_a_gpu_learns_what_the_processor_learns(
    data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mixed: bool, tolerance: float
) -> None:
    """Within a tenth of the way that training goes."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    spec, found = make_spec(tmp_path), []
    start = factorize(data.full, data.content, weights=START, seed=0)
    before = build_model(start, data.content, spec.model, 0.3, seed=0).vectors()
    for device in ("cpu", "cuda"):
        with Workers.join(device=device, timeout_seconds=60) as workers:
            workers.prepare(num_threads=0, mixed_precision=mixed)
            model = build_model(start, data.content, spec.model, 0.3, seed=0)
            history = fine_tune(model, data, spec, workers, user_level_weight=0.5)
            found.append((history[-1]["loss"], model.vectors()))
    (loss, vectors), (other_loss, other) = found
    assert other_loss == pytest.approx(loss, rel=tolerance)
    for name, pair in vectors.items():
        for mine, theirs, old in zip(pair, other[name], before[name], strict=True):
            assert (mine - theirs).norm() <= 0.1 * (mine - old).norm(), name
