"""fc2(gelu(fc1(x))) in eager PyTorch without writing the wide activation to memory more often than it must be."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .linear import Linear
from .products import CHUNK_BYTES, addmm_into, computed_in, keeps_ready, result_dtype

# A hidden activation above WHOLE_BYTES is worked on in chunks, as in products.py. Below, plain layers are as fast.
WHOLE_BYTES = 16 << 20


def fused_mlp(x: Tensor, fc1: Linear, fc2: Linear) -> Tensor:
    """(..., C) -> (..., C), equal to fc2(gelu(fc1(x))).

    On the CPU in eager mode a large activation is worked on in chunks, only its values before the GELU are kept for the backward, and
    without gradients the GELU is part of the first product; under autocast in its dtype. Everything else, also where the layers are
    hooked, goes through the plain layers.
    """
    if x.device.type != "cpu" or x.numel() == 0 or torch.compiler.is_compiling() or _is_hooked(fc1, fc2):
        return fc2(F.gelu(fc1(x)))
    dtype = result_dtype(x)
    inner = computed_in(dtype, "cpu")
    if keeps_ready():
        return _evaluate(x, fc1, fc2, inner)
    small = x.numel() // x.shape[-1] * fc1.out_features * dtype.itemsize <= WHOLE_BYTES
    if (small and inner == dtype) or torch._C._are_functorch_transforms_active():
        return fc2(F.gelu(fc1(x)))
    parameters = [t.to(inner) for t in (fc1.weight, fc1.bias, fc2.weight, fc2.bias)]
    with torch.autocast("cpu", enabled=False):
        return _Mlp.apply(x if inner != dtype else x.to(dtype), *parameters, dtype)


def _is_hooked(*layers: Linear) -> bool:
    return any(type(layer) is not Linear or layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks
               for layer in layers)


def _chunks(rows: int, hidden: int, inner: torch.dtype) -> list[slice]:
    """Slices of all rows, or one of everything where that is small."""
    step = max(64, CHUNK_BYTES // (hidden * inner.itemsize))
    step = step if rows * hidden * inner.itemsize > WHOLE_BYTES else max(rows, 1)
    return [slice(start, start + step) for start in range(0, rows, step)]


def _evaluate(x: Tensor, fc1: Linear, fc2: Linear, inner: torch.dtype) -> Tensor:
    """(..., C) -> (..., C) without gradients; between the layers in the dtype in which products are computed."""
    first, second = fc1.ready(x), fc2.ready(x)
    tokens = x.reshape(-1, x.shape[-1])
    parts = _chunks(len(tokens), fc1.out_features, inner)
    if len(parts) <= 1:
        return second(first(x, gelu=True, dtype=inner))
    y = x.new_empty(len(tokens), fc2.out_features, dtype=second.dtype)
    for part in parts:
        y[part] = second(first(tokens[part], gelu=True, dtype=inner))
    return y.view(*x.shape[:-1], -1)


class _Mlp(torch.autograd.Function):
    """Keeps x and the hidden activation before the GELU, both in 16 bits where the result is; the GELU is computed again in the backward.

    The parameters come in the dtype in which products are computed, `dtype` is that of the result.
    """

    @staticmethod
    def forward(ctx, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, dtype: torch.dtype) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        hidden = x.new_empty(len(tokens), len(w1), dtype=dtype)
        y = x.new_empty(*x.shape[:-1], len(w2), dtype=dtype)
        rows = y.view(len(tokens), len(w2))
        for part in _chunks(len(tokens), len(w1), w1.dtype):
            before = addmm_into(hidden[part], b1, tokens[part].to(w1.dtype), w1.t())
            addmm_into(rows[part], b2, F.gelu(before), w2.t())
        ctx.save_for_backward(x, hidden, w1, w2)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, hidden, w1, w2 = ctx.saved_tensors
        tokens, grad, inner = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1]), w1.dtype
        dx, dw1, dw2, db1 = torch.empty_like(tokens), torch.empty_like(w1), torch.empty_like(w2), w1.new_zeros(len(w1))
        with torch.autocast("cpu", enabled=False):
            for part in _chunks(len(tokens), len(w1), inner):
                before, g = hidden[part].to(inner), grad[part].to(inner)
                beta = 1 if part.start else 0  # the first chunk writes, the others add
                dw2.addmm_(g.t(), F.gelu(before), beta=beta)
                dhidden = torch.ops.aten.gelu_backward(g @ w2, before)
                dw1.addmm_(dhidden.t(), tokens[part].to(inner), beta=beta)
                db1 += dhidden.sum(0)
                addmm_into(dx[part], None, dhidden, w1)
        return dx.view_as(x), dw1, db1, dw2, grad.sum(0, dtype=inner), None
