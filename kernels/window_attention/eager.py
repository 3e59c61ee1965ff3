"""Window attention in eager PyTorch with a hand-written backward: few passes, few copies, little
memory.

Same result as `reference.py` up to rounding. What is saved over letting autograd do it:
- one gather does padding-free shift, partition and split into heads, one more brings the result
  back;
- images are handled in chunks whose logits stay in the cache; scale, bias and mask are applied to
  them in one pass, in place;
- only q, k, v and the softmaxed map are kept for the backward; the logits are formed again where
  their gradient needs them.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.derivatives import is_differentiated_again, is_transformed, plain_gradients
from kernels.modes import without_autocast

from .arguments import check_arguments
from .layout import WindowLayout, crop_grid, pad_grid
from .reference import window_attention_reference
from .terms import OffsetTerms

# Bytes of logits worked on at a time on the CPU: about what the second-level cache of one or two
# cores holds.
CHUNK_BYTES = 4 << 20
# Entries of the map below this are set to 0: far below rounding beside a row sum of 1, and products
# with the denormal numbers that a mask of -100 leaves behind are some ten times slower than others.
NEGLIGIBLE = 1e-30


def eager_cannot(terms: OffsetTerms, dropout: float) -> str | None:
    """Why this backend cannot do what is asked, or None."""
    if dropout or terms.post is not None:
        return (
            "the eager backend has no dropout and no factor after the softmax; use backend"
            " 'reference'"
        )
    return None


def window_attention_eager(
    qkv: Tensor,
    terms: OffsetTerms,
    layout: WindowLayout,
    num_heads: int,
    cosine: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """(B, H, W, 3C) -> (B, H, W, C); see `window_attention_reference`. No dropout, no `post`
    term.
    """
    check_arguments(qkv, terms, layout, num_heads, dropout)
    reason = eager_cannot(terms, dropout)
    if reason:
        raise ValueError(f"window_attention: {reason}")
    if is_transformed():
        return window_attention_reference(qkv, terms, layout, num_heads, cosine)
    scale, bias = terms.dense("scale"), terms.dense("bias")
    padded = pad_grid(qkv, layout)
    with without_autocast(qkv.device.type):
        if torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (qkv, scale, bias)
        ):
            edge = _Edge.apply(padded)
            y = _Attention.apply(padded, scale, bias, edge, layout, num_heads, cosine)
        else:
            y = _forward(padded, scale, terms.masked_bias(layout), layout, num_heads, cosine)[0]
    return crop_grid(y, layout)


def _split(x: Tensor, layout: WindowLayout, parts: int, heads: int) -> Tensor:
    """(B, H, W, parts*C) -> (parts, B, nW*heads, N, D), contiguous."""
    there, _ = layout.head_rows(x.shape[0], parts, heads)
    width = x.shape[-1] // (parts * heads)
    rows = x.reshape(there.numel(), width).index_select(0, there)
    return rows.view(parts, x.shape[0], layout.num_windows * heads, layout.area, width)


def _merge(x: Tensor, layout: WindowLayout, parts: int, heads: int) -> Tensor:
    """Undoes `_split`."""
    batch, width = x.shape[1], x.shape[-1]
    _, back = layout.head_rows(batch, parts, heads)
    return (
        x.view(back.numel(), width)
        .index_select(0, back)
        .view(batch, *layout.padded, parts * heads * width)
    )


def _chunks(batch: int, logits: int, device: torch.device) -> range:
    """First images of the chunks; all at once on an accelerator, whose caches a loop from Python
    cannot use.
    """
    step = max(1, CHUNK_BYTES // (4 * logits)) if device.type == "cpu" else batch
    return range(0, batch, min(step, batch) or 1)


def _normalise(x: Tensor) -> Tensor:
    """Divides the vectors of (..., D) by their norms (at least 1e-12) in place; returns 1 / norm,
    (..., 1).
    """
    inverse = torch.linalg.vector_norm(
        x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)
    )
    inverse = inverse.clamp_(min=1e-12).reciprocal_()
    x.mul_(inverse)
    return inverse


def _forward(
    qkv: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    layout: WindowLayout,
    heads: int,
    cosine: bool,
    keep: bool = False,
):
    """Returns (y, packed, inverse norms, map); the last three are for the backward, the map only if
    `keep`.

    bias: (nW or 1, heads, N, N), the mask included, or None.
    """
    packed = _split(qkv, layout, 3, heads)  # (3, B, nW*heads, N, D)
    inverse = _normalise(packed[:2]) if cosine else None
    _, batch, windows, area, _ = packed.shape
    wide = torch.promote_types(qkv.dtype, torch.float32)
    y = torch.empty_like(packed[0])
    attn = packed.new_empty((batch, windows, area, area)) if keep else None
    steps = _chunks(batch, windows * area * area, qkv.device)
    for start in steps:
        q, k, v = (part.flatten(0, 1) for part in packed[:, start : start + steps.step])
        logits = torch.bmm(q, k.mT).to(wide)
        view = logits.view(-1, layout.num_windows, heads, area, area)
        if bias is None:
            torch.mul(view, scale, out=view)
        else:
            torch.addcmul(bias, view, scale, out=view)
        chunk = None
        if keep and wide == packed.dtype:  # the map needs no conversion and is written in place
            chunk = attn[start : start + steps.step].view_as(logits)
        chunk = torch.softmax(logits, -1, out=chunk)
        if layout.mask is not None:
            F.threshold_(chunk, NEGLIGIBLE, 0.0)
        if wide != packed.dtype:
            chunk = chunk.to(packed.dtype)
            if keep:
                attn[start : start + steps.step] = chunk.view(-1, windows, area, area)
        torch.bmm(chunk, v, out=y[start : start + steps.step].flatten(0, 1))
    return _merge(y[None], layout, 1, heads), packed, inverse, attn


class _Edge(torch.autograd.Function):
    """Zeros of the shape of x without memory of their own, through which a gradient reaches x: a
    second derivative with respect to x needs the place in the graph, not a copy of the values.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.new_zeros(()).expand(x.shape)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


