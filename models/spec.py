"""What a torch worker is told before a training, and what it tells while it works."""

import dataclasses
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Self

from conf.files import write_whole
from conf.settings import PATIENCE, ModelSettings, TrainingSettings
from models.data import TableRef
from models.resume import training_key
from models.scorer import READS, Widths

REHEARSAL, TRAINING = "rehearsal", "training"
"""Phases whose steps are shown, and saved to go on from."""
DISTILLATION = "distillation"
"""A phase whose triggers are shown."""


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
        widths: candidates of a trigger that the scorer is fitted on, as many as lists are made from.
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
    widths: Widths
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
            "widths": dataclasses.asdict(self.widths),
            "signals": dict(self.signals),
            "previous": self.previous,
        }
        return json.dumps(content)

    @property
    def key(self) -> str:
        """Hash of what decides the numbers that come out, and not where they go, nor how long anybody waits."""
        described = json.loads(dataclasses.replace(self, folder="").to_json())
        described["training"] = {name: value for name, value in described["training"].items() if name not in PATIENCE}
        return training_key(json.dumps(described) + json.dumps(READS))

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
            widths=Widths(**content["widths"]),
            signals=content["signals"],
            previous=content["previous"],
        )


class Progress:
    """Rank 0's `progress.json`, replaced at most once a second."""

    def __init__(self, folder: Path, *, total: int) -> None:
        self.path, self.total = folder / "progress.json", total
        self.started = self.written = time.monotonic()
        self.phase = ""

    def show(self, phase: str, done: int = 0, loss: float | None = None, num_triggers: int = 0, *, now: bool = False) -> None:
        """State of the work; `loss` and speed once there are some."""
        clock = time.monotonic()
        if phase != self.phase:
            self.phase, self.started = phase, clock
        elif clock - self.written < 1 and not now:
            return
        self.written = clock
        speed = done * num_triggers / max(clock - self.started, 1e-9)
        write_json(self.path, {"phase": phase, "done": done, "total": self.total, "loss": loss, "items_per_s": round(speed, 1)})


def write_json(path: Path, content: Any) -> None:
    """Whole, or not at all."""
    write_whole(path, json.dumps(content))


class Stopwatch:
    """Seconds by name of what took them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def stop(self, name: str) -> None:
        """Seconds since the last stop."""
        now = time.monotonic()
        self.seconds[name], self._last = round(now - self._last, 3), now
