"""Shaped attention: the map centred at the uniform one and moved to the identity."""

from typing import Literal

import torch
from torch import nn

from models.attention.geometry import Geometry

from .affine import COEFFICIENTS, Coefficients
from .base import MODIFIERS
from .qk_residual import QKResidual


@MODIFIERS.register("shaped")
class Shaped(Coefficients):
    """A learned sum of the identity, the map of each head and the uniform map.

        A' = alpha I + beta A - gamma U
        y'_i = alpha v_i + beta y_i - gamma mean_{j visible to i} v_j

    Args:
        preset: "neutral" starts at 0, 1, 0: the unmodified function. "paper" starts at 1, 1, 1 and
            sets W_q, its bias and Swin's table of position biases to 0, so that A = U and A' = I
            exactly, unless another modifier adds to the logits, sets these weights after it or
            changes the map (as CaiT's and Refiner's do); it has no neutral value, and is refused
            over pretrained weights.
    Shapes: y, v (B, H, W, C) -> the same; alpha, beta, gamma are (H,) without weight decay. A class
        token counts as any token and is part of U.
    Raises: ValueError for "paper" on cosine attention (SwinV2), which has no gradient at q = 0,
        and beside a modifier that adds to W_q (qk_residual).
    Source: Noci et al., arXiv:2306.17759; He and Hofmann, arXiv:2311.01906, and
        github.com/bobby-he/simplified_transformers, whose block besides has no skip around
        attention, identical value and output weights and a causal U. Here the skip is kept, and
        the width-dependent temperature of the former left out.
    """

    def __init__(self, geometry: Geometry, preset: Literal["neutral", "paper"] = "neutral"):
        starts = (1.0, 1.0, 1.0) if preset == "paper" else (0.0, 1.0, 0.0)
        super().__init__(geometry, starts, COEFFICIENTS)
        self.preset = preset

    @torch.no_grad()
    def initialise(self, attention: nn.Module) -> None:
        """For "paper" makes all logits 0."""
        if self.preset != "paper":
            return
        if attention.cosine:
            raise ValueError(
                "shaped(preset=paper) starts with q = 0, where the cosine of q and k (SwinV2) has"
                " no gradient; take preset=neutral, or Swin or ViT"
            )
        if any("q" in residual.parts for residual in attention._configured(QKResidual)):
            raise ValueError(
                "shaped(preset=paper) starts with W_q = 0, and qk_residual adds the identity to it;"
                " leave one of them out, or take preset=neutral or qk_residual(which=k)"
            )
        queries = slice(self.geometry.inner)
        attention.qkv.weight[queries] = 0
        for bias in (attention.qkv.bias, getattr(attention, "q_bias", None)):
            if bias is not None:
                bias[queries] = 0
        table = getattr(attention, "relative_position_bias_table", None)
        if table is not None:
            table.zero_()
