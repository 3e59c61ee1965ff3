"""The blocks of CaiT: tokens with a factor per channel on each branch, and a class token that asks
them.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.base.token_block import TokenBlock
from registry import check_choice

CONTEXTS = ("all", "patches")


class ScaledBlock(TokenBlock):
    """x + drop_path(gamma_1 attn(norm1(x))), then x + drop_path(gamma_2 mlp(norm2(x))).

    layer_scale: initial value of gamma_1 and gamma_2 (C,). Else as TokenBlock; state-dict keys are
        those of timm's CaiT.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        hidden: int,
        drop: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float = 1e-5,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
    ):
        super().__init__(dim, attn, hidden, drop, drop_path, None, norm_layer)
        self.gamma_1, self.gamma_2 = (
            nn.Parameter(torch.full((dim,), float(layer_scale))) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        x = x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x)))
        return self.feed(x)

    def feed(self, x: Tensor) -> Tensor:
        """The branch of the MLP: (B, N, C) -> (B, N, C)."""
        return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))


class ClassBlock(ScaledBlock):
    """The same for the class token alone, which attends to the patches.

    context: "all": token and patches are normed together, and the token attends to itself as well
        (CaiT's). "patches": the token alone is normed; it attends to the patches as they are (the
        small-image form of the Gaussian mixture mask's code).
    Shapes: token (B, 1, C), patches (B, N, C) -> token (B, 1, C).
    """

    def __init__(self, *args, context: str = "all", **options):
        super().__init__(*args, **options)
        self.context = check_choice("cait: class_context", context, CONTEXTS)

    def forward(self, token: Tensor, patches: Tensor) -> Tensor:
        """token (B, 1, C), patches (B, N, C) -> (B, 1, C)."""
        if self.context == "all":
            patches = self.norm1(torch.cat([token, patches], dim=1))
            query = patches[:, :1]
        else:
            query = self.norm1(token)
        return self.feed(token + self.drop_path(self.gamma_1 * self.attn(query, patches)))

    def flops(self, tokens: int) -> int:
        """Multiply-accumulates for `tokens` patches."""
        context = tokens + (self.context == "all")
        return (
            self.attn.flops(context)
            + 2 * self.dim * self.hidden
            + (context + 1 if self.context == "all" else 2) * self.dim
        )
