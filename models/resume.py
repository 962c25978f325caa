"""The state of a training on disk, so that one that was killed goes on where it was: equal steps from there to the same final loss.

One file, replaced whole: safetensors holds the encoder's numbers and the optimizer's moments, its header as JSON everything else. It counts
only for the training that wrote it: the key is a hash of the inputs, their versions and the settings.
"""

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FILE = "resume.safetensors"
_CONTENT = "content"  # of the header
_FORMAT = 3  # of what is saved; code that saves anything else counts on
_BETAS = (0.9, 0.99)
_MODEL, _OPTIMIZER = "model.", "optimizer."


def training_key(described: str) -> str:
    """Of everything that decides what a training computes, and how its state is saved."""
    return hashlib.sha256(f"{_FORMAT} {described}".encode()).hexdigest()


class Optimization:
    """Adam with a one-cycle learning rate, and the history so far. Of the tables of id rows a step moves the rows that it names and no
    other (lazy Adam): what it costs follows the batch, not the catalog.
    """

    def __init__(self, model: torch.nn.Module, *, learning_rate: float, num_steps: int) -> None:
        self.model = model
        tables = [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding) and module.sparse]
        rest = [parameter for parameter in model.parameters() if all(parameter is not table for table in tables)]
        self.optimizers: list[torch.optim.Optimizer] = [torch.optim.Adam(rest, lr=learning_rate, betas=_BETAS, fused=True)]
        if tables:
            self.optimizers.append(torch.optim.SparseAdam(tables, lr=learning_rate, betas=_BETAS))
        cycle = torch.optim.lr_scheduler.OneCycleLR
        self.schedules = [cycle(of, max_lr=learning_rate, total_steps=num_steps + 1) for of in self.optimizers]
        self.history: list[dict[str, float]] = []

    def clear(self) -> None:
        """Forget the gradients of the last step."""
        self.model.zero_grad(set_to_none=True)

    def step(self, entry: dict[str, float]) -> None:
        """Apply the gradients; one more line of history."""
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()
        self.history.append(entry)


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What a killed training has left.

    Attributes:
        plan: whatever had been chosen before its steps, as JSON.
        content: phase, history, groups of each optimizer and its schedule.
        tensors: of the model and of the optimizers, by name.
    """

    plan: Mapping[str, Any]
    content: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @classmethod
    def find(cls, folder: Path, *, key: str) -> Self | None:
        """The state of the training with this key; None if there is none, or what is there cannot be read."""
        try:
            with safe_open(folder / FILE, framework="pt") as file:
                content = json.loads((file.metadata() or {}).get(_CONTENT, "{}"))
                if content.get("key") != key:
                    return None
                return cls(plan=content["plan"], content=content, tensors={name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (OSError, SafetensorError):
            return None

    @property
    def phase(self) -> str:
        """Which of a training's phases these steps are."""
        return str(self.content["phase"])

    @property
    def num_steps(self) -> int:
        """Steps done."""
        return len(self.content["history"])

    @property
    def num_id_rows(self) -> int:
        """Items with an id row of their own."""
        return int((self.tensors[_MODEL + "id_row"] >= 0).sum())

    def restore_model(self, model: torch.nn.Module) -> None:
        """The encoder as it was."""
        model.load_state_dict(self._part(_MODEL), strict=True)

    def restore(self, optimization: Optimization) -> None:
        """Moments, schedule and history as they were; the model is restored by itself."""
        for number, (optimizer, schedule) in enumerate(zip(optimization.optimizers, optimization.schedules, strict=True)):
            state: dict[int, dict[str, Any]] = {}
            for name, tensor in self._part(f"{_OPTIMIZER}{number}.").items():
                parameter, _, part = name.partition(".")
                state.setdefault(int(parameter), {})[part] = tensor.item() if tensor.dtype == torch.int64 else tensor  # a count of steps
            optimizer.load_state_dict({"state": state, "param_groups": self.content["groups"][number]})
            schedule.load_state_dict(self.content["schedules"][number])
        optimization.history = [dict(entry) for entry in self.content["history"]]

    def _part(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}


class Keeper:
    """Writes the state of a phase now and then; the first time at once, as what precedes the steps has just ended."""

    def __init__(self, folder: Path, *, key: str, phase: str, plan: Mapping[str, Any], every_seconds: float) -> None:
        self.folder, self.key, self.phase, self.plan, self.every_seconds = folder, key, phase, plan, every_seconds
        self._last = -float("inf")

    def look(self, optimization: Optimization) -> None:
        """Save if it is time."""
        if time.monotonic() - self._last < self.every_seconds:
            return
        states = [optimizer.state_dict() for optimizer in optimization.optimizers]
        tensors = {_MODEL + name: value.detach().contiguous() for name, value in optimization.model.state_dict().items()}
        for number, state in enumerate(states):
            for parameter, parts in state["state"].items():
                for part, value in parts.items():
                    tensors[f"{_OPTIMIZER}{number}.{parameter}.{part}"] = torch.as_tensor(value).contiguous()
        content = {
            "key": self.key,
            "phase": self.phase,
            "plan": self.plan,
            "history": optimization.history,
            "groups": [state["param_groups"] for state in states],
            "schedules": [schedule.state_dict() for schedule in optimization.schedules],
        }
        beside = self.folder / f"{FILE}.new"
        save_file(tensors, beside, metadata={_CONTENT: json.dumps(content)})
        beside.replace(self.folder / FILE)
        self._last = time.monotonic()