class _Attention(torch.autograd.Function):
    """Gradients of qkv, scale (heads, 1 or N, 1 or N) and bias (heads, N, N); `edge` leads to
    qkv.
    """

    @staticmethod
    def forward(
        ctx,
        qkv: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        edge: Tensor,
        layout: WindowLayout,
        heads: int,
        cosine: bool,
    ) -> Tensor:
        terms = OffsetTerms(layout.window, scale, bias)
        y, packed, inverse, attn = _forward(
            qkv, scale, terms.masked_bias(layout), layout, heads, cosine, keep=True
        )
        ctx.save_for_backward(packed, inverse, attn, scale, bias, edge)
        ctx.layout, ctx.heads, ctx.bias_shape = layout, heads, None if bias is None else bias.shape
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        packed, inverse, attn, scale, bias, edge = ctx.saved_tensors
        layout, heads = ctx.layout, ctx.heads
        if is_differentiated_again(grad):
            qkv = _unpack(packed, inverse, layout, heads) + edge
            cosine = inverse is not None
            grads = plain_gradients(
                lambda *inputs: _plain(*inputs, layout, heads, cosine),
                (qkv, scale, bias),
                grad,
                ctx.needs_input_grad[:3],
            )
            return *grads, *(None,) * 4
        grads = torch.empty_like(packed)
        grad = _split(grad.contiguous(), layout, 1, heads)[0]
        sums = _Sums(
            scale, ctx.needs_input_grad[1], ctx.bias_shape if ctx.needs_input_grad[2] else None
        )
        _, batch, windows, area, _ = packed.shape
        steps = _chunks(batch, windows * area * area, grad.device)
        for start in steps:
            part = slice(start, start + steps.step)
            _backward_chunk(
                packed[:, part].flatten(1, 2),
                attn[part].flatten(0, 1),
                grad[part].flatten(0, 1),
                grads[:, part].flatten(1, 2),
                scale,
                sums,
                heads,
            )
        if inverse is not None:  # through x / |x|
            unit, through = packed[:2], grads[:2]
            along = (unit * through).sum(-1, keepdim=True)
            through.addcmul_(unit, along, value=-1).mul_(inverse)
        return _merge(grads, layout, 3, heads), sums.scale, sums.bias, *(None,) * 4


def _unpack(packed: Tensor, inverse: Tensor | None, layout: WindowLayout, heads: int) -> Tensor:
    """The padded qkv that `_forward` packed."""
    if inverse is not None:
        packed = torch.cat([packed[:2] / inverse, packed[2:]])
    return _merge(packed, layout, 3, heads)


def _plain(
    qkv: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    layout: WindowLayout,
    heads: int,
    cosine: bool,
) -> Tensor:
    """What `_Attention` computes, as the specification does."""
    terms = OffsetTerms(layout.window, scale, bias)
    whole = replace(layout, grid=layout.padded)
    with without_autocast(qkv.device.type):
        return window_attention_reference(qkv, terms, whole, heads, cosine)


class _Sums:
    """The gradients of scale and bias, summed over images and windows."""

    def __init__(self, scale: Tensor, scale_needed: bool, bias_shape: torch.Size | None):
        self.scale = torch.zeros_like(scale) if scale_needed else None
        self.bias = None if bias_shape is None else scale.new_zeros(bias_shape)
        self.scale_is_uniform = scale.shape[-1] == 1


def _backward_chunk(
    packed: Tensor,
    attn: Tensor,
    grad: Tensor,
    grads: Tensor,
    scale: Tensor,
    sums: _Sums,
    heads: int,
) -> None:
    """Adds one chunk's part to `sums` and writes its dq, dk, dv into `grads`.

    packed, grads: (3, n, N, D) with n = images * nW * heads.
    attn: (n, N, N).
    grad: (n, N, D).
    """
    q, k, v = packed
    area = attn.shape[-1]
    torch.bmm(attn.mT, grad, out=grads[2])
    dlogits = torch.bmm(grad, v.mT)
    dlogits = torch._softmax_backward_data(dlogits, attn, -1, dlogits.dtype)
    by_head = dlogits.view(-1, heads, area, area)
    if sums.bias is not None:
        sums.bias += by_head.sum(0, dtype=sums.bias.dtype)
    if sums.scale is not None and not sums.scale_is_uniform:
        products = torch.bmm(q, k.mT).mul_(dlogits).view(-1, heads, area, area)
        sums.scale += products.sum(0, dtype=sums.scale.dtype)
    if not sums.scale_is_uniform:
        by_head.mul_(scale)
    torch.bmm(dlogits, k, out=grads[0])
    torch.bmm(dlogits.mT, q, out=grads[1])
    if sums.scale_is_uniform:
        dq, dk = grads[0].view(-1, heads, *q.shape[1:]), grads[1].view(-1, heads, *q.shape[1:])
        if sums.scale is not None:
            sums.scale += (
                (q.view_as(dq) * dq).sum((0, 2, 3), dtype=sums.scale.dtype).view_as(sums.scale)
            )
        dq.mul_(scale)
        dk.mul_(scale)
