"""Continuous relative position weight: a learned function of the relative offset multiplies the
logits.
"""

import math

import torch
from torch import nn

from kernels.window_attention import OffsetTerms
from models.attention.geometry import Geometry
from models.layers.init import trunc_normal

from .base import MODIFIERS, TermModifier

HIDDEN = 512


@MODIFIERS.register("crpw")
class ContinuousRelativePositionWeight(TermModifier):
    """A weight w per head and relative offset, from an MLP on SwinV2's log-spaced coordinates,
    sharpens or smooths the map.

        mode add_to_scale:  S = (q kᵀ) * (scale + w) + bias
        mode one_plus:      S = (q kᵀ) * scale * (1 + w) + bias
        mode sigmoid16:     S = (q kᵀ) * (scale + 16 sigmoid(w)) + bias
        apply probs:        A = softmax(S) * (1 + w), whatever the mode;
                            with `renormalise` rows sum to 1 again

    Args:
        source: "mlp" (Linear(2, 512) - ReLU - Linear(512, H, no bias)) or "table" (one free number
            per offset and head).
        init_std: standard deviation of the last layer or the table at the start; 0 makes w = 0, the
            unmodified function.
        hidden_std: the same for the MLP's first layer.
        weight_decay: whether decay reaches these parameters (only matrices decay, so the MLP's
            weights or the table).
    Shapes: terms.scale (T or 1, H) -> (T, H); an `mlp` adds 1536 + 512 H parameters, a `table` T
        H.
    Raises: ValueError for a word that is not one of the above.
    Source: github.com/AllenHaoHuang/improving-redundancy-in-attention: add_to_scale before the
        softmax; V2 an MLP with all weights at 2e-4, V1 a table at 1e-4 that decays. Exactly zero is
        this project's default; the rest are its readings of "multiplied with the attention matrix".
    """

    def __init__(
        self,
        geometry: Geometry,
        source: str = "mlp",
        mode: str = "add_to_scale",
        apply: str = "logits",
        renormalise: bool = False,
        init_std: float = 0.0,
        hidden_std: float = 0.02,
        weight_decay: bool = False,
    ):
        super().__init__(geometry)
        for name, value, allowed in (
            ("source", source, ("mlp", "table")),
            ("mode", mode, ("add_to_scale", "one_plus", "sigmoid16")),
            ("apply", apply, ("logits", "probs")),
        ):
            if value not in allowed:
                raise ValueError(f"crpw({name}={value}): allowed are {', '.join(allowed)}")
        if renormalise and apply != "probs":
            raise ValueError(
                "crpw(renormalise=True) needs apply=probs: before the softmax the rows are"
                " normalised anyway"
            )
        if not (0 <= init_std < math.inf and 0 <= hidden_std < math.inf):
            raise ValueError(
                f"crpw(init_std={init_std}, hidden_std={hidden_std}): a standard deviation is at"
                " least 0"
            )
        self.mode = mode
        self.apply_to = apply
        self.renormalise = renormalise
        self.stds = (hidden_std, init_std)
        self.decays = weight_decay
        if source == "table":
            self.table = nn.Parameter(torch.zeros(geometry.num_offsets, geometry.num_heads))
        else:
            self.mlp = nn.Sequential(
                nn.Linear(2, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, geometry.num_heads, bias=False)
            )
            self.register_buffer("coords", geometry.log_coords(), persistent=False)  # (T, 2)

    def initialise(self, attention: nn.Module) -> None:
        """Draws the MLP's layers or the table; the first layer's bias is 0."""
        if hasattr(self, "table"):
            trunc_normal(self.table, self.stds[1])
            return
        for layer, std in zip((self.mlp[0], self.mlp[2]), self.stds, strict=True):
            trunc_normal(layer.weight, std)
        nn.init.zeros_(self.mlp[0].bias)

    def no_weight_decay(self) -> set[str]:
        """All own parameters, unless decay is asked for."""
        return set() if self.decays else {name for name, _ in self.named_parameters()}

    def forward(self, terms: OffsetTerms) -> OffsetTerms:
        """scale (T or 1, H) -> (T, H), or post (T, H) -> (T, H) when it applies to the softmaxed
        map.
        """
        w = self.table if hasattr(self, "table") else self.mlp(self.coords)  # (T, H)
        w = w.to(terms.scale.dtype)
        if self.apply_to == "probs":
            factor = 1 + terms.matching("post", w, 0.0)
            post = factor if terms.post is None else terms.post * factor
            return terms.replace(post=post, renormalise=terms.renormalise or self.renormalise)
        if self.mode == "one_plus":
            return terms.replace(scale=terms.scale * (1 + terms.matching("scale", w, 0.0)))
        w = 16 * torch.sigmoid(w) if self.mode == "sigmoid16" else w
        return terms.replace(scale=terms.scale + terms.matching("scale", w, 0.0))
