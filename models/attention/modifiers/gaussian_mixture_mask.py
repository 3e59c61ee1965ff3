"""Gaussian mixture mask: a mixture of Gaussians of the distance between two tokens multiplies the
logits.
"""

import torch
from torch import Tensor, nn

from kernels.window_attention import OffsetTerms
from models.attention.geometry import Geometry

from .base import MODIFIERS, TermModifier

# widest distances of the window in the sigma that stands for infinity: the mixture is 1 up to 1e-6
IDENTITY_REACH = 1000.0
MAX_KERNELS = 1024


@MODIFIERS.register("gaussian_mixture_mask")
class GaussianMixtureMask(TermModifier):
    """Multiplies the scaled logits, before bias and mask, by a learned profile of the distance
    between query and key.

        M(D) = sum_k alpha_k exp(-D / (2 sigma_k^2 + 2e-5)),   S = (q kᵀ) * scale * M + bias

    D is the squared distance in tokens. M may be negative ("anti-attention"). It is worked out on
    the T offsets, not on pairs.

    Args:
        num_kernels: Gaussians K, at least 1.
        share_heads: one mixture for all heads instead of one each.
        position: "pre" as above, or "post": the softmaxed map is multiplied; `renormalise` then
            divides its rows by their sums, which a mixture of both signs can bring near 0.
        init: "paper": sigma ~ N(10, 10^2), alpha ~ N(0, 2^2), half of the heads start with a
            negative factor. "identity": M = 1, one Gaussian as good as infinitely wide, the others
            of height 0 and of widths spread over the window.
        legacy_pow: M by powers of exp(-D)^(1/2), as the released code does: 0 in float32 for D >=
            104, without gradient.
    Shapes: alpha, sigma (K, heads or 1), matrices, so that weight decay reaches them as in the
        original; terms.scale (T or 1, heads) -> (T, heads); class tokens keep factor 1.
    Raises: ValueError for a word or number that is not one of the above.
    Source: RetNet Viewed through Convolution, arXiv:2309.05375, and its code
        github.com/CatworldLee/Gaussian-Mixture-Mask-Attention. There the exponents underflow beyond
        10 tokens; here they are formed directly, and far pairs keep their weight.
    """

    def __init__(
        self,
        geometry: Geometry,
        num_kernels: int = 5,
        share_heads: bool = False,
        position: str = "pre",
        renormalise: bool = False,
        init: str = "paper",
        legacy_pow: bool = False,
    ):
        super().__init__(geometry)
        for name, value, allowed in (
            ("position", position, ("pre", "post")),
            ("init", init, ("paper", "identity")),
        ):
            if value not in allowed:
                raise ValueError(
                    f"gaussian_mixture_mask({name}={value}): allowed are {', '.join(allowed)}"
                )
        if not 1 <= num_kernels <= MAX_KERNELS:
            raise ValueError(
                f"gaussian_mixture_mask(num_kernels={num_kernels}): at least 1, at most"
                f" {MAX_KERNELS}"
            )
        if renormalise and position != "post":
            raise ValueError(
                "gaussian_mixture_mask(renormalise=True) needs position=post: before the softmax"
                " rows are normalised anyway"
            )
        self.position = position
        self.renormalise = renormalise
        self.init = init
        self.legacy_pow = legacy_pow
        heads = 1 if share_heads else geometry.num_heads
        self.sigma = nn.Parameter(torch.full((num_kernels, heads), 10.0))
        self.alpha = nn.Parameter(torch.full((num_kernels, heads), 1 / num_kernels))
        distance = squared_distances(geometry)[:, None]
        self.register_buffer(
            "distance", torch.exp(-distance).sqrt() if legacy_pow else distance, persistent=False
        )  # (T, 1)

    @torch.no_grad()
    def initialise(self, attention: nn.Module) -> None:
        """Draws sigma and alpha, or sets them so that M = 1."""
        if self.init == "paper":
            self.sigma.normal_(10, 10)
            self.alpha.normal_(0, 2)
            return
        reach = max(1.0, sum((side - 1) ** 2 for side in self.geometry.window) ** 0.5)
        count = len(self.sigma)
        self.alpha.zero_()[0] = 1
        self.sigma.copy_(
            torch.tensor([IDENTITY_REACH, *(k / (count - 1) for k in range(1, count))])[:, None]
            * reach
        )

    def mixture(self) -> Tensor:
        """(T, heads or 1): M at each offset."""
        sigma = self.sigma[:, None]  # (K, 1, H)
        if self.legacy_pow:
            gaussians = self.distance ** (1 / (sigma**2 + 1e-5))  # (K, T, H)
        else:
            gaussians = torch.exp(-self.distance / (2 * sigma**2 + 2e-5))
        return (self.alpha[:, None] * gaussians).sum(0)

    def forward(self, terms: OffsetTerms) -> OffsetTerms:
        """scale (T or 1, H) -> (T, H), or post (T, H) -> (T, H) when it applies to the softmaxed
        map.
        """
        mixture = self.mixture().expand(-1, self.geometry.num_heads).to(terms.scale.dtype)
        if self.position == "pre":
            return terms.replace(scale=terms.scale * terms.matching("scale", mixture, 1.0))
        factor = terms.matching("post", mixture, 1.0)
        post = factor if terms.post is None else terms.post * factor
        return terms.replace(post=post, renormalise=terms.renormalise or self.renormalise)


def squared_distances(geometry: Geometry) -> Tensor:
    """(T,) float32: squared distance, in tokens, behind each row of an offset table."""
    rows, columns = (
        torch.arange(1 - side, side, dtype=torch.float32) ** 2 for side in geometry.window
    )
    return (rows[:, None] + columns).flatten()
