"""Values of the first block, mixed into those of the later ones."""

from typing import Literal

import torch
from torch import Tensor, nn

from models.attention.geometry import Geometry

from .base import MODIFIERS, TokenModifier

FIXED = {"half": (0.5, 0.5), "svformer": (1.0, 0.0)}


def check_chain(name: str, geometry: Geometry) -> None:
    """Raises ValueError where blocks hand no values down."""
    if geometry.block is None:
        raise ValueError(
            f"{name}: this attention is handed no values of a first block; take MODEL.TYPE swin,"
            " swinv2, vit, cait, pit, t2t (MODEL.T2T.MODIFIED blocks) or refined_vit"
            " (SHARE_EVERY 1, CARRY False, COS_REG 0)"
        )


@MODIFIERS.register("value_residual")
class ValueResidual(TokenModifier):
    """Mixes the values of the first block of a chain into those of each later one.

        v_n <- l1 v_1 + l2 v_n        n = 2, 3, ...

    v_1 is what the first block projects, before anything is mixed. A chain is all blocks of ViT,
    CaiT's patch blocks, T2T's blocks and Refined ViT's, and the blocks of one stage of Swin, SwinV2
    and PiT: values lie in the order of the grid, so that shifted windows meet the same tokens.

    Args:
        preset: "learned": l is a parameter; "half": l is (0.5, 0.5), fixed; "svformer": v_n is v_1,
            fixed, and the later blocks' own value weights have no effect and no gradient.
        init: learned l starts at (init, 1 - init); 0 is neutral.
    Shapes: qkv (..., 3C), first_v (..., C) -> (..., 3C); l is (2,) in every block but the first,
        1-D, so it has no weight decay.
    Raises: ValueError where blocks hand no values down (T2T's token transformers, Refined ViT with
        maps handed on, timm's models), and for an `init` of a fixed preset.
    Source: Value Residual Learning, arXiv:2410.17897: the fixed 0.5/0.5 and SVFormer are its
        released forms, there without a chain by stage. `neutreno` is its other rival.
    """

    reads = ("first_v",)

    def __init__(
        self,
        geometry: Geometry,
        preset: Literal["learned", "half", "svformer"] = "learned",
        init: float = 0.0,
    ):
        super().__init__(geometry)
        check_chain("value_residual", geometry)
        if preset != "learned" and init:
            raise ValueError(
                f"value_residual: init {init:g} is where a learned mixture starts, and"
                f" {preset} is fixed; leave init out, or preset"
            )
        self.fixed = FIXED.get(preset)
        if geometry.block and self.fixed is None:
            self.l = nn.Parameter(torch.tensor([init, 1 - init]))

    def forward(self, qkv: Tensor, first_v: Tensor | None = None) -> Tensor:
        """qkv (..., 3C), first_v (..., C) -> (..., 3C); the first block's as they are."""
        if not self.geometry.block:
            return qkv
        inner = self.geometry.inner
        qk, v = qkv.split(
            [2 * inner, inner], -1
        )  # its backward is one pass, that of two slices four
        return torch.cat([qk, self.mixed(v, first_v)], -1)

    def mixed(self, v: Tensor, first_v: Tensor) -> Tensor:
        """l1 first_v + l2 v, in v's dtype, rounded once."""
        if self.fixed == (1.0, 0.0):
            return first_v.to(v.dtype)
        if self.fixed is not None:
            return (first_v + v) * self.fixed[0]
        first, own = self.l[:1], self.l[1:]  # not 0-dim: 16-bit values are mixed in float32
        return torch.addcmul(own * v, first, first_v).to(v.dtype)
