"""x Wᵀ + b with gradients, in the way that is fastest on this processor."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.derivatives import is_differentiated_again, is_transformed, plain_gradients

from . import precision
from .precision import computed_in, result_dtype, row_chunks
from .prepared import can_pack
from .watched import is_observed

# Up to this many columns in, oneDNN's float32 product, which adds the bias itself, is faster in
# training than the BLAS one where the result is larger than a chunk.
NARROW = 128


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b with gradients, in autocast's dtype where it is on: (..., in) -> (..., out)."""
    dtype, kind = result_dtype(x), x.device.type
    if computed_in(dtype, kind) != dtype:
        return _linear_widened(x, weight, bias, dtype)
    if not (
        kind == "cpu"
        and torch.is_grad_enabled()
        and not is_observed()
        and _pays_narrow(x, weight, bias, dtype)
    ):
        return F.linear(x, weight, bias)  # autocast casts
    # A function must not return a view, so that callers may change the product in place.
    tokens = _Narrow.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    return tokens.view(*x.shape[:-1], len(weight))


def addmm_into(out: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """out = a b + bias; returns it in the dtype of a, which `out` may be narrower than."""
    if out.dtype == a.dtype:
        return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)
    product = torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)
    out.copy_(product)
    return product


def _pays_narrow(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> bool:
    columns = x.shape[-1]
    return (
        bias is not None
        and x.dtype == dtype == torch.float32
        and columns == weight.shape[1]
        and 0 < columns <= NARROW
        and x.numel() // columns * len(weight) * 4 > precision.CHUNK_BYTES
        and can_pack(weight, "cpu")
    )


class _Narrow(torch.autograd.Function):
    """(tokens, in) -> (tokens, out) for few columns in, where PyTorch takes a third longer: it
    copies the bias over the whole result before the product.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "none")

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            grad @ weight if need_x else None,
            grad.t() @ x if need_weight else None,
            grad.sum(0) if need_bias else None,
        )


def _linear_widened(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A product in float32 with a result of `dtype`."""
    with torch.autocast(x.device.type, enabled=False):
        if torch.compiler.is_compiling() or is_transformed():
            return _plain(x, weight, bias, dtype)
        return _Widened.apply(x, weight, bias, dtype)


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return F.linear(x.float(), weight.float(), _float(bias)).to(dtype)


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()


class _Widened(torch.autograd.Function):
    """A product in float32 with a 16-bit result; x is saved for the backward in its own dtype."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.dtype = dtype
        wide, bias = weight.float(), _float(bias)
        tokens = x.reshape(-1, x.shape[-1])
        # No view is returned, so that callers may change the product in place.
        y = x.new_empty(*x.shape[:-1], len(weight), dtype=dtype)
        rows = y.view(len(tokens), len(weight))
        for part in row_chunks(len(tokens), sum(weight.shape), torch.float32):
            addmm_into(rows[part], bias, tokens[part].float(), wide.t())
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, bias = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        if is_differentiated_again(grad):
            with torch.autocast(x.device.type, enabled=False):
                return *plain_gradients(
                    lambda *inputs: _plain(*inputs, ctx.dtype),
                    (x, weight, bias),
                    grad,
                    ctx.needs_input_grad[:3],
                ), None
        tokens = x.reshape(-1, x.shape[-1])
        grad = grad.reshape(-1, grad.shape[-1])
        wide = weight.float()
        dx = torch.empty_like(tokens) if need_x else None
        dw = torch.zeros_like(wide) if need_weight else None
        db = wide.new_zeros(len(wide)) if need_bias else None
        with torch.autocast(x.device.type, enabled=False):
            for part in row_chunks(len(tokens), sum(wide.shape), torch.float32):
                g = grad[part].float()
                if need_x:
                    addmm_into(dx[part], None, g, wide)
                if need_weight:
                    torch.addmm(dw, g.t(), tokens[part].float(), out=dw)
                if need_bias:
                    db += g.sum(0)
        return (
            dx.view_as(x) if need_x else None,
            dw.to(weight.dtype) if need_weight else None,
            db.to(bias.dtype) if need_bias else None,
            None,
        )
