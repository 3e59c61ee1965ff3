"""What is switched on around an operation: autocast, which some devices do not have, and modes in
which tensors have no values.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

# Devices with autocast; asked once, since PyTorch 2.11 cannot trace the question.
AUTOCAST = frozenset(
    kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind)
)


def autocast_dtype(kind: str) -> torch.dtype | None:
    """The dtype of autocast on devices of `kind`, or None where it is off or does not exist."""
    if kind in AUTOCAST and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def without_autocast(kind: str) -> AbstractContextManager:
    """Inside, autocast is off on devices of `kind`, which may have none ("meta")."""
    return torch.autocast(kind, enabled=False) if kind in AUTOCAST else nullcontext()


def real_tensors() -> AbstractContextManager:
    """Inside, tensors have values also where fake ones are asked for around it."""
    return _disable_current_modes()


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether it is a tensor of FakeTensorMode, which has a shape, a dtype and a device alone."""
    return isinstance(tensor, FakeTensor)
