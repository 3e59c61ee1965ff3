"""The channel MLP of a transformer block."""

import torch.nn.functional as F
from torch import Tensor, nn

from kernels.linear import Linear, fused_mlp


class Mlp(nn.Module):
    """fc2(drop(gelu(fc1(x)))), then drop; the exact GELU.

    Shapes: (..., C) -> (..., C); hidden = the width between the layers.
    """

    def __init__(self, dim: int, hidden: int, drop: float = 0.0):
        super().__init__()
        if hidden < 1:
            raise ValueError(
                f"an MLP over {dim} channels has {hidden} hidden ones; allowed: at least 1: set"
                f" its ratio (MLP_RATIO, PRE_MLP.RATIO) to {1 / dim:.3g} or more"
            )
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        if self.drop.p and self.training:
            return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))
        return fused_mlp(x, self.fc1, self.fc2)
