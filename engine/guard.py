"""Updates whose gradient is not finite: skipped on the device, so that the host never waits for
the answer.
"""

import torch
from torch import Tensor

from utils import RunError


class DivergedError(RunError):
    """Too many updates in a row had a non-finite gradient."""


@torch.no_grad()
def guarded_step(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """`optimizer.step()` if `finite` (a boolean scalar on the gradients' device) is True;
    otherwise the weights stay as they are.

    On the CPU, and with torch's fused Adam and AdamW, the optimizer's own state stays as well. The
    others take a step with a zero gradient whose effect on the weights is undone: their moments
    decay once and their step count advances, because to leave them out the host would have to wait
    for the device in every update.
    """
    if finite.device.type == "cpu":
        if finite:
            optimizer.step()
    elif is_fused_adam(optimizer):
        fused_step(optimizer, finite)
    else:
        masked_step(optimizer, finite)


def is_fused_adam(optimizer: torch.optim.Optimizer) -> bool:
    """Whether this is torch's fused Adam or AdamW."""
    fused = getattr(optimizer, "_step_supports_amp_scaling", False)
    return fused and isinstance(optimizer, torch.optim.Adam)


def fused_step(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """A step of torch's fused Adam or AdamW, whose kernel itself does nothing where `finite` is
    False.

    Not for its fused SGD, which leaves the momentum unset where the very first step is skipped
    (torch 2.15).
    """
    optimizer.grad_scale = None
    optimizer.found_inf = (~finite).float()
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf


@torch.no_grad()
def masked_step(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """A step of any optimizer whose effect on the weights is undone on the device where `finite` is
    False.
    """
    parameters = [
        p for group in optimizer.param_groups for p in group["params"] if p.grad is not None
    ]
    before = [p.clone() for p in parameters]
    for p in parameters:
        p.grad.copy_(torch.where(finite, p.grad, 0))
    optimizer.step()
    for p, old in zip(parameters, before, strict=True):
        p.copy_(torch.where(finite, p, old))
