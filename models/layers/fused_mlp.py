"""fc2(gelu(fc1(x))) in eager PyTorch without writing the wide activation to memory more often than it must be."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .linear import Linear

# A hidden activation above WHOLE_BYTES is worked on in chunks of CHUNK_BYTES, which stay in the cache; from 32 MiB on the C library
# would map and clear fresh pages for every such activation. Below, plain layers are as fast.
WHOLE_BYTES = 16 << 20
CHUNK_BYTES = 4 << 20


def fused_mlp(x: Tensor, fc1: Linear, fc2: Linear) -> Tensor:
    """(..., C) -> (..., C), equal to fc2(gelu(fc1(x))).

    A large activation on the CPU in eager mode is worked on in chunks, and only its values before the GELU are kept for the
    backward; under autocast in its dtype. Everything else, also where the layers are hooked, goes through the plain layers.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    small = x.numel() // x.shape[-1] * fc1.out_features * dtype.itemsize <= WHOLE_BYTES
    if small or x.device.type != "cpu" or torch.compiler.is_compiling() or _is_hooked(fc1, fc2):
        return fc2(F.gelu(fc1(x)))
    operands = (x.to(dtype), *fc1.operands("cpu"), *fc2.operands("cpu"))
    with torch.autocast("cpu", enabled=False):
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in operands):
            return _Mlp.apply(*operands)
        return _forward(*operands)[0]


def _is_hooked(*layers: Linear) -> bool:
    return any(type(layer) is not Linear or layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks
               for layer in layers)


def _rows(hidden: int, x: Tensor) -> int:
    return max(64, CHUNK_BYTES // (hidden * x.element_size()))


def _forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, keep: bool = False) -> tuple[Tensor, Tensor | None]:
    """(..., C) -> (..., C) and, if `keep`, the hidden activation before the GELU, (tokens, hidden)."""
    tokens = x.reshape(-1, x.shape[-1])
    hidden = x.new_empty(len(tokens), len(w1)) if keep else None
    y = x.new_empty(len(tokens), len(w2))
    step = _rows(len(w1), x)
    for start in range(0, len(tokens), step):
        part = slice(start, start + step)
        before = torch.addmm(b1, tokens[part], w1.t(), out=hidden[part]) if keep else F.linear(tokens[part], w1, b1)
        torch.addmm(b2, F.gelu(before), w2.t(), out=y[part])
    return y.view(*x.shape[:-1], -1), hidden


class _Mlp(torch.autograd.Function):
    """Keeps x and the hidden activation before the GELU; the GELU is computed again in the backward."""

    @staticmethod
    def forward(ctx, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        y, hidden = _forward(x, w1, b1, w2, b2, keep=True)
        ctx.save_for_backward(x, hidden, w1, w2)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, hidden, w1, w2 = ctx.saved_tensors
        tokens, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        dx, dw1, dw2, db1 = torch.empty_like(tokens), torch.empty_like(w1), torch.empty_like(w2), w1.new_zeros(len(w1))
        step = _rows(len(w1), x)
        for start in range(0, len(tokens), step):
            part = slice(start, start + step)
            before = hidden[part]
            beta = 1 if start else 0  # the first chunk writes, the others add
            dw2.addmm_(grad[part].t(), F.gelu(before), beta=beta)
            dhidden = torch.ops.aten.gelu_backward(grad[part] @ w2, before)
            dw1.addmm_(dhidden.t(), tokens[part], beta=beta)
            db1 += dhidden.sum(0)
            torch.mm(dhidden, w1, out=dx[part])
        return dx.view_as(x), dw1, db1, dw2, grad.sum(0)
