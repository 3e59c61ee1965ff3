"""fc2(gelu(fc1(x))) in eager PyTorch without writing the wide activation to memory more often than
it must be.
"""

import threading

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.derivatives import is_differentiated_again, is_transformed, plain_gradients

from . import precision
from .evaluation import kept_for
from .gelu import compiled, gelu_backward_into, gelu_into
from .layer import prepared, run_linear
from .precision import FEWEST_ROWS, computed_in, result_dtype
from .prepared import PreparedLinear
from .products import addmm_into
from .watched import is_cpu_inference, is_plain

# A hidden activation above WHOLE_BYTES is worked on in chunks, as in precision.py.
WHOLE_BYTES = 16 << 20
# Up to this size plain layers are as fast: with the compiled GELU, and without.
PLAIN_BYTES = {True: 1 << 20, False: 16 << 20}

_thread = threading.local()


def fused_mlp(x: Tensor, fc1: nn.Module, fc2: nn.Module) -> Tensor:
    """(..., C) -> (..., C), equal to fc2(gelu(fc1(x))).

    On the CPU in eager mode a large activation is worked on in chunks, only its values before the
    GELU are saved for the backward, and without gradients the GELU is part of the first product;
    under autocast in its dtype. Everything else, also layers that are not plain, goes through the
    two layers one by one.
    """
    if (
        x.device.type != "cpu"
        or x.numel() == 0
        or torch.compiler.is_compiling()
        or not _is_usual(fc1, fc2)
    ):
        return run_linear(fc2, F.gelu(run_linear(fc1, x)))
    dtype = result_dtype(x)
    inner = computed_in(dtype, "cpu")
    first, second = kept_for(fc1), kept_for(fc2)
    if is_cpu_inference(x):
        return _evaluate(x, prepared(fc1, x, first), prepared(fc2, x, second), inner)
    hidden_bytes = x.numel() // x.shape[-1] * fc1.out_features * dtype.itemsize
    small = hidden_bytes <= PLAIN_BYTES[compiled(inner)]
    if (small and inner == dtype) or is_transformed():
        return run_linear(fc2, F.gelu(run_linear(fc1, x)))
    parameters = [t.to(inner) for t in (fc1.weight, fc1.bias, fc2.weight, fc2.bias)]
    with torch.autocast("cpu", enabled=False):
        return _Mlp.apply(x if inner != dtype else x.to(dtype), *parameters, dtype)


def _is_usual(*layers: nn.Module) -> bool:
    """Whether both are plain and have a bias."""
    return all(is_plain(layer) and layer.bias is not None for layer in layers)


