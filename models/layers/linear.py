"""A linear layer that casts its weight once, not in every forward, while a model is evaluated under autocast."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import EvalCache


class Linear(nn.Linear):
    """nn.Linear, same parameters and result. In evaluation under autocast the cast weight and bias are kept while they stay unchanged.

    Shapes: (..., in_features) -> (..., out_features).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, out_features, bias)
        self.cache = EvalCache()

    def operands(self, kind: str) -> tuple[Tensor, Tensor | None]:
        """Weight and bias in the dtype of autocast on devices of `kind`, or as they are where autocast is off."""
        if not torch.is_autocast_enabled(kind):
            return self.weight, self.bias
        dtype = torch.get_autocast_dtype(kind)
        sources = [self.weight] if self.bias is None else [self.weight, self.bias]
        return self.cache.get(str(dtype), sources, lambda: (self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return F.linear(x, self.weight, self.bias)  # autocast casts
        return F.linear(x, *self.operands(x.device.type))
