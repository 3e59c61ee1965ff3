"""Attention's map mixed with the identity and with the uniform map."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from kernels.window_attention import Epilogue, WindowLayout, apply_epilogue
from models.attention.geometry import Geometry
from models.attention.regions import region_means, spread_regions

from .base import MODIFIERS, OutputModifier


class AffineEdit(OutputModifier):
    """Base of the edits A' = alpha I + beta A - gamma U, per head, with U_ij = 1 / n_i over the
    n_i tokens visible to i, itself and class tokens included, padding not.

        y'_i = alpha v_i + beta y_i - gamma mean_{j visible to i} v_j

    Where gamma is above 0, A' has negative entries. Dropout of the map hits beta A alone.
    """

    def own_and_map(self) -> tuple[Tensor, Tensor] | None:
        """alpha and beta, (H,) each; None where they are 0 and 1 for ever."""
        return None

    def mean(self) -> Tensor | None:
        """gamma (H,); None where it is 0 for ever."""
        return None

    def epilogue(self) -> Epilogue | None:
        """alpha v + beta y."""
        factors = self.own_and_map()
        return None if factors is None else Epilogue(*factors)

    def after_epilogue(self, y: Tensor, v: Tensor, layout: WindowLayout) -> Tensor:
        """y - gamma U v, in float32 or wider."""
        gamma = self.mean()
        if gamma is None:
            return y
        means = region_means(v, layout)  # (B, R, S, inner)
        gamma = gamma.to(means.dtype).repeat_interleave(self.geometry.head_channels)
        return (y - spread_regions(gamma * means, layout)).to(y.dtype)

    def forward(self, y: Tensor, v: Tensor, x: Tensor, layout: WindowLayout) -> Tensor:
        """y, v (B, H, W, inner) -> the same; x is not used."""
        epilogue = self.epilogue()
        if epilogue is not None:
            y = apply_epilogue(y, v, epilogue, self.geometry.num_heads)
        return self.after_epilogue(y, v, layout)

    def per_head(self, value: float) -> Tensor:
        """(H,) of one value: 1-D, so that weight decay leaves it alone."""
        return torch.full((self.geometry.num_heads,), float(value))


COEFFICIENTS = ("alpha", "beta", "gamma")


class Coefficients(AffineEdit):
    """The three coefficients by their starts, those in `learned` parameters, the others constants.

    State dict: those of alpha, beta, gamma (H,) that are learned.
    """

    def __init__(
        self, geometry: Geometry, starts: tuple[float, float, float], learned: Iterable[str]
    ):
        super().__init__(geometry)
        self.learned = frozenset(learned)
        self.starts = dict(zip(COEFFICIENTS, starts, strict=True))
        for name, start in self.starts.items():
            if name in self.learned:
                setattr(self, name, nn.Parameter(self.per_head(start)))
            else:
                self.register_buffer(name, self.per_head(start), persistent=False)

    def _always(self, name: str, value: float) -> bool:
        return name not in self.learned and self.starts[name] == value

    def own_and_map(self) -> tuple[Tensor, Tensor] | None:
        """See the base."""
        if self._always("alpha", 0.0) and self._always("beta", 1.0):
            return None
        return self.alpha, self.beta

    def mean(self) -> Tensor | None:
        """See the base."""
        return None if self._always("gamma", 0.0) else self.gamma


@MODIFIERS.register("affine")
class Affine(Coefficients):
    """Mixes the map of each head with the identity and with the uniform map over what is visible.

        y'_i = alpha v_i + beta y_i - gamma mean_{j visible to i} v_j

    self_mix, shaped, value_skipinit, attn_scale and high_pass are special cases with names.

    Args:
        alpha, beta, gamma: starts, any numbers. 0, 1, 0 is neutral, and the default.
        learned: "all", "none", one of the three, or a list of them; the others stay at their start.
    Shapes: y, v (B, H, W, C) -> the same; each that is learned is (H,). A class token counts as any
        token.
    Raises: ValueError where nothing is learned and the starts are neutral: nothing would change.
    Source: the frame of shaped attention (arXiv:2306.17759, 2311.01906), value-SkipInit
        (2302.10322) and AttnScale (2203.05962).
    """

    def __init__(
        self,
        geometry: Geometry,
        alpha: float = 0.0,
        beta: float = 1.0,
        gamma: float = 0.0,
        learned: Literal["all", "none", "alpha", "beta", "gamma"]
        | tuple[Literal["alpha", "beta", "gamma"], ...] = "all",
    ):
        named = {"all": COEFFICIENTS, "none": ()}
        chosen = named.get(learned, (learned,)) if isinstance(learned, str) else learned
        if not chosen and (alpha, beta, gamma) == (0, 1, 0):
            raise ValueError(
                "affine(learned=none) with alpha 0, beta 1, gamma 0 changes nothing; give another"
                " value, or learned=all"
            )
        super().__init__(geometry, (alpha, beta, gamma), chosen)
