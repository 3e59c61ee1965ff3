"""Relative position weight at the diagonal alone."""

import torch
from torch import nn

from kernels.window_attention import OffsetTerms
from models.attention.geometry import Geometry

from .base import MODIFIERS, TermModifier


@MODIFIERS.register("self_weight")
class SelfWeight(TermModifier):
    """Multiplies the logit of a token with itself by a learned factor per head, before the bias.

        S_ii = (q_i k_iᵀ) * scale * (1 + w_h) + bias_ii

    It is `crpw(source=table, mode=one_plus)` whose other rows are 0.

    Args:
        init: initial w of every head; 0 leaves the function as it is.
    Shapes: terms.scale (T or 1, H) -> (T, H), or dense; w (H,), no weight decay. Class tokens' own
        pairs are left alone.
    Source: this project; a control of CRPW.
    """

    def __init__(self, geometry: Geometry, init: float = 0.0):
        super().__init__(geometry)
        self.w = nn.Parameter(torch.full((geometry.num_heads,), float(init)))
        self.register_buffer("own", geometry.own_offset(), persistent=False)

    def forward(self, terms: OffsetTerms) -> OffsetTerms:
        """scale times 1 + w in the row of a token with itself."""
        table = torch.where(self.own, self.w, 0.0).to(terms.scale.dtype)  # (T, H)
        return terms.replace(scale=terms.scale * (1 + terms.matching("scale", table, 0.0)))
