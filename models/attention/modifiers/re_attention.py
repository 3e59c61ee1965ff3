"""Re-attention: the softmaxed maps of all heads are mixed and normalised."""

import torch
from torch import Tensor, nn

from models.attention.geometry import Geometry

from .base import MODIFIERS, MapModifier
from .talking_heads import mix_heads


@MODIFIERS.register("re_attention")
class ReAttention(MapModifier):
    """Regenerates the map of each head from those of all heads, against maps that grow alike with
    depth.

        A_g <- BatchNorm_g(sum_h W_gh A_h (+ b_g)) (* head_dim^-0.5)

    The normalised maps have mean 0, so rows sum to nothing in particular. The statistics of a head
    are over all pairs, those masked in shifted windows included (their entries enter as 0 or b_g
    and are set to 0 afterwards).

    Args:
        init: "identity" for W, or "uniform": U(-H^-0.5, H^-0.5), what a 1 x 1 convolution starts
            with in the original.
        bias: add b, which the released weights hold. In training BatchNorm takes it away again: its
            gradient is 0.
        scale: multiply by head_dim^-0.5, the original's `transform_scale`.
    Shapes: map (B*nW, H, N, N) -> the same; weight (H, H) [to, from], bias (H,), norm
        BatchNorm2d(H).
    Raises: ValueError for another `init`.
    Source: DeepViT, arXiv:2103.11886, eq. 3, and github.com/zhoudaquan/dvit_repo.
    """

    def __init__(
        self, geometry: Geometry, init: str = "identity", bias: bool = False, scale: bool = False
    ):
        super().__init__(geometry)
        if init not in ("identity", "uniform"):
            raise ValueError(f"re_attention(init={init}): allowed are identity, uniform")
        heads = geometry.num_heads
        self.init = init
        self.factor = geometry.head_channels**-0.5 if scale else 1.0
        self.weight = nn.Parameter(torch.eye(heads))
        self.bias = nn.Parameter(torch.zeros(heads)) if bias else None
        self.norm = nn.BatchNorm2d(heads)

    def initialise(self, attention: nn.Module) -> None:
        """The identity stays, or W and b are drawn."""
        if self.init == "uniform":
            for parameter in filter(lambda p: p is not None, (self.weight, self.bias)):
                nn.init.uniform_(parameter, -(len(self.weight) ** -0.5), len(self.weight) ** -0.5)

    def forward(self, attn: Tensor) -> Tensor:
        """(B*nW, H, N, N) -> (B*nW, H, N, N)."""
        return self.norm(mix_heads(attn, self.weight, self.bias)) * self.factor
