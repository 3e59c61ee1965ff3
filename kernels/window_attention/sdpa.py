"""Window attention through PyTorch's scaled_dot_product_attention: only where the scale is one
number per head.
"""

import torch.nn.functional as F
from torch import Tensor

from kernels.derivatives import is_transformed

from .arguments import check_arguments
from .layout import WindowLayout
from .reference import merge_windows, split_windows, unit, window_attention_reference
from .terms import OffsetTerms


def sdpa_cannot(terms: OffsetTerms) -> str | None:
    """Why this backend cannot do what is asked, or None."""
    if terms.post is None and terms.scale.dim() == 2 and terms.scale.shape[0] == 1:
        return None
    return (
        "the sdpa backend takes one scale per head and no factor after the softmax; use backend"
        " 'eager'"
    )


def window_attention_sdpa(
    qkv: Tensor,
    terms: OffsetTerms,
    layout: WindowLayout,
    num_heads: int,
    cosine: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """(B, H, W, 3C) -> (B, H, W, C); see `window_attention_reference`. The scale is folded into
    q.
    """
    check_arguments(qkv, terms, layout, num_heads, dropout)
    reason = sdpa_cannot(terms)
    if reason:
        raise ValueError(f"window_attention: {reason}")
    if is_transformed():
        return window_attention_reference(qkv, terms, layout, num_heads, cosine, dropout)
    q, k, v = split_windows(qkv, layout, num_heads)
    if cosine:
        q, k = unit(q), unit(k)
    q = (q * terms.dense("scale")).to(v.dtype)
    bias = terms.masked_bias(layout)
    if bias is not None:  # (nW or 1, heads, N, N) -> one for every window of every image
        bias = bias.to(q.dtype)
        if len(bias) > 1:
            bias = bias.expand(q.shape[0] // len(bias), *bias.shape).flatten(0, 1)
    y = F.scaled_dot_product_attention(
        q, k.to(v.dtype), v, attn_mask=bias, dropout_p=dropout, scale=1.0
    )
    return merge_windows(y, layout)
