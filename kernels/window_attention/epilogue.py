"""What the result of attention gets of each token's own value, as the operation's last step."""

from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_NORM = 1e-8  # of |v|^2
FACTORS = ("alpha", "beta", "exclusion")


@dataclass(frozen=True)
class Epilogue:
    """Changes y = A v, per head and token; either kind by itself.

        affine:     y_i <- alpha v_i + beta y_i
        exclusive:  y_i <- y_i - exclusion (y_i · v_i) / max(|v_i|^2, 1e-8) v_i

    Args:
        alpha, beta, exclusion: (heads,); alpha and beta come together.
    Raises: ValueError for another choice.
    """

    alpha: Tensor | None = None
    beta: Tensor | None = None
    exclusion: Tensor | None = None

    def __post_init__(self) -> None:
        affine = self.alpha is not None
        if affine != (self.beta is not None) or affine == (self.exclusion is not None):
            raise ValueError("Epilogue: give alpha and beta, or exclusion alone, each (heads,)")


def apply_epilogue(y: Tensor, v: Tensor, epilogue: Epilogue, num_heads: int) -> Tensor:
    """The plain formula, in float32 or wider: y and v (..., C) -> (..., C) in the dtype of y."""
    wide = torch.promote_types(y.dtype, torch.float32)
    heads = y.to(wide).unflatten(-1, (num_heads, -1))
    own = v.to(wide).unflatten(-1, (num_heads, -1))
    if epilogue.exclusion is None:
        result = epilogue.alpha.to(wide)[:, None] * own + epilogue.beta.to(wide)[:, None] * heads
    else:
        norm = (own * own).sum(-1, keepdim=True).clamp(min=LEAST_NORM)
        along = (heads * own).sum(-1, keepdim=True) / norm
        result = heads - epilogue.exclusion.to(wide)[:, None] * along * own
    return result.flatten(-2).to(y.dtype)
