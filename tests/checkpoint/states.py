"""Training states to save, damage and read again."""

import copy
from typing import Any

import torch

from utils import capture_rng


def training_state(update: int = 5, epoch: int = 1, ema: bool = False) -> dict[str, Any]:
    """A whole training state of one process, of a model with two parameters, without its format."""
    generator = torch.Generator().manual_seed(update)
    model = {
        "w": torch.randn(64, 32, generator=generator),
        "b": torch.randn(64, generator=generator),
    }
    moments = {
        index: {
            "step": torch.tensor(float(update)),
            "exp_avg": torch.zeros_like(tensor),
            "exp_avg_sq": torch.ones_like(tensor),
        }
        for index, tensor in enumerate(model.values())
    }
    group = {"lr": 0.1, "params": [0, 1], "betas": (0.9, 0.99), "optimizer": "AdamW"}
    return {
        "model": model,
        "ema": {name: tensor + 1 for name, tensor in model.items()} if ema else None,
        "optimizer": {"state": moments, "param_groups": [group]},
        "lr_scheduler": {"last_update": update},
        "scaler": {},
        "progress": {"epoch": epoch, "batch": 2, "update": update, "best": 12.5, "best_epoch": 0},
        "layout": {"batch_size": 8, "world_size": 1, "accumulation": 1},
        "ranks": [
            {"rng": capture_rng(torch.device("cpu")), "tally": torch.zeros(8, dtype=torch.float64)}
        ],
        "config": {"TRAIN": {"EPOCHS": 3, "NAMES": ["a"], "NONE": None}},
    }


MISSING = object()


def changed(state: dict[str, Any], place: str, value: Any = MISSING) -> dict[str, Any]:
    """A copy in which the entry at "optimizer.state.0.step" is another value, or is missing."""
    state = copy.deepcopy(state)
    inner = state
    *path, last = [int(word) if word.isdigit() else word for word in place.split(".")]
    for word in path:
        inner = inner[word]
    if value is MISSING:
        del inner[last]
    else:
        inner[last] = value
    return state
