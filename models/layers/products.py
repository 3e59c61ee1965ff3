"""x Wᵀ + b: in which precision it is computed, in which layout the weight is kept, and how much is
worked on at a time.

A processor without 16-bit arithmetic multiplies 16-bit matrices several times slower than float32
ones (PyTorch takes them apart in every product). There the product is computed in float32, with
weights that are not rounded, and its result is rounded to 16 bits once: never less exact than the
16-bit product.
"""

import platform
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# What is converted from or to 16 bits is worked on in chunks of this size, which stay in the cache;
# from 32 MiB on the C library would map and clear fresh pages for every such matrix.
CHUNK_BYTES = 4 << 20
# Up to so many columns in, oneDNN's float32 product, which adds the bias itself, is faster in
# training than the BLAS one where the result is larger than a chunk.
NARROW = 128
_MKLDNN = torch.ops.mkldnn


def _not_multiplied() -> frozenset[torch.dtype]:
    """16-bit dtypes whose matrices this processor does not multiply itself. Other processors than
    x86-64 are taken to do so.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return frozenset()

    def has(
        place: object, *questions: str
    ) -> bool:  # what PyTorch cannot tell is taken to be there
        return any(getattr(place, question, lambda: True)() for question in questions)

    found = {
        torch.bfloat16: has(torch.cpu, "_is_avx512_bf16_supported", "_is_amx_tile_supported"),
        torch.float16: (
            torch.backends.mkldnn.is_available() and has(_MKLDNN, "_is_mkldnn_fp16_supported")
        ),
    }
    return frozenset(dtype for dtype, multiplied in found.items() if not multiplied)


WIDENED = _not_multiplied()  # what is multiplied in float32 on the CPU


def result_dtype(x: Tensor) -> torch.dtype:
    """Of a product with x: autocast's where it is on (it leaves float64 alone), else that of x."""
    kind = x.device.type
    return (
        torch.get_autocast_dtype(kind)
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64
        else x.dtype
    )


def computed_in(dtype: torch.dtype, kind: str) -> torch.dtype:
    """The dtype of the operands of a product whose result has `dtype`, on devices of `kind`."""
    return torch.float32 if kind == "cpu" and dtype in WIDENED else dtype


def describe_products(dtype: torch.dtype, kind: str) -> str | None:
    """A line for a log where linear layers do not compute in autocast's dtype, else None."""
    if computed_in(dtype, kind) == dtype:
        return None
    name = str(dtype).removeprefix("torch.")
    return (
        f"products: this processor has no {name} arithmetic; linear layers compute in float32,"
        f" their results are {name}"
    )


def chunks(rows: int, width: int, inner: torch.dtype) -> Iterator[slice]:
    """Slices of `rows` rows of `width` numbers of dtype `inner`."""
    step = max(64, CHUNK_BYTES // (width * inner.itemsize))
    return (slice(start, start + step) for start in range(0, rows, step))


def addmm_into(out: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """out = a b + bias; returns it in the dtype of a, which `out` may be narrower than."""
    if out.dtype == a.dtype:
        return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)
    product = torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)
    out.copy_(product)
    return product


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b with gradients, in autocast's dtype where it is on: (..., in) -> (..., out)."""
    dtype, kind = result_dtype(x), x.device.type
    if computed_in(dtype, kind) == dtype:
        if kind == "cpu" and keeps_ready(recording=True) and _pays_narrow(x, weight, bias, dtype):
            tokens = _Narrow.apply(
                x.reshape(-1, x.shape[-1]), weight, bias
            )  # what it returns may not be a view, so that callers may
            return tokens.view(*x.shape[:-1], len(weight))  # change the product in place
        return F.linear(x, weight, bias)  # autocast casts
    with torch.autocast(kind, enabled=False):
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(
                dtype
            )
        return _Widened.apply(x, weight, bias, dtype)


