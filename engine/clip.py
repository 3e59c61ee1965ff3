"""Gradient clipping that reports the norm and never waits for the device."""

from collections.abc import Iterable

import torch
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor, nn

from utils import RunError

MODES = ("norm", "value", "agc")


def clip_gradients(
    parameters: Iterable[nn.Parameter],
    value: float | None,
    mode: str = "norm",
    exempt: Iterable[nn.Parameter] = (),
) -> Tensor:
    """Clips the gradients in place and returns their total 2-norm before clipping, a 0-d tensor on
    their device.

    Args:
        value: None or 0 only measures (in Swin 0.0 zeroes every gradient). Else it is, by mode, the
            largest total norm (norm), the largest absolute entry (value), or the largest ratio of a
            row's gradient norm to its weight norm (agc, adaptive clipping, arXiv:2102.06171).
        exempt: parameters that agc leaves alone; its paper leaves out the classifier.
    Raises: RunError for an unknown mode or a negative value.
    """
    if mode not in MODES:
        raise RunError(f"TRAIN.CLIP_MODE {mode!r} is not known; allowed: {', '.join(MODES)}")
    if value and value < 0:
        raise RunError(
            f"TRAIN.CLIP_GRAD {value} is negative; allowed: above 0, or 0 or None for off"
        )
    with_gradient = [p for p in parameters if p.grad is not None]
    total = nn.utils.get_total_norm([p.grad for p in with_gradient])
    if value:
        _clip(with_gradient, value, mode, total, {id(p) for p in exempt})
    return total


def _clip(
    parameters: list[nn.Parameter], value: float, mode: str, total: Tensor, exempt: set[int]
) -> None:
    if mode == "norm":
        nn.utils.clip_grads_with_norm_(parameters, value, total)
    elif mode == "value":
        nn.utils.clip_grad_value_(parameters, value)
    else:
        with torch.no_grad():
            adaptive_clip_grad([p for p in parameters if id(p) not in exempt], value)
