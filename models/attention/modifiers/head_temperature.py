"""A learned temperature per head."""

import torch
from torch import nn

from kernels.window_attention import OffsetTerms
from models.attention.geometry import Geometry

from .base import MODIFIERS, TermModifier


@MODIFIERS.register("head_temperature")
class HeadTemperature(TermModifier):
    """Multiplies the logits of each head by a learned factor, before the bias is added: the control
    that sharpens all pairs alike.

        S = (q kᵀ) * scale * exp(t) + bias

    Args:
        start: initial t of every head; 0 leaves the function as it is.
    Shapes: terms.scale of any form -> the same; t (H,), no weight decay. Class tokens' pairs take
        the factor too. On SwinV2 it multiplies the learned scale, which alone is at most 100.
    Source: CRPW's `one_plus` with one weight for all offsets. The learned scale of Vision
        Transformer for Small-Size Datasets (arXiv:2112.13492) is the same function in another
        parametrisation, see self_mask.
    """

    def __init__(self, geometry: Geometry, start: float = 0.0):
        super().__init__(geometry)
        self.t = nn.Parameter(torch.full((geometry.num_heads,), float(start)))

    def forward(self, terms: OffsetTerms) -> OffsetTerms:
        """scale times exp(t), head by head."""
        return terms.scale_heads(self.t.exp().to(terms.scale.dtype))
