"""Pre-MLP: a channel MLP before the first attention of the model, or of each stage."""

from torch import Tensor, nn

from .drop_path import stochastic_depth
from .mlp import Mlp

PLACES = ("off", "stem", "stage")


class PreMlp(nn.Module):
    """x + fc2(gelu(fc1(norm(x)))).

    Shapes: (B, L, C) -> (B, L, C); 2 C² ratio + (3 + ratio) C parameters.
    Source: github.com/AllenHaoHuang/improving-redundancy-in-attention (once after the patch
    embedding in Swin, at the start of every stage in SwinV2).
    """

    def __init__(self, dim: int, ratio: float, drop: float = 0.0, drop_path: float = 0.0):
        super().__init__()
        self.dim = dim
        self.hidden = int(dim * ratio)
        self.norm = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, self.hidden, drop)
        self.drop_path = stochastic_depth(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        return x + self.drop_path(self.mlp(self.norm(x)))

    def flops(self, tokens: int) -> int:
        """Multiply-accumulates of the two layers for `tokens` tokens."""
        return 2 * tokens * self.dim * self.hidden
