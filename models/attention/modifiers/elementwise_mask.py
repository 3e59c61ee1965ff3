"""Element-wise learnable mask: a free number for each pair of tokens multiplies the logits."""

import torch
import torch.nn.functional as F
from torch import nn

from kernels.window_attention import OffsetTerms
from models.attention.geometry import Geometry

from .base import MODIFIERS, TermModifier


@MODIFIERS.register("elementwise_mask")
class ElementwiseMask(TermModifier):
    """The control of the Gaussian mixture mask: N^2 free numbers instead of a profile of the
    distance, shared by the heads.

        S = (q kᵀ) * scale * mask + bias

    Args:
        init: "zeros" as in the original (attention starts from the bias alone, so from uniform
            where there is none), or "ones" (the unmodified function).
    Shapes: mask (N, N) over the tokens of a window, a matrix that weight decay reaches;
        terms.scale (T or 1, heads) or dense -> dense (heads, N, N); class tokens keep factor 1.
    Raises: ValueError for another `init`.
    Source: the "ELM" of RetNet Viewed through Convolution, arXiv:2309.05375.
    """

    def __init__(self, geometry: Geometry, init: str = "zeros"):
        super().__init__(geometry)
        if init not in ("zeros", "ones"):
            raise ValueError(f"elementwise_mask(init={init}): allowed are zeros, ones")
        area = geometry.window[0] * geometry.window[1]
        self.mask = nn.Parameter(torch.full((area, area), float(init == "ones")))

    def forward(self, terms: OffsetTerms) -> OffsetTerms:
        """scale of any form -> dense (heads, N, N)."""
        mask = F.pad(self.mask, (self.geometry.prefix, 0, self.geometry.prefix, 0), value=1.0)
        return terms.replace(scale=terms.dense("scale") * mask.to(terms.scale.dtype))
