"""Attention that starts as the identity map and learns how much of attention to add."""

from typing import Literal

from models.attention.geometry import Geometry

from .affine import Coefficients
from .base import MODIFIERS


@MODIFIERS.register("value_skipinit")
class ValueSkipInit(Coefficients):
    """A learned sum of the map of each head and the identity.

        A' = alpha I + beta A           y'_i = alpha v_i + beta y_i

    Args:
        preset: "neutral" starts at 0, 1: the unmodified function. "paper" starts at 1, 0: y' = v,
            and q and k learn from the second step on; it has no neutral value.
    Shapes: y, v (B, H, W, C) -> the same; alpha and beta are (H,) without weight decay. A class
        token counts as any token.
    Source: He et al., ICLR 2023, arXiv:2302.10322, where it stands in networks without skip
        connections; here they are kept. Starts and one pair per head: not verified in its text.
    """

    def __init__(self, geometry: Geometry, preset: Literal["neutral", "paper"] = "neutral"):
        starts = (1.0, 0.0, 0.0) if preset == "paper" else (0.0, 1.0, 0.0)
        super().__init__(geometry, starts, ("alpha", "beta"))
