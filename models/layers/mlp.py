"""The channel MLP of a transformer block."""

import torch.nn.functional as F
from torch import Tensor, nn

from kernels.linear import fused_mlp, is_untouched, run_linear


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
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        if not _does_nothing(self.drop):
            hidden = self.drop(F.gelu(run_linear(self.fc1, x)))
            return self.drop(run_linear(self.fc2, hidden))
        return fused_mlp(x, self.fc1, self.fc2)


def _does_nothing(drop: nn.Module) -> bool:
    """Whether calling this dropout, or what stands in its place, can be left out."""
    return is_untouched(drop, nn.Dropout) and not (drop.p and drop.training)
