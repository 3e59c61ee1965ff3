"""GELU between two linear layers on the CPU, in one pass with the bias before it, the conversions
around it and the sums for that bias.

PyTorch's operations need a pass for each, and an error function that takes several times as long.
"""

import torch
from torch import Tensor

from kernels.library import loader


def compiled(dtype: torch.dtype) -> bool:
    """Whether the kernel of this machine is there for activations of `dtype`; the first question
    may compile it.
    """
    return dtype in loader.DTYPES and loader.missing("cpu") is None


def gelu_into(
    act: Tensor, before: Tensor, bias: Tensor | None = None, saved: Tensor | None = None
) -> Tensor:
    """act = gelu(before + bias), and saved = before; returns act.

    act, before: (rows, width) of one dtype, maybe the same memory.
    bias: (width,) in float32.
    saved: (rows, width), in 16 bits where act is float32, else of its dtype.

    All are contiguous. Raises: ValueError where a gradient would be recorded: there is none.
    """
    _refuse_gradients(act, before, bias)
    torch.ops.idsw.gelu_forward(before, bias, saved, act)
    return act


def gelu_backward_into(
    act: Tensor, grad: Tensor, saved: Tensor, bias: Tensor | None = None
) -> Tensor:
    """act = gelu(saved + bias) once more; grad, which comes as the gradient of act, becomes that of
    saved; returns that of bias in float32.

    Shapes, dtypes and errors as for `gelu_into`. The sums are the same with any number of threads.
    """
    _refuse_gradients(act, grad, saved, bias)
    return torch.ops.idsw.gelu_backward(saved, bias, act, grad)


def _refuse_gradients(*tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise ValueError("gelu: it has no gradient; call torch.nn.functional.gelu for one")


@loader.after_loading
def _register() -> None:
    """Tells PyTorch the shapes for tracing."""
    torch.library.register_fake("idsw::gelu_forward", lambda before, bias, kept, act: None)
    torch.library.register_fake(
        "idsw::gelu_backward",
        lambda kept, bias, act, grad: act.new_empty(act.shape[1:], dtype=torch.float32),
    )
