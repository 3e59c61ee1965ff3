"""The specification of window attention: the shortest PyTorch that is right, in any dtype, on any
device, differentiable throughout.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.modes import without_autocast

from .arguments import check_arguments, check_epilogue, check_grid
from .epilogue import Epilogue, apply_epilogue
from .layout import WindowLayout, crop_grid, pad_grid, window_partition, window_reverse
from .terms import OffsetTerms


def split_windows(
    qkv: Tensor, layout: WindowLayout, num_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, H, W, 3C) -> q, k and v, each (B*nW, heads, N, D), of the padded and rolled grid."""
    check_grid(qkv, layout)
    x = pad_grid(qkv, layout)
    x = x.roll((-layout.shift[0], -layout.shift[1]), (1, 2)) if any(layout.shift) else x
    x = window_partition(x, layout.window).flatten(1, 2)
    return x.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def merge_windows(y: Tensor, layout: WindowLayout) -> Tensor:
    """(B*nW, heads, N, D) -> (B, H, W, C): rolls back and crops the padding."""
    y = y.transpose(1, 2).flatten(2).unflatten(1, layout.window)
    y = window_reverse(y, layout.window, *layout.padded)
    y = y.roll(layout.shift, (1, 2)) if any(layout.shift) else y
    return crop_grid(y, layout)


def add_mask(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Adds (nW, N, N) to the logits (B*nW, heads, N, N) of the windows of each image."""
    if mask is None:
        return logits
    return (logits.unflatten(0, (-1, len(mask))) + mask[:, None].to(logits.dtype)).flatten(0, 1)


def unit(x: Tensor) -> Tensor:
    """(..., D) divided by its norms, or by 1e-12 where they are less; float16 has no 1e-12, and
    zeros (padding) would be 0 / 0: there it is the least number above 0.
    """
    return F.normalize(x, dim=-1, eps=6e-8 if x.dtype == torch.float16 else 1e-12)


def masked_logits(
    q: Tensor, k: Tensor, terms: OffsetTerms, mask: Tensor | None = None, cosine: bool = False
) -> Tensor:
    """q kᵀ * scale + bias + mask on windows, (B*nW, heads, N, N) in float32 or wider; arguments as
    in `softmax_attention`.
    """
    if cosine:
        q, k = unit(q), unit(k)
    logits = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * terms.dense("scale")
    bias = terms.dense("bias")
    return add_mask(logits if bias is None else logits + bias, mask)


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    terms: OffsetTerms,
    mask: Tensor | None = None,
    cosine: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """map(softmax(q kᵀ * scale + bias + mask)) v on windows.

    q, k, v: (B*nW, heads, N, D).
    mask: (nW, N, N) or None.
    cosine: q and k are divided by their norms first (see `unit`).
    dropout: probability with which an entry of the map is dropped. The softmax runs in float32 or
        wider.
    """
    attn = softmaxed(masked_logits(q, k, terms, mask, cosine), terms)
    return F.dropout(attn, dropout).to(v.dtype) @ v


def softmaxed(logits: Tensor, terms: OffsetTerms) -> Tensor:
    """softmax(logits) * post, with rows that sum to 1 where the terms ask for it; a row of zeros
    stays one.

    Renormalised, pairs whose factor is 0 are left out of the softmax: beside a large logit that
    `post` takes away the others would be numbers too small to be divided by.
    """
    if terms.post is None:
        return logits.softmax(-1)
    post = terms.dense("post")
    if not terms.renormalise:
        return logits.softmax(-1) * post
    logits = logits.masked_fill(post == 0, -torch.inf)
    empty = (logits == -torch.inf).all(-1, keepdim=True)
    attn = logits.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0) * post
    total = attn.sum(-1, keepdim=True)
    return attn / torch.where(total == 0, 1.0, total)


def window_attention_reference(
    qkv: Tensor,
    terms: OffsetTerms,
    layout: WindowLayout,
    num_heads: int,
    cosine: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """Attention within the windows of a grid of packed projections: (B, H, W, 3C) -> (B, H, W, C).

    The channels of `qkv` are q, then k, then v, each split into heads. Scaling is part of
    `terms.scale`.
    Raises: ValueError for arguments that do not fit together (see `check_arguments`); so does every
        backend.
    """
    check_arguments(qkv, terms, layout, num_heads, dropout)
    q, k, v = split_windows(qkv, layout, num_heads)
    return merge_windows(softmax_attention(q, k, v, terms, layout.mask, cosine, dropout), layout)


def with_endings(
    y: Tensor,
    qkv: Tensor,
    terms: OffsetTerms,
    layout: WindowLayout,
    num_heads: int,
    cosine: bool = False,
    epilogue: Epilogue | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """What `window_attention` makes of the result y of attention: y, or y and the log-sum-exp."""
    check_epilogue(epilogue, qkv, num_heads)
    if epilogue is not None:
        y = apply_epilogue(y, qkv[..., -y.shape[-1] :], epilogue, num_heads)
    if not return_lse:
        return y
    return y, log_sum_exp(qkv, terms, layout, num_heads, cosine)


def log_sum_exp(
    qkv: Tensor, terms: OffsetTerms, layout: WindowLayout, num_heads: int, cosine: bool = False
) -> Tensor:
    """log sum_j exp(S_ij) of the logits S of `window_attention_reference`: (B, H, W, heads), in
    float32 or wider, the products too.
    """
    check_arguments(qkv, terms, layout, num_heads)
    with without_autocast(qkv.device.type):
        wide = qkv.to(torch.promote_types(qkv.dtype, torch.float32))
        q, k, _ = split_windows(wide, layout, num_heads)
        logits = masked_logits(q, k, terms, layout.mask, cosine)
        return merge_windows(logits.logsumexp(-1, keepdim=True), layout)
