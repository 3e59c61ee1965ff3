"""fc2(gelu(fc1(x))) in eager PyTorch without writing the wide activation to memory more often than
it must be.
"""

import threading

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.window_attention.gelu import compiled, gelu_backward_into, gelu_into

from .linear import Linear
from .products import CHUNK_BYTES, addmm_into, computed_in, keeps_ready, result_dtype

# A hidden activation above WHOLE_BYTES is worked on in chunks, as in products.py.
WHOLE_BYTES = 16 << 20
# Up to this size plain layers are as fast: with the compiled GELU, and without.
PLAIN_BYTES = {True: 1 << 20, False: 16 << 20}

_thread = threading.local()


def fused_mlp(x: Tensor, fc1: Linear, fc2: Linear) -> Tensor:
    """(..., C) -> (..., C), equal to fc2(gelu(fc1(x))).

    On the CPU in eager mode a large activation is worked on in chunks, only its values before the
    GELU are kept for the backward, and without gradients the GELU is part of the first product;
    under autocast in its dtype. Everything else, also where the layers are hooked, goes through the
    plain layers.
    """
    if (
        x.device.type != "cpu"
        or x.numel() == 0
        or torch.compiler.is_compiling()
        or _is_hooked(fc1, fc2)
    ):
        return fc2(F.gelu(fc1(x)))
    dtype = result_dtype(x)
    inner = computed_in(dtype, "cpu")
    if keeps_ready():
        return _evaluate(x, fc1, fc2, inner)
    small = (
        x.numel() // x.shape[-1] * fc1.out_features * dtype.itemsize <= PLAIN_BYTES[compiled(inner)]
    )
    if (small and inner == dtype) or torch._C._are_functorch_transforms_active():
        return fc2(F.gelu(fc1(x)))
    parameters = [t.to(inner) for t in (fc1.weight, fc1.bias, fc2.weight, fc2.bias)]
    with torch.autocast("cpu", enabled=False):
        return _Mlp.apply(x if inner != dtype else x.to(dtype), *parameters, dtype)


def _is_hooked(*layers: Linear) -> bool:
    return any(
        type(layer) is not Linear
        or layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        for layer in layers
    )


