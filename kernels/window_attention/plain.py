"""The compiled operation as a plain formula of the same arguments, for derivatives beyond the first
and as the truth for its dropout.
"""

import torch
from torch import Tensor

from kernels.modes import without_autocast

from .epilogue import Epilogue, apply_epilogue
from .layout import window_layout
from .reference import masked_logits, merge_windows, softmax_attention, split_windows
from .terms import OffsetTerms


def plain_attention(
    qkv: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    post: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    exclusion: Tensor | None,
    seed: Tensor | None,
    window: tuple[int, int],
    shift: tuple[int, int],
    num_heads: int,
    cosine: bool,
    mask_value: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """The result (B, H, W, C) and the log-sum-exp (B, nW, heads, N) of the logits, computed in
    float32 or wider; the same entries are dropped.
    """
    window, shift = tuple(window), tuple(shift)
    layout = window_layout(tuple(qkv.shape[1:3]), window, shift, mask_value, qkv.device)
    terms = OffsetTerms(window, scale, bias, post)
    with without_autocast(qkv.device.type):
        wide = qkv.to(torch.promote_types(qkv.dtype, torch.float32))
        q, k, v = split_windows(wide, layout, num_heads)
        if dropout:
            y = dropped_attention(q, k, v, terms, layout.mask, cosine, seed, dropout)
        else:
            y = softmax_attention(q, k, v, terms, layout.mask, cosine)
        y = merge_windows(y, layout)
        if not (alpha is None and exclusion is None):
            epilogue = Epilogue(alpha, beta, exclusion)
            y = apply_epilogue(y, wide[..., -y.shape[-1] :], epilogue, num_heads)
        lse = masked_logits(q, k, terms, layout.mask, cosine).logsumexp(-1)
        return y.to(qkv.dtype), lse.unflatten(0, (qkv.shape[0], -1))


def dropped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    terms: OffsetTerms,
    mask: Tensor | None,
    cosine: bool,
    seed: Tensor,
    dropout: float,
) -> Tensor:
    """`softmax_attention` with the entries dropped that the compiled kernels drop for `seed`."""
    batch, heads, area, _ = q.shape
    keep = keep_mask(seed, batch * heads * area, area, dropout).view(batch, heads, area, area)
    # Dropout is a factor after the softmax: with the identity as v the result is the map.
    eye = torch.eye(area, dtype=v.dtype, device=v.device).expand(batch, heads, area, area)
    return (softmax_attention(q, k, eye, terms, mask, cosine) * keep.to(v.dtype)) @ v


def keep_mask(seed: Tensor, rows: int, keys: int, dropout: float) -> Tensor:
    """(rows, keys) float64 in {0, 1 / (1 - dropout)}: wa_keep of csrc/args.h for rows 0 .. rows -
    1.

    seed: one int64; the result is on its device.
    """
    wrap = 1 << 64

    def signed(x: int) -> int:
        return (x % wrap + wrap // 2) % wrap - wrap // 2

    def shifted(x: Tensor, by: int) -> Tensor:  # logical shift of int64
        return (x >> by) & ((1 << (64 - by)) - 1)

    row = torch.arange(rows, device=seed.device)[:, None]
    key = torch.arange(keys, device=seed.device)
    x = (row * signed(0x9E3779B97F4A7C15) + key * signed(0xD1B54A32D192ED03)) ^ seed
    for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        x = (x ^ shifted(x, 33)) * signed(multiplier)
    x = shifted(x ^ shifted(x, 33), 32)
    threshold = int(
        float(torch.tensor(dropout, device="cpu")) * 2**32
    )  # float32, as in the structure
    return (x >= threshold).double() / (1 - dropout)
