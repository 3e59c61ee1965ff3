"""Locality self-attention: no token attends to itself, and each head learns its scale."""

import torch
from torch import Tensor, nn

from kernels.window_attention import OffsetTerms
from models.attention.geometry import Geometry

from .base import MODIFIERS, TermModifier

# The logit of a token with itself: below those of all others, and finite, so that a token that sees
# no other keeps itself. -inf would give it 0 / 0.
MASKED = -1e4


@MODIFIERS.register("self_mask")
class SelfMask(TermModifier):
    """Masks the diagonal of the logits, so that the rest of each row sums to 1.

        A_ii = 0,   S_ij = (q_i k_jᵀ) * scale * exp(t_h) + bias_ij   for j != i

    so y = (y - A_ii v_i) / (1 - A_ii) of the same logits. A token that sees no other keeps itself:
    A_ii = 1, y_i = v_i. For its sake tokens that a shift brought together get exactly 0 (mask -inf,
    not Swin's -100). Where heads' logits are mixed (talking heads, CaiT) the mask comes after the
    mixing, the temperature before. Modifiers of the map come later and may bring a diagonal back.
    The mask is a logit of -1e4: it holds while all others lie well above that, so at temperatures
    below some hundreds.
    `self_bias` and `self_weight` beside it change what is masked, so nothing.

    Args:
        temperature: learn t, which starts at 0, the scale of the module; on SwinV2 it multiplies
            the learned scale. False masks alone.
    Shapes: terms.bias (T, H), None or dense -> the same, None becomes a table; t (H,), no weight
        decay. Class tokens' own pairs are not masked; their logits take the temperature.
    Neutral value: none for the mask; 0 for t, whose arm by itself is `head_temperature`.
    Source: the LSA of Vision Transformer for Small-Size Datasets, arXiv:2112.13492. Its released
        code (github.com/aanna0701/SPT_LSA_ViT) learns each head's scale itself, from D^-0.5 and
        with weight decay, and masks the class token too; vit-pytorch has one log temperature for
        all heads.
    """

    forbids = True

    def __init__(self, geometry: Geometry, temperature: bool = True):
        super().__init__(geometry)
        self.t = nn.Parameter(torch.zeros(geometry.num_heads)) if temperature else None
        self.register_buffer("own", geometry.own_offset(), persistent=False)

    def forward(self, terms: OffsetTerms) -> OffsetTerms:
        """scale times exp(t), head by head; bias with MASKED in the row of a token with itself."""
        own = terms.matching("bias", self.own.expand(-1, self.geometry.num_heads), False)
        bias = torch.zeros_like(own, dtype=terms.scale.dtype) if terms.bias is None else terms.bias
        terms = terms.replace(bias=torch.where(own, MASKED, bias))
        return terms if self.t is None else terms.scale_heads(self.t.exp().to(terms.scale.dtype))

    def after_mixing(self, logits: Tensor, terms: OffsetTerms) -> Tensor:
        """The mask once more: mixing has scaled it, and may have turned its sign."""
        return torch.where(terms.over_pairs(self.own, False), MASKED, logits)
