"""Attention without its mean: the negative control of the near-identity family."""

from models.attention.geometry import Geometry

from .affine import Coefficients
from .base import MODIFIERS


@MODIFIERS.register("high_pass")
class HighPass(Coefficients):
    """Takes the mean of the visible values from what attention gives; rows sum to 0.

        A' = A - U                      y'_i = y_i - mean_{j visible to i} v_j

    Fixed and without a parameter; it has no neutral value. Equal values, and a token that sees
    itself alone, give 0.

    Shapes: y, v (B, H, W, C) -> the same. A class token counts as any token and is part of the
        mean.
    Source: a control of this project, the high-pass part of AttnScale (arXiv:2203.05962) alone.
    """

    def __init__(self, geometry: Geometry):
        super().__init__(geometry, (0.0, 1.0, 1.0), ())
