"""A learned share of each token's own value, the plainest way to the identity."""

import math
from typing import Literal

from torch import Tensor, nn

from models.attention.geometry import Geometry

from .affine import AffineEdit
from .base import MODIFIERS


@MODIFIERS.register("self_mix")
class SelfMix(AffineEdit):
    """Mixes the map of each head with the identity; rows still sum to 1.

        A' = (1 - g) A + g I            y'_i = (1 - g) y_i + g v_i

    Args:
        init: the start of g; 0 is neutral.
        squash: "none", g itself is the parameter and may leave [0, 1]; "sigmoid", g = sigmoid(p),
            with p = log(init / (1 - init)) at the start: 0 < init < 1, and no start is neutral.
    Shapes: y, v (B, H, W, C) -> the same; g, or p, is (H,) without weight decay. A class token
        counts as any token.
    Raises: ValueError for squash=sigmoid with an init that is not in (0, 1).
    Source: a control of this project, not a published method.
    """

    def __init__(
        self, geometry: Geometry, init: float = 0.0, squash: Literal["none", "sigmoid"] = "none"
    ):
        super().__init__(geometry)
        self.squash = squash
        if squash == "none":
            self.g = nn.Parameter(self.per_head(init))
            return
        if not 0 < init < 1:
            raise ValueError(
                f"self_mix(init={init:g}, squash=sigmoid): init is the share g, and a sigmoid stays"
                " between 0 and 1; give one between, such as init=0.01, or squash=none"
            )
        self.p = nn.Parameter(self.per_head(math.log(init / (1 - init))))

    def own_and_map(self) -> tuple[Tensor, Tensor]:
        """g and 1 - g."""
        g = self.g if self.squash == "none" else self.p.sigmoid()
        return g, 1 - g