def _rows_of_chunk(rows: int, hidden: int, inner: torch.dtype) -> int:
    """Tokens worked on at a time: all where their hidden activation is small."""
    return (
        max(64, CHUNK_BYTES // (hidden * inner.itemsize))
        if rows * hidden * inner.itemsize > WHOLE_BYTES
        else rows
    )


def _evaluate(x: Tensor, fc1: Linear, fc2: Linear, inner: torch.dtype) -> Tensor:
    """(..., C) -> (..., C) without gradients; between the layers in the dtype in which products are
    computed.
    """
    first, second = fc1.ready(x), fc2.ready(x)
    tokens = x.reshape(-1, x.shape[-1])
    rows = _rows_of_chunk(len(tokens), fc1.out_features, inner)
    if rows >= len(tokens):
        return second(first(x, gelu=True, dtype=inner))
    y = x.new_empty(len(tokens), fc2.out_features, dtype=second.dtype)
    for part, out in zip(tokens.split(rows), y.split(rows), strict=True):
        out.copy_(second(first(part, gelu=True, dtype=inner)))
    return y.view(*x.shape[:-1], -1)


def _scratch(count: int, rows: int, like: Tensor) -> Tensor:
    """(count, rows, out) for a weight (out, in): memory of this thread until its next call, so that
    no step asks the system for pages.
    """
    if (
        torch._C._len_torch_dispatch_stack() or torch.is_inference_mode_enabled()
    ):  # these make tensors that nothing else can use
        return like.new_empty(count, rows, len(like))
    size = count * rows * len(like) * like.itemsize
    memory = getattr(_thread, "memory", None)
    if memory is None or len(memory) < size:
        memory = _thread.memory = torch.empty(size, dtype=torch.uint8)
    return memory[:size].view(like.dtype).view(count, rows, len(like))


class _Mlp(torch.autograd.Function):
    """Keeps x and the hidden activation before the GELU, both in 16 bits where the result is; the
    GELU is computed again in the backward.

    The parameters come in the dtype in which products are computed, `dtype` is that of the result.
    Where there is a kernel for the GELU it adds a float32 bias too, and what is kept is without;
    the bias of a 16-bit product is added before that is rounded.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, dtype: torch.dtype
    ) -> Tensor:
        tokens, first, second = x.reshape(-1, x.shape[-1]), w1.t(), w2.t()
        hidden = x.new_empty(len(tokens), len(w1), dtype=dtype)
        y = x.new_empty(*x.shape[:-1], len(w2), dtype=dtype)
        ctx.kernel = compiled(w1.dtype)
        late = b1 if ctx.kernel and w1.dtype == torch.float32 else None
        rows = _rows_of_chunk(len(tokens), len(w1), w1.dtype)
        scratch = _scratch(1, rows, w1)[0] if ctx.kernel else None
        for a, kept, out in zip(
            *(t.split(rows) for t in (tokens, hidden, y.view(len(tokens), len(w2)))), strict=True
        ):
            a = a.to(w1.dtype)
            if ctx.kernel:
                act = scratch[: len(a)]
                product = (
                    kept if kept.dtype == act.dtype else act
                )  # in a wider dtype than is kept, the GELU takes its place
                (
                    torch.mm(a, first, out=product)
                    if late is not None
                    else torch.addmm(b1, a, first, out=product)
                )
                gelu_into(act, product, late, kept if product is act else None)
            else:
                act = F.gelu(addmm_into(kept, b1, a, first))
            addmm_into(out, b2, act, second)
        ctx.save_for_backward(x, hidden, w1, w2, late)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, hidden, w1, w2, late = ctx.saved_tensors
        tokens, grad, inner = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1]), w1.dtype
        rows, exact = (
            _rows_of_chunk(len(tokens), len(w1), inner),
            torch.promote_types(inner, torch.float32),
        )
        dx, dw1, dw2 = torch.empty_like(tokens), _Sum(w1, exact), _Sum(w2, exact)
        db1, db2 = (w.new_zeros(len(w), dtype=exact) for w in (w1, w2))
        acts, dhiddens = _scratch(2, rows, w1) if ctx.kernel else (None, None)
        with torch.autocast("cpu", enabled=False):
            for g, kept, a, out in zip(
                *(t.split(rows) for t in (grad, hidden, tokens, dx)), strict=True
            ):
                g = g.to(inner)
                if ctx.kernel:
                    act, dhidden = acts[: len(g)], torch.mm(g, w2, out=dhiddens[: len(g)])
                    db1 += gelu_backward_into(act, dhidden, kept, late)
                else:
                    before = kept.to(inner)
                    act, dhidden = F.gelu(before), torch.ops.aten.gelu_backward(g @ w2, before)
                    db1 += dhidden.sum(0, dtype=exact)
                db2 += g.sum(0, dtype=exact)
                dw2.add(g.t(), act)
                dw1.add(dhidden.t(), a.to(inner))
                addmm_into(out, None, dhidden, w1)
        return (
            dx.view_as(x),
            dw1.total.to(inner),
            db1.to(inner),
            dw2.total.to(inner),
            db2.to(inner),
            None,
        )


class _Sum:
    """A sum of products of matrices, like `like` but of dtype `exact`: products in 16 bits are
    added up in float32.
    """

    def __init__(self, like: Tensor, exact: torch.dtype):
        self.total, self.beta = (
            torch.empty_like(like, dtype=exact),
            0,
        )  # the first product is written, the others are added

    def add(self, a: Tensor, b: Tensor) -> None:
        if a.dtype == self.total.dtype:
            self.total.addmm_(a, b, beta=self.beta)
        elif self.beta:
            self.total.add_(a @ b)
        else:
            self.total.copy_(a @ b)
        self.beta = 1
