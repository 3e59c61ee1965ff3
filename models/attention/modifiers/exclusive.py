"""Exclusive self-attention: what a token receives along its own value is removed."""

from typing import Literal

import torch
from torch import Tensor, nn

from kernels.window_attention import Epilogue, WindowLayout, apply_epilogue
from models.attention.geometry import Geometry

from .base import MODIFIERS, OutputModifier


@MODIFIERS.register("exclusive")
class Exclusive(OutputModifier):
    """Takes from each head's result the share a of its projection on the token's own value.

        z_i = y_i - a (y_i . v_i) / max(|v_i|^2, 1e-8) v_i

    It removes a direction, not a position (that is self_exclude): with a = 1, z_i . v_i = 0, and
    equal values, an identical map and a token that sees itself alone give 0.

    Args:
        a: a fixed number, 1 in the paper, neutral only at 0; or "learned", a = tanh(p) per head,
            which pretrained weights need: with a = 1 they start as another function.
        init: the start of p, for a=learned alone; 0 is neutral.
    Shapes: y, v (B, H, W, C) -> the same; p is (H,) without weight decay. v has its bias. A class
        token counts as any token.
    Raises: ValueError for an init beside a fixed a.
    Source: XSA, arXiv:2603.09078, per head (its full text: not verified); the learned gate, its
        start and the 1e-8 are modded-nanogpt's.
    """

    def __init__(self, geometry: Geometry, a: float | Literal["learned"] = 1.0, init: float = 0.0):
        super().__init__(geometry)
        if a != "learned" and init != 0:
            raise ValueError(
                f"exclusive(a={a:g}, init={init:g}): init is the start of a learned a; write"
                " a=learned, or leave init out"
            )
        learned = a == "learned"
        start = torch.full((geometry.num_heads,), float(init if learned else a))
        self.p = nn.Parameter(start) if learned else None
        self.register_buffer("a", None if learned else start, persistent=False)

    def epilogue(self) -> Epilogue:
        """The same."""
        return Epilogue(exclusion=self.a if self.p is None else self.p.tanh())

    def forward(self, y: Tensor, v: Tensor, x: Tensor, layout: WindowLayout) -> Tensor:
        """y, v (B, H, W, inner) -> the same; x and layout are not used."""
        return apply_epilogue(y, v, self.epilogue(), self.geometry.num_heads)
