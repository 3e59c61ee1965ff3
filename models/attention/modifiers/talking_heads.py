"""Talking heads: the matrices of all heads are mixed linearly, before and after the softmax."""

import torch
from torch import Tensor, nn

from models.attention.geometry import Geometry

from .base import MODIFIERS, LogitMixer, MapModifier, Modifier


def mix_heads(matrices: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """matrices (B, from, N, N), weight (to, from), bias (to,) or None -> (B, to, N, N)."""
    mixed = (weight.to(matrices.dtype) @ matrices.flatten(2)).unflatten(2, matrices.shape[2:])
    return mixed if bias is None else mixed + bias.to(matrices.dtype)[:, None, None]


class HeadMixing(Modifier):
    """One mixing, with or without a bias.

    Shapes: weight (heads, heads) [to, from], bias (heads,); (B*nW, H, N, N) -> the same.
    """

    def __init__(self, geometry: Geometry, init: str, bias: bool):
        super().__init__(geometry)
        self.init = init
        self.weight = nn.Parameter(torch.eye(geometry.num_heads))
        self.bias = nn.Parameter(torch.zeros(geometry.num_heads)) if bias else None

    def initialise(self, attention: nn.Module) -> None:
        """The identity stays, or N(0, 1) is drawn, or ("small") N(0, 0.02^2), what the released
        CaiT starts with.
        """
        if self.init != "identity":
            nn.init.normal_(self.weight, std=1.0 if self.init == "normal" else 0.02)

    def forward(self, matrices: Tensor) -> Tensor:
        """(B*nW, H, N, N) -> (B*nW, H, N, N)."""
        return mix_heads(matrices, self.weight, self.bias)


class LogitMixing(HeadMixing, LogitMixer):
    """Before the mask and the softmax."""


class MapMixing(HeadMixing, MapModifier):
    """After the softmax."""


@MODIFIERS.register("talking_heads")
class TalkingHeads(Modifier):
    """Mixes the heads' logits before the softmax and their maps after it.

        S_g <- sum_h P_gh S_h (+ b_g),   A = softmax(S + mask),   A_g <- sum_h R_gh A_h (+ c_g)

    Args:
        where: "both", "pre" (the logits) or "post" (the map).
        init: "identity" (the unmodified function) or "normal", N(0, 1), as in the small-image CaiT.
        bias: add b and c, as the released CaiT does. b is constant along a row of the softmax, so
            it has no effect and no gradient.
    Shapes: logits and map (B*nW, H, N, N) -> the same; `pre.weight` and `post.weight` (H, H) [to,
        from], `.bias` (H,).
    Raises: ValueError for a word that is not one of the above.
    Source: Talking-Heads Attention, arXiv:2003.02436; CaiT, arXiv:2103.17239. Weight decay applies
        to the matrices as there.
    """

    def __init__(
        self, geometry: Geometry, where: str = "both", init: str = "identity", bias: bool = False
    ):
        super().__init__(geometry)
        for name, value, allowed in (
            ("where", where, ("both", "pre", "post")),
            ("init", init, ("identity", "normal")),
        ):
            if value not in allowed:
                raise ValueError(f"talking_heads({name}={value}): allowed are {', '.join(allowed)}")
        if where != "post":
            self.pre = LogitMixing(geometry, init, bias)
        if where != "pre":
            self.post = MapMixing(geometry, init, bias)

    def members(self) -> tuple[Modifier, ...]:
        """The mixing of the logits, that of the map, or both."""
        return tuple(self.children())

    def initialise(self, attention: nn.Module) -> None:
        """Each mixing draws its own."""
        for part in self.members():
            part.initialise(attention)
