"""The workers of a training among each other: who computes what, how numbers and gradients meet, and on which device.

With a single worker nothing is ever sent. Workers on processors talk by gloo, those on GPUs by NCCL.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Self

import numpy.typing as npt
import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group: its defaults would keep that group, and its threads outlive the interpreter
from torch import Tensor

from conf.errors import TrainingError

COSINE = "cosine "  # how entries of the history about gradients begin
_CPU = torch.device("cpu")
_BACKENDS = "cpu:gloo,cuda:nccl"
_PATIENCE = timedelta(days=1)


def on(device: torch.device, values: npt.NDArray[Any]) -> Tensor:
    """An array as a tensor there; on the processor it shares the array's memory."""
    return torch.from_numpy(values).to(device)


@dataclass(frozen=True, kw_only=True)
class Workers:
    """One worker among the others; with a world size of 1 nothing is ever sent.

    Attributes:
        rank: from 0.
        world_size: workers.
        local_world_size: on this machine.
        device: where the encoder is trained.
        patient: the group in which others wait for what rank 0 does alone, which on a large catalog takes longer than any step may.
    """

    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    device: torch.device = _CPU
    patient: Any = None

    @classmethod
    @contextmanager
    def join(cls, *, device: str, timeout_seconds: int) -> Iterator[Self]:
        """The process group that torchrun's environment names, or this process alone.

        Args:
            device: `auto`, `cpu` or `cuda`, as in the settings.
            timeout_seconds: of waiting for others within a step; a worker that has died is noticed at once.

        Raises:
            TrainingError: `cuda` is asked for, and there is no GPU for each worker of this machine.
        """
        world_size, local, rank = (
            int(os.environ.get(name, n)) for name, n in (("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
        # the count alone includes GPUs that the driver cannot use
        num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        mine = own_device(device, local_rank=rank, local_world_size=local, num_gpus=num_gpus)
        if world_size == 1:
            yield cls(local_world_size=local, device=mine)
            return
        dist.init_process_group(_BACKENDS if mine.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout_seconds))
        workers = cls(rank=dist.get_rank(), world_size=world_size, local_world_size=local, device=mine)
        yield replace(workers, device=workers.agreed(mine), patient=dist.new_group(backend="gloo", timeout=_PATIENCE))
        dist.destroy_process_group()  # not after an error: NCCL would wait for the others here, and nobody would hear of it

    def agreed(self, mine: torch.device) -> torch.device:
        """A GPU if every worker has one: tensors of different devices do not meet."""
        all_have = torch.tensor([int(mine.type == "cuda")])
        dist.all_reduce(all_have, op=dist.ReduceOp.MIN)
        return mine if int(all_have) else _CPU

    def prepare(self, *, num_threads: int, mixed_precision: bool) -> None:
        """Take so many threads, with 0 a share of the machine's cores, where torchrun would take one; take the GPU, and say how it
        multiplies.
        """
        torch.set_num_threads(num_threads or max(1, (os.cpu_count() or 1) // self.local_world_size))
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high" if mixed_precision else "highest")

    def add_up(self, model: torch.nn.Module, entry: Mapping[str, Tensor]) -> dict[str, float]:
        """Sum the gradients of all workers, in place, and what they say of the step; of cosines the mean is taken.

        All of it is one message, but for the rows of an id table, whose workers name different ones.
        """
        said = torch.stack(list(entry.values()))
        if self.world_size > 1:
            gradients = list[Tensor]()
            for parameter in model.parameters():
                if parameter.grad is not None and parameter.grad.is_sparse:
                    rows = parameter.grad.coalesce().cpu()  # NCCL adds up whole tensors only
                    dist.all_reduce(rows)
                    parameter.grad = rows.to(self.device)
                elif parameter.grad is not None:
                    gradients.append(parameter.grad)
            flat = torch.cat([*(gradient.reshape(-1) for gradient in gradients), said])
            dist.all_reduce(flat)
            *parts, said = torch.split(flat, [*(g.numel() for g in gradients), len(said)])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))
        sums = dict(zip(entry, said.tolist(), strict=True))
        return {name: value / self.world_size if name.startswith(COSINE) else value for name, value in sums.items()}

    def part(self, num_rows: int) -> slice:
        """The rows that are this worker's share; shares differ by one row at most."""
        bounds = [num_rows * rank // self.world_size for rank in range(self.world_size + 1)]
        return slice(bounds[self.rank], bounds[self.rank + 1])

    def gather(self, mine: Tensor, num_rows: int) -> Tensor:
        """(num_rows, D) rows of all workers, each of which has computed its `part`; gradients go back to whoever computed the row."""
        if self.world_size == 1:
            return mine
        gathered: Tensor = _Gather.apply(mine, self, num_rows)  # type: ignore[no-untyped-call]  # torch does not type it
        return gathered

    def share(self, tensor: Tensor) -> Tensor:
        """Rank 0's numbers for everybody, in place, once it has them; of tensors on the processor."""
        if self.world_size > 1:
            dist.broadcast(tensor, src=0, group=self.patient)
        return tensor

    def wait(self) -> None:
        """Until everybody is here."""
        if self.world_size > 1:
            dist.barrier()


class _Gather(torch.autograd.Function):
    """All-gather of unequal shares, as a sum of rows that are 0 where they are another worker's; backward is the transposed of it."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, workers: Workers, num_rows: int) -> Tensor:
        """(share, D) -> (num_rows, D)."""
        ctx.workers, ctx.share = workers, workers.part(num_rows)
        out = mine.new_zeros(num_rows, mine.shape[1])
        out[ctx.share] = mine
        dist.all_reduce(out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """(num_rows, D) gradients of this worker's loss -> (share, D) of everybody's."""
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total[ctx.share], None, None


def own_device(wanted: str, *, local_rank: int, local_world_size: int, num_gpus: int) -> torch.device:
    """Where a worker computes: on the GPU of its number, if its machine has one for each of its workers, else on the processor.

    Args:
        wanted: `auto`, `cpu` or `cuda`.
        local_rank: of the worker, on its machine.
        local_world_size: workers on its machine.
        num_gpus: that the worker sees.

    Raises:
        TrainingError: `cuda` is wanted and GPUs are too few.
    """
    if wanted == "cuda" and num_gpus < local_world_size:
        raise TrainingError(
            f"training.device is cuda; found {num_gpus} GPUs for {local_world_size} workers on this machine, wanted one each: lower "
            "training.num_processes, set spark.task.resource.gpu.amount to 1 for workers in Spark tasks, or set training.device to auto"
        )
    return torch.device("cuda", local_rank) if wanted != "cpu" and num_gpus >= local_world_size else _CPU
