"""AttnScale: the part of attention that differs from the mean is amplified."""

from torch import Tensor, nn

from models.attention.geometry import Geometry

from .affine import AffineEdit
from .base import MODIFIERS


@MODIFIERS.register("attn_scale")
class AttnScale(AffineEdit):
    """Splits the map of each head into its low-pass part U and the rest, and scales the rest.

        A' = U + (1 + l) (A - U)        y'_i = (1 + l) y_i - l mean_{j visible to i} v_j

    Args:
        init: the start of l; 0 is neutral.
    Shapes: y, v (B, H, W, C) -> the same; l is `excess` (H,) without weight decay. A class token
        counts as any token and is part of the mean.
    Source: Wang et al., ICLR 2022, arXiv:2203.05962. The released Swin subtracts 1 / N over all N
        tokens of a window behind the mask, so that regions leak into each other; here U is uniform
        over the visible ones.
    """

    def __init__(self, geometry: Geometry, init: float = 0.0):
        super().__init__(geometry)
        self.excess = nn.Parameter(self.per_head(init))

    def own_and_map(self) -> tuple[Tensor, Tensor]:
        """0 and 1 + l."""
        return self.excess.new_zeros(self.excess.shape), 1 + self.excess

    def mean(self) -> Tensor:
        """l."""
        return self.excess
