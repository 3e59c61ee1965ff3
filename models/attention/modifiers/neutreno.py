"""The heads' results pulled towards the values of the first block."""

import torch
from torch import Tensor

from kernels.window_attention import WindowLayout
from models.attention.geometry import Geometry

from .base import MODIFIERS, OutputModifier
from .value_residual import check_chain


@MODIFIERS.register("neutreno")
class Neutreno(OutputModifier):
    """Adds the difference between the first block's values and the block's own to what the heads
    give.

        y <- y + strength (v_1 - v_n)        n = 2, 3, ...

    v_1 and the chain of blocks are those of `value_residual`; beside it, v_n is the mixed value.

    Args:
        strength: fixed; 0.4 as compared with in the source, 0.2 there beside a value residual; 0 is
            neutral.
    Shapes: y, v (B, H, W, C) -> same; no parameter is added.
    Raises: ValueError as `value_residual`.
    Source: in the form of Value Residual Learning's released code, arXiv:2410.17897; not compared
        with NeuTRENO's own code.
    """

    reads = ("first_v",)

    def __init__(self, geometry: Geometry, strength: float = 0.4):
        super().__init__(geometry)
        check_chain("neutreno", geometry)
        self.strength = strength

    def forward(
        self, y: Tensor, v: Tensor, x: Tensor, layout: WindowLayout, first_v: Tensor
    ) -> Tensor:
        """y, v, first_v (B, H, W, C) -> (B, H, W, C); the first block's y as it is."""
        if not self.geometry.block:
            return y
        return torch.add(y, first_v - v, alpha=self.strength)
