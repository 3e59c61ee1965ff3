"""A gain on the branch of attention alone: ReZero, SkipInit, LayerScale."""

from typing import Literal

import torch
from torch import Tensor, nn

from models.attention.geometry import Geometry

from .base import MODIFIERS, BranchModifier


@MODIFIERS.register("branch_gain")
class BranchGain(BranchModifier):
    """Multiplies what a block's attention adds to the residual stream by a learned gain.

        s <- s + g * o

    The MLP's branch is left alone. Beside a layer scale of the family (MODEL.VIT.LAYER_SCALE,
    CaiT) it stands behind that. At g = 0 the first gradient of the output projection is 0, and that
    of everything in front of it: g moves first.

    Args:
        init: where g starts. 1 is neutral; 0 with kind=scalar is ReZero and SkipInit; 1e-5 to 0.1
            with kind=channel is LayerScale on attention alone.
        kind: one gain for the branch ("scalar"), or one a channel ("channel").
    Shapes: o (B, N, C) -> same; g is (1,) or (C,), 1-D, so it has no weight decay.
    Raises: by the model, ValueError where the block does not add the branch itself (T2T's token
        transformers, blocks of Refined ViT that share maps, timm's post-norm and parallel blocks).
        In timm's pre-norm blocks it acts at the end of the attention module; a layer scale behind
        it commutes with it.
    Source: ReZero, arXiv:2003.04887; SkipInit, arXiv:2002.10444; LayerScale, arXiv:2103.17239. All
        three put a gain on every branch of a block, not on attention alone (recalled, not
        verified).
    """

    reads_stream = False

    def __init__(
        self, geometry: Geometry, init: float = 1.0, kind: Literal["scalar", "channel"] = "scalar"
    ):
        super().__init__(geometry)
        count = 1 if kind == "scalar" else geometry.dim
        self.g = nn.Parameter(torch.full((count,), float(init)))

    def forward(self, o: Tensor, stream: Tensor | None) -> Tensor:
        """o (..., C) times g, in the wider dtype of o and `stream`."""
        like = o if stream is None else stream
        return (o * self.g).to(torch.promote_types(o.dtype, like.dtype))
