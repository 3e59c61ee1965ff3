"""One more key for every query, with a logit and no value: attention to nothing."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.window_attention import WindowLayout
from models.attention.geometry import Geometry

from .base import MODIFIERS, OutputModifier

# Where a fresh row keeps all but about 1e-6 of its sum: Swin's (and ViT's), and SwinV2's.
NEAR_PLAIN, NEAR_PLAIN_BY_COSINE = -10.0, 0.0


@MODIFIERS.register("sink")
class Sink(OutputModifier):
    """Adds exp(b) to the denominator of each row of the softmax, by a factor on the result.

        A_ij = exp(S_ij) / (exp(b) + sum_j exp(S_ij))
        y    <- y * sigmoid(L - b)        L = log sum_j exp(S_ij), over the keys that i may see

    S is what the softmax takes, mixers of the logits included; the factor multiplies whatever the
    map gave, edits of the softmaxed map included. Padding is no sink. Beside `self_mask` a token
    that sees no other gives all to the sink, and gets 0.

    Args:
        learned: b is a parameter; False fixes it, with b = 0 as softmax-1.
        init: b at the start; None is 0 where it is fixed, and where it is learned close to the
            plain model: -10, or 0 for SwinV2's logits, which its position bias lifts (L of fresh
            models on noise: Swin-T 3.6, SwinV2-T 13.3 on average). That is a start for fine-tuning:
            in a fresh Swin-T b's gradient is then about AdamW's eps, 1e-10 to 1e-8, against 1e-5 to
            2e-4 at the published starts near 0, which take 2 to 12 % from each row.
        std: standard deviation of normal noise on the start; `init=0, std=0.02` is GPT-OSS's start
            in Transformers, `init=0` that of x-transformers.
    Shapes: y (B, H, W, inner) -> same; b (heads,), no weight decay. The factor is worked out in
        float32, and the result rounded once.
    Neutral: b -> -inf; b = -30 gives the plain result bit for bit unless a row's L is below -13.
    Raises: ValueError for `std` without `learned`, below 0 or infinite, and for an `init` that is
        nan or inf.
    Source: the learned b is GPT-OSS's, whose column of logits is dropped behind the softmax.
        Evan Miller, "Attention is off by one", for b = 0: not verified.
    """

    reads = ("lse",)

    def __init__(
        self,
        geometry: Geometry,
        learned: bool = True,
        init: float | None = None,
        std: float = 0.0,
    ):
        super().__init__(geometry)
        start = init
        if init is None:
            start = NEAR_PLAIN if learned else 0.0
        if not start < math.inf or not 0 <= std < math.inf:
            raise ValueError(
                f"sink(init={init}, std={std}): init is a number and std a number of at least 0"
            )
        if std and not learned:
            raise ValueError(
                f"sink(learned=False, std={std}): a fixed sink has no noise; leave std"
            )
        self.std = std
        self.follows = learned and init is None
        b = torch.full((geometry.num_heads,), float(start))
        if learned:
            self.b = nn.Parameter(b)
        else:
            self.register_buffer("b", b, persistent=False)

    @torch.no_grad()
    def initialise(self, attention: nn.Module) -> None:
        """Puts the start where the logits of `attention` are, and adds the noise."""
        if self.follows and getattr(attention, "cosine", False):
            self.b.fill_(NEAR_PLAIN_BY_COSINE)
        if self.std:
            self.b.add_(torch.randn_like(self.b), alpha=self.std)

    def forward(self, y: Tensor, v: Tensor, x: Tensor, layout: WindowLayout, lse: Tensor) -> Tensor:
        """y (B, H, W, inner), lse (B, H, W, heads) -> (B, H, W, inner)."""
        # by the logarithm: a factor that rounds to 1 still has its small gradient
        kept = F.logsigmoid(lse - self.b.to(lse.dtype)).exp()  # (B, H, W, heads)
        heads = y.unflatten(-1, (self.geometry.num_heads, -1)) * kept[..., None]
        return heads.flatten(-2).to(y.dtype)
