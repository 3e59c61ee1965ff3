"""The block that ViT and its relatives share: attention and an MLP, each behind a norm and added to
the tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.layers.drop_path import stochastic_depth
from models.layers.mlp import Mlp

from .attention_block import BranchEditor


class LayerScale(nn.Module):
    """x * gamma, one factor a channel.

    Shapes: (..., C) -> (..., C); gamma (C,).
    """

    def __init__(self, dim: int, start: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(start)))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return x * self.gamma


class TokenBlock(BranchEditor):
    """x + drop_path(ls1(attn(norm1(x)))), then x + drop_path(ls2(mlp(norm2(x)))).

    Args:
        attn: (B, N, C) -> (B, N, C), with `flops(tokens)`.
        hidden: width of the MLP.
        drop: dropout in the MLP.
        drop_path: stochastic depth of both branches.
        layer_scale: initial gamma of ls1 and ls2; None leaves them out.
    Shapes: (B, N, C) -> (B, N, C). State-dict keys are timm's ViT block's. Branch modifiers edit
        what ls1 gives. The first block of a chain may hand the values of its attention down: it
        returns them too, and the others take them as `first_v`.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        hidden: int,
        drop: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
    ):
        super().__init__()
        self.dim = dim
        self.hidden = hidden
        self.norm1 = norm_layer(dim)
        self.attn = attn
        self.note_edits()
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, hidden, drop)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path = stochastic_depth(drop_path)

    def forward(self, x: Tensor, first_v: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """(B, N, C) -> (B, N, C)."""
        y, handed = self.attended(self.norm1(x), first_v=first_v)
        x = x + self.drop_path(self.edited(self.ls1(y), x))
        x = x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))
        return x if handed is None else (x, handed)

    def flops(self, tokens: int) -> int:
        """Multiply-accumulates of the linear layers and the attention products for one image; norms
        count once per number.
        """
        return self.attn.flops(tokens) + 2 * tokens * self.dim * self.hidden + 2 * tokens * self.dim
