"""A trained encoder on disk: safetensors for the weights, JSON for everything else. No pickle, so that loading runs no code."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from conf.errors import TrainingError
from models.mtmh import Mtmh, SignalStart, Start

_WEIGHTS = "model.safetensors"
_CONFIG = "model.json"


def save_checkpoint(folder: Path, model: Mtmh, *, vocabulary: str, run: Mapping[str, Any]) -> str:
    """Write `model.safetensors` and `model.json`.

    Args:
        folder: created if absent.
        model: trained encoder.
        vocabulary: fingerprint of the item ids in index order.
        run: what else describes the training; any JSON.

    Returns:
        model_version, a hash of weights and configuration: equal trainings have equal versions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = model_config(model)
    weights = save({name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()})
    described = json.dumps({"config": config, "vocabulary": vocabulary}, sort_keys=True).encode()
    version = hashlib.sha256(described + hashlib.sha256(weights).digest()).hexdigest()[:16]
    (folder / _WEIGHTS).write_bytes(weights)
    content = {"model_version": version, "vocabulary": vocabulary, "config": config, "run": dict(run)}
    (folder / _CONFIG).write_text(json.dumps(content, indent=1, sort_keys=True))
    return version


def load_checkpoint(folder: Path, *, vocabulary: str) -> tuple[Mtmh, dict[str, Any]]:
    """The encoder in evaluation mode, and the content of `model.json`.

    Raises:
        TrainingError: the checkpoint is of other items, or its weights do not fit its configuration.
    """
    content: dict[str, Any] = json.loads((folder / _CONFIG).read_text())
    if content["vocabulary"] != vocabulary:
        raise TrainingError(
            f"checkpoint {folder} was trained on the items {content['vocabulary'][:12]}…, wanted {vocabulary[:12]}…: item_features has "
            "changed since; train again, or read item_features at the version named in `runs`"
        )
    model = _empty(content["config"])
    try:
        model.load_state_dict(load_file(folder / _WEIGHTS), strict=True)
    except RuntimeError as error:
        raise TrainingError(f"weights in {folder} do not fit {_CONFIG} beside them; one of the two was replaced: {error}") from error
    return model.eval(), content


def model_config(model: Mtmh) -> dict[str, Any]:
    """The numbers that shape the modules."""
    return {
        "num_items": model.num_items,
        "num_id_rows": model.num_id_rows,
        "dimension": model.dimension,
        "content_dimension": model.content.shape[1],
        "hidden_dimension": model.hidden_dimension,
        "shared": model.shared,
        "blind": list(model.blind),
        "signals": list(model.signals),
        "heads": {name: model.head(name).task_weights for name in model.heads},
    }


def _empty(config: Mapping[str, Any]) -> Mtmh:
    """Modules of the right shapes; every number in them is about to be replaced."""
    num_items, dimension, content = config["num_items"], config["dimension"], config["content_dimension"]
    rows: dict[str, Tensor] = dict.fromkeys(("trigger", "target"), torch.zeros(num_items, dimension))
    rows |= dict.fromkeys(("content_to_trigger", "content_to_target"), torch.zeros(content, dimension))
    start = Start(
        content=torch.zeros(num_items, content),
        log_popularity=torch.zeros(num_items),
        log_prior=torch.zeros(num_items),
        known=torch.arange(num_items) < config["num_id_rows"],
        signals={name: SignalStart(**rows) for name in config["signals"]},
        **rows,
    )
    return Mtmh(
        start=start,
        hidden_dimension=config["hidden_dimension"],
        heads=config["heads"],
        temperature=1.0,
        popularity_weight=0.0,
        content_share=0.5,
        max_id_rows=config["num_id_rows"],
        shared=config["shared"],
        blind=config["blind"],
    )
