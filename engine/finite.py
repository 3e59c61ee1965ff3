"""NaN and infinities: weights or outputs that have them get no score."""

import math

import torch
from torch import Tensor, nn

from utils import RunError


class NoScoreError(RunError):
    """An evaluation whose result would mean nothing. by_weights: they are not finite themselves."""

    def __init__(self, message: str, by_weights: bool) -> None:
        super().__init__(message)
        self.by_weights = by_weights


@torch.no_grad()
def first_nonfinite(model: nn.Module) -> str | None:
    """The name of the first weight or buffer that has a NaN or an infinity (a mask may hold minus
    infinity). Waits for the device once.
    """
    checks = {name: p.isfinite().all() for name, p in model.named_parameters() if is_real(p)}
    for name, buffer in model.named_buffers():
        if is_real(buffer):
            checks[name] = (buffer < math.inf).all()  # False for NaN too
    if not checks:
        return None
    fine = torch.stack(list(checks.values())).tolist()
    return next((name for name, good in zip(checks, fine, strict=True) if not good), None)


def is_real(tensor: Tensor) -> bool:
    """Whether this has floating-point numbers."""
    return tensor.is_floating_point() and not tensor.is_meta and tensor.numel() > 0


def refuse_weights(model: nn.Module) -> None:
    """Raises NoScoreError where the model has weights that are not finite."""
    name = first_nonfinite(model)
    if name is not None:
        raise NoScoreError(
            f"no score: the model's {name} has values that are not finite (NaN or infinity); the"
            " weights are damaged or their training diverged, use an earlier checkpoint",
            by_weights=True,
        )


def refuse_outputs(bad: int, images: int, dtype: torch.dtype) -> None:
    """Raises NoScoreError where a model of finite weights gave outputs of this dtype for so many
    images, of which `bad` are not finite.
    """
    if bad:
        raise NoScoreError(
            f"no score: the model's outputs are not finite (NaN or infinity) for {bad} of"
            f" {images} images although its weights are; computed in {dtype}".replace("torch.", "")
            + ": try AMP_DTYPE bfloat16 or float32 (--disable_amp)",
            by_weights=False,
        )
