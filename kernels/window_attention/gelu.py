"""GELU between two linear layers on the CPU, in one pass with the bias before it, the conversions
around it and the sums for that bias.

PyTorch's operations need a pass for each, and an error function that takes several times as long.
"""

import torch
from torch import Tensor

from .fused import DTYPES, missing


def compiled(dtype: torch.dtype) -> bool:
    """Whether the kernel of this machine is there for activations of `dtype`; the first question
    may compile it.
    """
    return dtype in DTYPES and missing("cpu") is None


def gelu_into(
    act: Tensor, before: Tensor, bias: Tensor | None = None, kept: Tensor | None = None
) -> Tensor:
    """act = gelu(before + bias), and kept = before; returns act.

    act, before: (rows, width) of one dtype, maybe the same memory. bias: (width,) in float32. kept:
    (rows, width), in 16 bits where act is float32, else of its dtype. All contiguous. No gradients.
    """
    torch.ops.idsw.gelu_forward(before, bias, kept, act)
    return act


def gelu_backward_into(
    act: Tensor, grad: Tensor, kept: Tensor, bias: Tensor | None = None
) -> Tensor:
    """act = gelu(kept + bias) once more; grad, which comes as the gradient of act, becomes that of
    kept; returns that of bias in float32.

    Shapes and dtypes as for `gelu_into`. The sums are the same with any number of threads.
    """
    return torch.ops.idsw.gelu_backward(kept, bias, act, grad)
