"""Attention without what each token receives from itself."""

import torch

from kernels.window_attention import OffsetTerms
from models.attention.geometry import Geometry

from .base import MODIFIERS, TermModifier


@MODIFIERS.register("self_exclude")
class SelfExclude(TermModifier):
    """Sets the diagonal of the softmaxed map to 0: the mass that a token gave itself is lost.

        y_i <- y_i - A_ii v_i,   rows sum to 1 - A_ii

    A token that sees no other receives 0. `self_mask` gives the mass to the other tokens instead;
    `exclusive` takes away the direction of v_i, from whichever token it comes. Together with a
    modifier that renormalises (`crpw(apply=probs, renormalise=True)`), in either order, rows sum to
    1 again, but for the rows of 0; so tokens that a shift brought together get exactly 0 (mask
    -inf, not Swin's -100). Modifiers of the map come later and may bring a diagonal back.

    Shapes: terms.post (T, H), None or dense -> the same, None becomes a table. No parameter, no
        neutral value. Class tokens' own pairs are left alone.
    Source: this project; the exact split of exclusive self-attention (arXiv:2603.09078).
    """

    forbids = True

    def __init__(self, geometry: Geometry):
        super().__init__(geometry)
        self.register_buffer("own", geometry.own_offset(), persistent=False)

    def forward(self, terms: OffsetTerms) -> OffsetTerms:
        """post, or 1 where there is none, with 0 in the row of a token with itself."""
        own = terms.matching("post", self.own.expand(-1, self.geometry.num_heads), False)
        post = torch.ones_like(own, dtype=terms.scale.dtype) if terms.post is None else terms.post
        return terms.replace(post=torch.where(own, 0.0, post))