def _rows_of_chunk(rows: int, hidden: int, inner: torch.dtype) -> int:
    """Tokens worked on at a time: all where their hidden activation is small."""
    if rows * hidden * inner.itemsize <= WHOLE_BYTES:
        return rows
    return max(FEWEST_ROWS, precision.CHUNK_BYTES // (hidden * inner.itemsize))


def _evaluate(
    x: Tensor, first: PreparedLinear, second: PreparedLinear, inner: torch.dtype
) -> Tensor:
    """(..., C) -> (..., C) without gradients; between the layers in the dtype in which products are
    computed.
    """
    tokens = x.reshape(-1, x.shape[-1])
    rows = _rows_of_chunk(len(tokens), first.width, inner)
    if rows >= len(tokens):
        return second(first(x, gelu=True, dtype=inner))
    y = x.new_empty(len(tokens), second.width, dtype=second.dtype)
    for part, out in zip(tokens.split(rows), y.split(rows), strict=True):
        out.copy_(second(first(part, gelu=True, dtype=inner)))
    return y.view(*x.shape[:-1], -1)


def _scratch(count: int, rows: int, like: Tensor) -> Tensor:
    """(count, rows, out) for a weight (out, in): memory of this thread until its next call, so that
    no step asks the system for pages.
    """
    # Dispatch modes and inference mode make tensors that nothing else can use.
    if torch._C._len_torch_dispatch_stack() or torch.is_inference_mode_enabled():
        return like.new_empty(count, rows, len(like))
    size = count * rows * len(like) * like.itemsize
    memory = getattr(_thread, "memory", None)
    if memory is None or len(memory) < size:
        memory = _thread.memory = torch.empty(size, dtype=torch.uint8)
    return memory[:size].view(like.dtype).view(count, rows, len(like))


class _Mlp(torch.autograd.Function):
    """Saves x and the hidden activation before the GELU, both in 16 bits where the result is; the
    GELU is computed again in the backward.

    The parameters come in the dtype in which products are computed, `dtype` is that of the result.
    Where there is a kernel for the GELU it adds a float32 bias too (`late`), and what is saved is
    without; the bias of a 16-bit product is added before that is rounded.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, dtype: torch.dtype
    ) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        hidden = x.new_empty(len(tokens), len(w1), dtype=dtype)
        y = x.new_empty(*x.shape[:-1], len(w2), dtype=dtype)
        ctx.kernel = compiled(w1.dtype)
        late = b1 if ctx.kernel and w1.dtype == torch.float32 else None
        rows = _rows_of_chunk(len(tokens), len(w1), w1.dtype)
        scratch = _scratch(1, rows, w1)[0] if ctx.kernel else None
        parts = (t.split(rows) for t in (tokens, hidden, y.view(len(tokens), len(w2))))
        for a, saved, out in zip(*parts, strict=True):
            a = a.to(w1.dtype)
            if ctx.kernel:
                act = _first_layer(a, w1, b1, late, saved, scratch[: len(a)])
            else:
                act = F.gelu(addmm_into(saved, b1, a, w1.t()))
            addmm_into(out, b2, act, w2.t())
        ctx.save_for_backward(x, hidden, w1, b1, w2)
        ctx.late = late is not None
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, hidden, w1, b1, w2 = ctx.saved_tensors
        if is_differentiated_again(grad):
            return _plain_gradients(ctx, x, w1, b1, w2, grad)
        late = b1 if ctx.late else None
        tokens = x.reshape(-1, x.shape[-1])
        grad = grad.reshape(-1, grad.shape[-1])
        inner = w1.dtype
        exact = torch.promote_types(inner, torch.float32)
        rows = _rows_of_chunk(len(tokens), len(w1), inner)
        dx = torch.empty_like(tokens)
        dw1, dw2 = _Sum(w1, exact), _Sum(w2, exact)
        db1, db2 = (w.new_zeros(len(w), dtype=exact) for w in (w1, w2))
        acts, dhiddens = _scratch(2, rows, w1) if ctx.kernel else (None, None)
        parts = (t.split(rows) for t in (grad, hidden, tokens, dx))
        with torch.autocast("cpu", enabled=False):
            for g, saved, a, out in zip(*parts, strict=True):
                g = g.to(inner)
                if ctx.kernel:
                    act = acts[: len(g)]
                    dhidden = torch.mm(g, w2, out=dhiddens[: len(g)])
                    db1 += gelu_backward_into(act, dhidden, saved, late)
                else:
                    before = saved.to(inner)
                    act = F.gelu(before)
                    dhidden = torch.ops.aten.gelu_backward(g @ w2, before)
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


def _plain_gradients(ctx, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, grad: Tensor):
    """What the backward of `_Mlp` returns, as PyTorch's own operations compute it."""

    def formula(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x.to(w1.dtype), w1, b1)), w2, b2).to(grad.dtype)

    b2 = w2.new_zeros(len(w2))  # no gradient depends on its value
    with torch.autocast("cpu", enabled=False):
        grads = plain_gradients(formula, (x, w1, b1, w2, b2), grad, ctx.needs_input_grad[:5])
    return *grads, None


def _first_layer(
    a: Tensor, w1: Tensor, b1: Tensor, late: Tensor | None, saved: Tensor, act: Tensor
) -> Tensor:
    """act = gelu(a w1ᵀ + b1) by the compiled GELU; `saved` becomes its argument, without a bias
    that is added late.
    """
    # Where the product is wider than what is saved, the activation takes its memory.
    same = saved.dtype == act.dtype
    product = saved if same else act
    if late is None:
        torch.addmm(b1, a, w1.t(), out=product)
    else:
        torch.mm(a, w1.t(), out=product)
    return gelu_into(act, product, late, None if same else saved)


class _Sum:
    """A sum of products of matrices, like `like` but of dtype `exact`: products in 16 bits are
    added up in float32. The first product is written, the others are added.
    """

    def __init__(self, like: Tensor, exact: torch.dtype):
        self.total = torch.empty_like(like, dtype=exact)
        self.beta = 0

    def add(self, a: Tensor, b: Tensor) -> None:
        if a.dtype == self.total.dtype:  # not addmm_, which PyTorch's FLOP counter leaves out
            torch.addmm(self.total, a, b, beta=self.beta, out=self.total)
        elif self.beta:
            self.total.add_(a @ b)
        else:
            self.total.copy_(a @ b)
        self.beta = 1
