"""State dict -> weights file that says what it holds."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import CheckpointError
from .grids import model_grids, stated_grids
from .residual import model_residual
from .sealed import sealed


def weights_metadata(model: nn.Module) -> dict[str, str]:
    """What to store beside a model's weights so that the loader need not guess: whether the qkv
    weights are residuals, and the grids of tokens that they lie on.
    """
    grids = stated_grids(model_grids(model))
    return {"format": "pt", "qk_residual": model_residual(model), **grids}


def save_weights(
    path: str | Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Writes .safetensors, or .pth as {'model': state, 'metadata': metadata}; complete or not at
    all.

    Raises: CheckpointError for another ending.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    try:
        if path.suffix == ".safetensors":
            part.write_bytes(sealed(tensors, metadata or {}))
        elif path.suffix in (".pth", ".pt"):
            torch.save({"model": tensors, "metadata": dict(metadata or {})}, part)
        else:
            raise CheckpointError(f"{path}: weights are written as .safetensors, .pth or .pt")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path
