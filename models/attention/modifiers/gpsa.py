"""A second map, of positions alone, which a gate per head mixes with the map of the tokens."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from kernels.window_attention import OffsetTerms, WindowLayout
from models.attention.geometry import Geometry
from models.layers.init import trunc_normal

from .base import MODIFIERS, OutputModifier


@MODIFIERS.register("gpsa")
class GatedPositionalAttention(OutputModifier):
    """Mixes in a softmax over positions, which starts as a look at one neighbour.

        A = (1 - g) softmax(S) + g softmax(p)        g = sigmoid(l), per head
        p(d) = w_0 dx + w_1 dy + w_2 |d|²            d = (dx, dy), key minus query, tokens

    Each softmax goes over the keys that the query may see, by itself. The start
    w = c (2 mx, 2 my, -1) makes the largest p that of the key at the offset m = (mx, my): the
    first s² heads, s = floor(sqrt(heads)), have their m on a grid of s x s about 0 (half-integers
    where s is even: four keys share the largest p); the other heads start at c times N(0, 0.02²).
    Modifiers of logits and map work on the first map alone. The second costs as much as the first:
    one more call of the kernel.

    Args:
        locality: c, above 0.
        init: l at the start; 1 gives the positions 73 %.
        value: "identity" starts W_v at I, as the release does; "keep" leaves the family's start.
            Over pretrained weights, by MODEL.INIT_OVER_PRETRAINED, w starts anew with W_v.
    Shapes: y (B, H, W, inner) -> same; l (heads,), no weight decay; w (heads, 3), with decay.
    Neutral: l -> -inf; no start is.
    Raises: ValueError for class tokens, for `identity` where v is not as wide as x, and for numbers
        that cannot be.
    Source: ConViT, arXiv:2103.10697, and github.com/facebookresearch/convit, where the first 10 of
        12 blocks are of this kind (here all), and the class token enters behind them. Its p has a
        bias, which a softmax does not see, and its dropout drops entries of A, here of each map.
    """

    reads = ("attend",)

    def __init__(
        self,
        geometry: Geometry,
        locality: float = 1.0,
        init: float = 1.0,
        value: Literal["keep", "identity"] = "keep",
    ):
        super().__init__(geometry)
        if geometry.prefix:
            raise ValueError(
                f"gpsa: {geometry.prefix} class tokens or registers have no offset from the"
                " patches; leave them out, on ViT by MODEL.VIT.CLASS_TOKEN False, POOL mean and"
                " REGISTERS 0"
            )
        if not 0 < locality < math.inf or not -math.inf <= init < math.inf:
            raise ValueError(
                f"gpsa(locality={locality}, init={init}): locality is a number above 0, init a"
                " number"
            )
        if value == "identity" and geometry.inner != geometry.dim:
            raise ValueError(
                f"gpsa(value=identity): v has {geometry.inner} channels, x has {geometry.dim}; take"
                " value=keep"
            )
        self.locality = locality
        self.value = value
        self.l = nn.Parameter(torch.full((geometry.num_heads,), float(init)))
        self.w = nn.Parameter(torch.zeros(geometry.num_heads, 3))
        self.register_buffer("offsets", key_offsets(geometry), persistent=False)  # (T, 3)

    @torch.no_grad()
    def initialise(self, attention: nn.Module) -> None:
        """Draws w, and sets the rows of v in the fused projection to I where that is asked for."""
        trunc_normal(self.w, 0.02)
        centred = centres(self.geometry.num_heads)
        self.w[: len(centred)] = centred.to(self.w)
        self.w *= self.locality
        if self.value == "identity":
            nn.init.eye_(attention.qkv.weight[2 * self.geometry.inner :])

    def forward(
        self,
        y: Tensor,
        v: Tensor,
        x: Tensor,
        layout: WindowLayout,
        attend: Callable[[OffsetTerms, WindowLayout], Tensor],
    ) -> Tensor:
        """y (B, H, W, inner) -> the same, mixed in float32 or wider."""
        z = attend(self.positions(), layout.forbidding())  # p has no bound that -100 could beat
        wide = torch.promote_types(y.dtype, torch.float32)
        heads = (self.geometry.num_heads, -1)
        g = torch.sigmoid(self.l.to(wide))[:, None]
        y, z = y.unflatten(-1, heads), z.unflatten(-1, heads)
        return torch.lerp(y.to(wide), z.to(wide), g).flatten(-2).to(v.dtype)

    def positions(self) -> OffsetTerms:
        """p as the bias of logits that nothing else adds to: scale (1, heads), bias (T, heads)."""
        w = self.w.to(torch.promote_types(self.w.dtype, torch.float32))
        p = (self.offsets.to(w.dtype)[:, None] * w).sum(-1)  # (T, heads); no product to autocast
        return OffsetTerms(self.geometry.window, p.new_zeros(1, len(w)), p)

    def flops(self, tokens: int) -> int:
        """Both products of the second call."""
        return 2 * tokens * tokens * self.geometry.inner


def key_offsets(geometry: Geometry) -> Tensor:
    """(T, 3): dx, dy and |d|² of the key from the query, behind each row of an offset table, whose
    rows count query minus key.
    """
    down, across = (torch.arange(side - 1.0, -side, -1.0) for side in geometry.window)
    dy, dx = torch.meshgrid(down, across, indexing="ij")
    return torch.stack([dx, dy, dx**2 + dy**2], -1).flatten(0, 1)


def centres(num_heads: int) -> Tensor:
    """(s², 3): (2 mx, 2 my, -1) of the heads that start at an offset, my fastest."""
    side = math.isqrt(num_heads)
    along = 2 * torch.arange(side) - (side - 1.0)  # 2 m
    mx, my = torch.meshgrid(along, along, indexing="ij")
    return torch.stack([mx, my, -torch.ones_like(mx)], -1).flatten(0, 1)
