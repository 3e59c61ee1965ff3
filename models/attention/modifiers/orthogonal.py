"""Projections that start as orthonormal matrices: the cosine transform and its controls."""

import math

import torch
from torch import Tensor, nn

from models.attention.geometry import Geometry
from models.layers.init import set_values
from registry import check_choice

from .base import MODIFIERS, Modifier

PARTS = "qkv"


@MODIFIERS.register("orthogonal")
class Orthogonal(Modifier):
    """Initialises W_q, W_k or W_v to one orthonormal matrix M times a number, and changes nothing
    else.

        dct:       M_kn = (2/C)^1/2 cos(pi k (n + 1/2) / C), row 0 divided by 2^1/2 (DCT-II)
        random:    M uniform among the orthogonal matrices, drawn for each layer
        identity:  M = I

    A row is a channel of q, k or v, so a head holds a band of frequencies. All parts named by
    `which` start as the same M: for qk W_qᵀ W_k is a multiple of I, as with `init_identity`, in
    another basis. No parameter is added, nothing is neutral, decay pulls away from it. An
    initialiser that comes later in the list wins.

    Args:
        which: the letters of the parts, of q, k and v: k, qk, qkv, ...
        basis: dct, random (channels have no order, so it should do as well) or identity.
        norm: match keeps the Frobenius norm of the rows as the family draws them (about 0.02 C), or
            as an initialiser in front of this one left them; none is C^1/2. Of qk with matched
            norms the first map is near uniform: a token gives itself 0.02 (0.7 with none; C = 96,
            D = 32, 64 random tokens).
    Shapes: sets rows of attention.qkv.weight (3C, C), (out, in). Biases keep their values. In
        SwinV2 q and k are normed afterwards: there the norm has no effect on the function.
    Raises: ValueError for a word that is not one of the above, and where q, k and v are not as wide
        as x.
    Source: arXiv:2405.13901v5 (dct, without matched norms, on one of q, k, v). Which way round the
        released matrix stands is not verified.
    """

    def __init__(
        self, geometry: Geometry, which: str = "k", basis: str = "dct", norm: str = "match"
    ):
        super().__init__(geometry)
        if not which or len(set(which) & set(PARTS)) != len(which):
            raise ValueError(
                f"orthogonal(which={which}): allowed are the letters q, k and v, each once"
            )
        check_choice("orthogonal: basis", basis, BASES)
        check_choice("orthogonal: norm", norm, ("match", "none"))
        if geometry.inner != geometry.dim:
            raise ValueError(
                f"orthogonal: x has {geometry.dim} channels, q, k and v have {geometry.inner}; an"
                " orthogonal matrix needs as many"
            )
        self.which = which
        self.basis = basis
        self.matches = norm == "match"
        self.norms: dict[str, float] = {}  # of the rows that were replaced

    @torch.no_grad()
    def initialise(self, attention: nn.Module) -> None:
        """Sets the rows; a second call sets them to the same values."""
        dim = self.geometry.dim
        rows = dict(zip(PARTS, attention.qkv.weight.split(dim), strict=True))
        rows = {part: rows[part] for part in PARTS if part in self.which}

        def draw() -> list[Tensor]:
            matrix = BASES[self.basis](dim)
            return [matrix * self._factor(part, before) for part, before in rows.items()]

        set_values(tuple(rows.values()), draw)

    def _factor(self, part: str, before: Tensor) -> float:
        if not self.matches:
            return 1.0
        if part not in self.norms:
            self.norms[part] = float(before.double().norm())
        return self.norms[part] * self.geometry.dim**-0.5


def cosine_matrix(dim: int) -> Tensor:
    """(C, C) float64: the orthonormal DCT-II, a row a frequency."""
    frequency = torch.arange(dim, dtype=torch.float64, device="cpu")[:, None]
    matrix = torch.cos(math.pi / dim * frequency * (frequency.mT + 0.5)) * math.sqrt(2 / dim)
    matrix[0] *= math.sqrt(0.5)
    return matrix


def random_rotation(dim: int) -> Tensor:
    """(C, C) float64, uniform among the orthogonal matrices."""
    q, r = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, device="cpu"))
    return q * r.diagonal().sign()


def identity(dim: int) -> Tensor:
    """(C, C) float64."""
    return torch.eye(dim, dtype=torch.float64, device="cpu")


BASES = {"dct": cosine_matrix, "random": random_rotation, "identity": identity}
