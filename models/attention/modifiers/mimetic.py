"""Mimetic initialisation: attention starts with the products of weights that trained ones show."""

import torch
from torch import Tensor, nn

from models.attention.geometry import Geometry
from models.layers.init import set_values

from .base import MODIFIERS, Modifier

LEAST_SQUARE = 1e-24  # of a singular value, so that a singular target divides by no zero


@MODIFIERS.register("mimetic")
class Mimetic(Modifier):
    """Initialises W_q W_kᵀ of each head near a multiple of I, W_v W_o near a negative one, and
    changes nothing else: attend to yourself, and subtract it.

        W_q,h W_k,hᵀ ~ qk (Z_h + I),   W_v W_o = vo (Z - I)

    Row vectors, q = x W_q; every Z is drawn anew, entries N(0, 1/C). The factors are U S^1/2 and
    V S^1/2 of the singular value decomposition, for q and k its first D vectors: the best
    approximation of rank D. No parameter is added, nothing is neutral, decay pulls away from it.
    An initialiser that comes later in the list wins. Drawing takes 0.1 s or more for each head of
    768 channels.

    Args:
        qk: the factor of q and k, above 0, or none, which leaves them as the family draws them.
        vo: the same for v and the output projection; needs a result as wide as the input.
    Shapes: sets rows of attention.qkv.weight (3 H D, C) and attention.proj.weight (C, C), which
        are (out, in), so transposed. Biases, CaiT's layers of the class token and Refined ViT's
        blocks that share a map keep their values.
        In SwinV2 q and k are normed afterwards: the products there are of directions alone.
    Raises: ValueError for a factor that is not above 0, for both none, and for vo where v is not as
        wide as x and o.
    Source: Mimetic Initialization, arXiv:2305.09828. 0.7 and 0.4 are those of later baselines
        (arXiv:2505.19985, released code); not verified in the paper itself.
    """

    def __init__(self, geometry: Geometry, qk: float | None = 0.7, vo: float | None = 0.4):
        super().__init__(geometry)
        for name, value in (("qk", qk), ("vo", vo)):
            if value is not None and value <= 0:
                raise ValueError(f"mimetic({name}={value}): allowed are numbers above 0, and none")
        if qk is None and vo is None:
            raise ValueError("mimetic(qk=none, vo=none) changes nothing; give one of them a number")
        if vo is not None and geometry.inner != geometry.dim:
            raise _no_products(geometry.dim, geometry.inner, geometry.dim)
        self.qk = qk
        self.vo = vo

    @torch.no_grad()
    def initialise(self, attention: nn.Module) -> None:
        """Sets the rows of q and k, head by head, then those of v and the output projection."""
        place = self.geometry
        q, k, v = attention.qkv.weight.split(place.inner)
        if self.qk is not None:
            heads = (part.split(place.head_channels) for part in (q, k))
            for rows in zip(*heads, strict=True):  # (D, C) each
                _set_factors(*rows, self.qk, 1.0)
        if self.vo is not None:
            projection = attention.proj.weight
            if len(projection) != place.dim:
                raise _no_products(place.dim, place.inner, len(projection))
            _set_factors(v, projection.mT, self.vo, -1.0)


def _no_products(dim: int, inner: int, out_dim: int) -> ValueError:
    return ValueError(
        f"mimetic: x has {dim} channels, v {inner} and the result {out_dim}; W_v W_o is near a"
        " multiple of I only where they agree: set vo=none"
    )


def _set_factors(first: Tensor, second: Tensor, factor: float, sign: float) -> None:
    """first, second (rank, C): firstᵀ second ~ factor (Z + sign I) with a fresh Z."""
    rank, dim = first.shape

    def draw() -> Tensor:
        noise = torch.randn(dim, dim, dtype=torch.float64, device="cpu") * dim**-0.5
        target = factor * (noise + sign * torch.eye(dim, dtype=torch.float64, device="cpu"))
        return torch.stack(balanced_factors(target, rank))

    set_values((first, second), draw)


def balanced_factors(target: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """target (C, C) -> left and right (rank, C): leftᵀ right is its best approximation of that
    rank, and both have the roots of its singular values. A rank above C is spread evenly.

    By the eigenvectors of target targetᵀ, in a third of the time of a decomposition of `target`.
    """
    squares, vectors = torch.linalg.eigh(target @ target.mT)  # ascending
    left = vectors[:, -rank:].mT  # (min(rank, C), C)
    roots = squares[-rank:, None].clamp(min=LEAST_SQUARE) ** 0.25
    left, right = left * roots, left @ target / roots
    if rank > len(target):
        turn, _ = torch.linalg.qr(torch.randn(rank, len(target), dtype=target.dtype, device="cpu"))
        left, right = turn @ left, turn @ right
    return left, right
