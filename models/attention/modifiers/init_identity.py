"""The control of the QK residual: the same start, but decay towards zero."""

import torch
from torch import nn

from .base import MODIFIERS, ProjectionModifier


@MODIFIERS.register("init_identity")
class InitIdentity(ProjectionModifier):
    """Initialises W_q and W_k to the identity and changes nothing else.

    A model with `qk_residual` and W = 0 starts at the same function; there weight decay pulls
    towards it, here away from it.

    Shapes: attention.qkv.weight (3C, C), rows [0, 2C) are set. No parameter is added.
    """

    @torch.no_grad()
    def initialise(self, attention: nn.Module) -> None:
        """Sets the q and k rows of the fused projection to I."""
        weight = attention.qkv.weight
        weight[: 2 * self.geometry.dim] = torch.eye(
            self.geometry.dim, dtype=weight.dtype, device=weight.device
        ).repeat(2, 1)
