"""A learned preference of every token for itself, added to the logits."""

import torch
from torch import nn

from kernels.window_attention import OffsetTerms
from models.attention.geometry import Geometry

from .base import MODIFIERS, TermModifier


@MODIFIERS.register("self_bias")
class SelfBias(TermModifier):
    """Adds a number per head to the logit of a token with itself.

        S_ii <- S_ii + b_h

    b -> inf gives y = v, b -> -inf masks the diagonal. On Swin the bias table has such a row
    already: there it is another parametrisation of it, without weight decay.

    Args:
        init: initial b of every head; 0 leaves the function as it is.
    Shapes: terms.bias (T, H), None or dense -> the same, None becomes a table; b (H,), no weight
        decay. Class tokens' own pairs are left alone.
    Source: this project; a control of the QK residual.
    """

    def __init__(self, geometry: Geometry, init: float = 0.0):
        super().__init__(geometry)
        self.b = nn.Parameter(torch.full((geometry.num_heads,), float(init)))
        self.register_buffer("own", geometry.own_offset(), persistent=False)

    def forward(self, terms: OffsetTerms) -> OffsetTerms:
        """bias + b in the row of a token with itself."""
        table = torch.where(self.own, self.b, 0.0).to(terms.scale.dtype)  # (T, H)
        added = terms.matching("bias", table, 0.0)
        return terms.replace(bias=added if terms.bias is None else terms.bias + added)
