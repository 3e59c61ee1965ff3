"""MobileViT-V2's separable attention, by one pooled key per image."""

import torch.nn.functional as F
from torch import Tensor, nn

from kernels.linear import is_plain
from models.layers.init import init_linear_and_norm

from .base import MIXERS


@MIXERS.register("separable")
class SeparableAttention(nn.Module):
    """MobileViT-V2's attention: softmaxed scores pool the keys into one vector, which gates the
    values.

        s, k, v = split(x W + b)                         1, d and d channels
        y = W_o (relu(v) * sum_n softmax_n(s) k_n)

    Args:
        dim: channels d.
        num_heads: has no effect, the layer has no heads.
        drop: dropout of the softmaxed scores.
    Shapes: (..., N, d) -> (..., N, d); 3d² + 4d + 1 parameters. MobileViT-V2 runs it on (B, pixels
        of a patch, patches, d).
    Source: MobileViT-V2, arXiv:2206.02680, section 3.1.
    """

    has_heads, needs_places = False, False

    def __init__(self, dim: int, num_heads: int = 1, *, drop: float = 0.0):
        super().__init__()
        self.dim = dim
        self.qkv_proj = nn.Linear(dim, 1 + 2 * dim)
        self.out_proj = nn.Linear(dim, dim)
        self.drop = nn.Dropout(drop)
        self.weight_tap = nn.Identity()  # softmaxed scores (..., N, 1), for hooks
        self.apply(init_linear_and_norm)

    def _project(self, x: Tensor, first: int, last: int) -> Tensor:
        """Some channels of qkv_proj(x); of a layer that is not plain all are computed."""
        if not is_plain(self.qkv_proj):
            return self.qkv_proj(x)[..., first:last]
        return F.linear(x, self.qkv_proj.weight[first:last], self.qkv_proj.bias[first:last])

    def forward(
        self, x: Tensor, grid: tuple[int, int] | None = None, context: Tensor | None = None
    ) -> Tensor:
        """(..., N, d) -> (..., N, d). Scores and keys come from `context` (..., M, d), by default
        x; `grid` is not used.
        """
        context = x if context is None else context
        scores, keys = self._project(context, 0, 1 + self.dim).split([1, self.dim], -1)
        weights = self.drop(self.weight_tap(scores.softmax(-2)))
        pooled = (weights * keys).sum(-2, keepdim=True)  # (..., 1, d)
        return self.out_proj(self._project(x, 1 + self.dim, 1 + 2 * self.dim).relu() * pooled)

    def flops(self, tokens: int) -> int:
        """Multiply-accumulates of the layers for `tokens` tokens."""
        return tokens * (self.qkv_proj.weight.numel() + self.out_proj.weight.numel())
