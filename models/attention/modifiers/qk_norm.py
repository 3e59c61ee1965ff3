"""Queries and keys normed head by head."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.linear import is_untouched
from models.attention.geometry import Geometry
from registry import check_choice

from .base import MODIFIERS, TokenModifier

EPS = 1e-6  # timm's


@MODIFIERS.register("qk_norm")
class QKNorm(TokenModifier):
    """Norms each head's q and k over its D channels, in float32; then comes the module's scale.

        layer:  q <- g_q (q - mean q) / sd q       rms:  q <- g_q q / (mean q²)^1/2       k alike

    It undoes the scale of the logits, whatever makes it: W_q times a number leaves the result (up
    to eps and a bias). It sees q and k as the projection modifiers, such as `qk_residual`, leave
    them. There is no neutral value: with released weights the model starts as another function.

    Args:
        kind: layer (ViT-22B; centres, so that each head loses a direction) or rms.
    Shapes: qkv (..., 3C) -> the same; q_gain and k_gain (D,), shared by the heads, start at 1; 1-D,
        so they have no weight decay. There is no bias (timm's qk_norm has one by default).
    Raises: ValueError for another kind, and, by the backbone, where q and k are normed already: in
        SwinV2, whose logits are cosines, and in timm's models with qk_norm=True.
    Source: Scaling Vision Transformers to 22 Billion Parameters, arXiv:2302.05442; eps is timm's.
    """

    def __init__(self, geometry: Geometry, kind: str = "layer"):
        super().__init__(geometry)
        check_choice("qk_norm: kind", kind, NORMS)
        self.norm = NORMS[kind]
        self.q_gain = nn.Parameter(torch.ones(geometry.head_channels))
        self.k_gain = nn.Parameter(torch.ones(geometry.head_channels))

    def initialise(self, attention: nn.Module) -> None:
        """Draws nothing; refuses attention that norms q and k itself."""
        kind = type(attention).__name__
        if attention.cosine:
            raise ValueError(
                f"qk_norm: {kind} divides q and k by their norms already; leave qk_norm out, or"
                " take MODEL.TYPE swin"
            )
        for name in ("q_norm", "k_norm"):
            if not is_untouched(getattr(attention, name, None) or nn.Identity(), nn.Identity):
                raise ValueError(
                    f"qk_norm: {kind} norms q and k already; leave qk_norm out, or build timm's"
                    " model with qk_norm=False"
                )

    def forward(self, qkv: Tensor) -> Tensor:
        """(..., 3C) -> (..., 3C), in its dtype."""
        q, k, v = qkv.chunk(3, -1)
        q, k = self._normed(q, self.q_gain), self._normed(k, self.k_gain)
        return torch.cat([q, k, v], -1)

    def _normed(self, tokens: Tensor, gain: Tensor) -> Tensor:
        heads = tokens.unflatten(-1, (self.geometry.num_heads, -1))
        return self.norm(heads, gain).flatten(-2).to(tokens.dtype)


def layer_norm(x: Tensor, gain: Tensor) -> Tensor:
    """(..., D) with mean 0 and variance 1 before the gain (D,)."""
    return F.layer_norm(x, gain.shape, gain, None, EPS)


def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    """(..., D) with mean square 1 before the gain (D,), which is cast as autocast casts weights:
    the fused operation takes one dtype.
    """
    return F.rms_norm(x, gain.shape, gain.to(x.dtype), EPS)


NORMS = {"layer": layer_norm, "rms": rms_norm}
