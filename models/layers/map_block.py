"""Blocks that hand the attention map on, and what runs them."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.attention.shared_map import SharedMapAttention
from models.base.token_block import LayerScale, TokenBlock

Step = tuple[Tensor, Tensor | None]


class MapBlock(TokenBlock):
    """x + 2 drop_path(attn(norm1(x), A)), then x + 2 drop_path(gamma mlp(norm2(x))); the map of the
    attention is returned too.

    Args:
        attn: (x, previous map) -> (y, map) where `hands_on`, else x -> y. gain: initial gamma, per
            channel. eps: of the norms.
    Shapes: x (B, N, C), previous (B, H, N, N) or None -> x, and the map (B, H, N, N) or None. State
        dict: as TokenBlock; gamma is ls2.gamma.
    Source: github.com/zhoudaquan/Refiner_ViT writes the branches as 2 f(norm(x / 2)). As norm(x /
        2) with eps is norm(x) with 4 eps, this is the same function.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        hidden: int,
        drop: float,
        drop_path: float,
        gain: float,
        eps: float,
        hands_on: bool,
    ):
        super().__init__(
            dim, attn, hidden, drop, drop_path, None, lambda width: nn.LayerNorm(width, 4 * eps)
        )
        self.ls2 = LayerScale(dim, gain)
        self.hands_on = hands_on

    @property
    def shared(self) -> bool:
        """Whether it works with the map it is handed, and hands on the same."""
        return isinstance(self.attn, SharedMapAttention)

    def forward(self, x: Tensor, previous: Tensor | None = None) -> Step:
        """x (B, N, C), previous (B, H, N, N) or None -> x and the map."""
        y, attn = (
            self.attn(self.norm1(x), previous)
            if self.hands_on
            else (self.attn(self.norm1(x)), None)
        )
        x = x + 2 * self.drop_path(y)
        return x + 2 * self.drop_path(self.ls2(self.mlp(self.norm2(x)))), attn


def run_map_blocks(
    blocks: Iterable[MapBlock], x: Tensor, again: bool, pairs: int = 0
) -> tuple[Tensor, list[Tensor]]:
    """Tokens through the blocks, each handed the map of the one before.

    again: activations are computed again in the backward. pairs: neighbouring blocks, from the
        first on, whose maps are compared.
    Returns: tokens (B, N, C), and the `map_similarity` of each pair.
    """
    attn, similarities = None, []
    for index, block in enumerate(blocks):
        previous = attn
        x, made = (
            checkpoint(block, x, attn, use_reentrant=False)
            if again and torch.is_grad_enabled()
            else block(x, attn)
        )
        attn = attn if block.shared else made
        if 0 < index <= pairs:
            similarities.append(map_similarity(previous, attn))
    return x, similarities


def map_similarity(first: Tensor, second: Tensor) -> Tensor:
    """Mean over images and pairs of tokens of the cosine, over the heads, of two maps (B, H, N, N);
    1 if they are one object.
    """
    return (
        first.new_ones(()) if first is second else F.cosine_similarity(first, second, dim=1).mean()
    )