def _pays_narrow(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> bool:
    columns = x.shape[-1]
    return (
        bias is not None
        and x.dtype == dtype == torch.float32
        and 0 < columns <= NARROW
        and x.numel() // columns * len(weight) * 4 > CHUNK_BYTES
        and _can_pack(weight, "cpu")
    )


class _Narrow(torch.autograd.Function):
    """(tokens, in) -> (tokens, out) for few columns in, where PyTorch takes a third longer: it
    copies the bias over the whole result before the product.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _MKLDNN._linear_pointwise(x, weight, bias, "none", [], "none")

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            grad @ weight if need_x else None,
            grad.t() @ x if need_weight else None,
            grad.sum(0) if need_bias else None,
        )


class _Widened(torch.autograd.Function):
    """A product in float32 with a 16-bit result; x is kept for the backward as it came."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _widened(x, weight.float(), None if bias is None else bias.float(), dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        tokens, grad, wide = (
            x.reshape(-1, x.shape[-1]),
            grad.reshape(-1, grad.shape[-1]),
            weight.float(),
        )
        dx = torch.empty_like(tokens) if need_x else None
        dw = torch.zeros_like(wide) if need_weight else None
        db = wide.new_zeros(len(wide)) if need_bias else None
        with torch.autocast(x.device.type, enabled=False):
            for part in chunks(len(tokens), sum(wide.shape), torch.float32):
                g = grad[part].float()
                if need_x:
                    addmm_into(dx[part], None, g, wide)
                if need_weight:
                    dw.addmm_(g.t(), tokens[part].float())
                if need_bias:
                    db += g.sum(0)
        return (
            dx.view_as(x) if need_x else None,
            dw.to(weight.dtype) if need_weight else None,
            db.to(ctx.bias_dtype) if need_bias else None,
            None,
        )


def _widened(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(..., in) -> (..., out) of `dtype`; weight and bias in float32."""
    tokens = x.reshape(-1, x.shape[-1])
    y = x.new_empty(
        *x.shape[:-1], len(weight), dtype=dtype
    )  # no view is returned, so that callers may change it in place
    rows = y.view(len(tokens), len(weight))
    for part in chunks(len(tokens), sum(weight.shape), torch.float32):
        addmm_into(rows[part], bias, tokens[part].float(), weight.t())
    return y


def keeps_ready(recording: bool = False) -> bool:
    """Whether this is an evaluation (or `recording`: training) in which layers may keep what they
    make ready: nothing looks at single operations (a FLOP counter, torch.func, a tracer, fake
        tensors), which must see an ordinary product.
    """
    return not (
        torch.is_grad_enabled() is not recording
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
    )


class Ready:
    """Weight and bias of a linear layer, made ready once for many calls without gradients.

    dtype: of the result. On the CPU the weight is kept in the layout in which oneDNN multiplies,
    where it can be; a GELU behind the product is then part of it.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, kind: str):
        self.dtype, self.inner = dtype, computed_in(dtype, kind)
        self.weight, self.bias = (
            None if t is None else t.detach().to(self.inner) for t in (weight, bias)
        )
        self.packed = _can_pack(self.weight, kind)
        if self.packed:
            self.weight = _MKLDNN._reorder_linear_weight(self.weight.contiguous())

    def __call__(self, x: Tensor, gelu: bool = False, dtype: torch.dtype | None = None) -> Tensor:
        """(..., in) -> (..., out) of `dtype`, by default of the layer's own."""
        dtype = dtype or self.dtype
        width = self.weight.shape[0]
        if (
            self.inner == dtype
            or x.numel() // x.shape[-1] * width * self.inner.itemsize <= CHUNK_BYTES
        ):
            return self._product(x, gelu).to(dtype)
        tokens = x.reshape(-1, x.shape[-1])
        y = x.new_empty(len(tokens), width, dtype=dtype)
        for part in chunks(len(tokens), x.shape[-1] + width, self.inner):
            y[part] = self._product(tokens[part], gelu)
        return y.view(*x.shape[:-1], width)

    def _product(self, x: Tensor, gelu: bool) -> Tensor:
        x = x.to(self.inner)
        if self.packed and x.numel():
            return _MKLDNN._linear_pointwise(
                x, self.weight, self.bias, "gelu" if gelu else "none", [], "none"
            )
        if self.packed:
            return x.new_empty(*x.shape[:-1], self.weight.shape[0])
        y = F.linear(x, self.weight, self.bias) if self.inner == self.dtype else self._unfazed(x)
        return F.gelu(y) if gelu else y

    def _unfazed(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, self.weight, self.bias)


def _can_pack(weight: Tensor, kind: str) -> bool:
    """Whether oneDNN can keep this weight its own way: a plain matrix in a dtype that it multiplies
    here.
    """
    mkldnn = torch.backends.mkldnn
    if kind != "cpu" or weight.numel() == 0 or not mkldnn.is_available() or not mkldnn.enabled:
        return False
    dtypes = (
        (torch.float32, torch.bfloat16) if _MKLDNN._is_mkldnn_bf16_supported() else (torch.float32,)
    )
    return (
        type(weight) in (Tensor, torch.nn.Parameter)
        and weight.dtype in dtypes
        and hasattr(_MKLDNN, "_linear_pointwise")
    )
