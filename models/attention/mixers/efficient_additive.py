"""SwiftFormer's additive attention, by one pooled query per image."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.init import init_linear_and_norm
from registry import check_choice

from .base import MIXERS

POOL_NORMS = ("l2", "softmax", "none", "ones")
RESIDUALS = ("q", "none")
MAX_WIDEN = 64


def unit(x: Tensor, axis: int) -> Tensor:
    """x / max(‖x‖₂, 1e-12) along `axis`, in float32 or wider: in 16 bits the 1e-12 would be 0."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=axis, eps=1e-12)


@MIXERS.register("efficient_additive")
class EfficientAdditiveAttention(nn.Module):
    """SwiftFormer's attention: a learned score per token pools the queries into one vector, which
    meets every key.

        q = unit(x W_q), k = unit(x W_k)                 over channels
        a = pool_norm(q w_g / sqrt(out_dim))             over tokens, (N, 1)
        y = (proj(k * sum_n a_n q_n) + q) W_final

    Args:
        dim: channels of x.
        num_heads: has no effect, the layer has no heads; here so that all mixers are built alike.
        out_dim: channels of y, by default `dim`.
        widen: q and k have out_dim * widen channels (the original calls it num_heads).
        pool_norm: l2 (the released code since 2023-07-26), softmax over tokens, none (the paper's
            equations), or ones: all a are 1 and w_g gets a zero gradient, as in the first release,
            whose softmax ran over an axis of size 1.
        qk_norm: the units; False leaves q and k as projected.
        w_g: False puts a constant vector of ones in its place.
        residual: q adds the query before the last layer, none does not.
    Shapes: (..., N, dim) -> (..., N, out_dim); 4d² + 5d parameters where all widths are d. With N =
        1 and l2, a is +-1 and w_g gets no gradient. The scale cancels under l2.
    Raises: ValueError for an unknown word.
    Source: SwiftFormer, arXiv:2303.15446, eq. 4 to 6.
    """

    has_heads, needs_places = False, False

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        out_dim: int | None = None,
        widen: int = 1,
        pool_norm: str = "l2",
        qk_norm: bool = True,
        w_g: bool = True,
        residual: str = "q",
    ):
        super().__init__()
        self.pool_norm = check_choice("efficient_additive: pool_norm", pool_norm, POOL_NORMS)
        self.residual = check_choice(
            "efficient_additive: residual", str(residual or "none").lower(), RESIDUALS
        )
        self.out_dim = out_dim = dim if out_dim is None else out_dim
        if min(out_dim, widen) < 1 or widen > MAX_WIDEN:
            raise ValueError(
                f"efficient_additive(out_dim={out_dim}, widen={widen}): out_dim is at least 1,"
                f" widen from 1 to {MAX_WIDEN}"
            )
        width = out_dim * widen
        self.qk_norm = qk_norm
        self.scale = out_dim**-0.5
        self.w_g = nn.Parameter(torch.randn(width, 1)) if w_g else None
        self.to_query = nn.Linear(dim, width)
        self.to_key = nn.Linear(dim, width)
        self.proj = nn.Linear(width, width)
        self.final = nn.Linear(width, out_dim)
        self.weight_tap = nn.Identity()  # a (..., N, 1), for hooks
        self.apply(init_linear_and_norm)

    def pool_weights(self, q: Tensor) -> Tensor:
        """(..., N, D) -> a (..., N, 1)."""
        scores = self.scale * (q if self.w_g is None else q * self.w_g[:, 0]).sum(-1, keepdim=True)
        if self.pool_norm == "l2":
            return unit(scores, -2)
        if self.pool_norm == "none":
            return scores
        return scores.softmax(-2 if self.pool_norm == "softmax" else -1)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """(..., N, dim) -> (..., N, out_dim); `grid` is not used."""
        q, k = self.to_query(x), self.to_key(x)
        if self.qk_norm:
            q, k = unit(q, -1), unit(k, -1)
        pooled = (self.weight_tap(self.pool_weights(q)) * q).sum(-2, keepdim=True)  # (..., 1, D)
        y = self.proj(pooled * k)
        return self.final(y + q if self.residual == "q" else y)

    def flops(self, tokens: int) -> int:
        """Multiply-accumulates of the layers and of q w_g for `tokens` tokens."""
        layers = (self.to_query, self.to_key, self.proj, self.final)
        return tokens * (
            sum(layer.weight.numel() for layer in layers)
            + (0 if self.w_g is None else self.w_g.numel())
        )
