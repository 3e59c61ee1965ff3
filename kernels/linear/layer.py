"""A linear layer whose weight is prepared once for evaluation, not in every forward."""

from torch import Tensor, nn

from .cache import EvalCache
from .prepared import PreparedLinear, may_prepare_weights
from .products import linear, result_dtype


class Linear(nn.Linear):
    """nn.Linear, same parameters and result. In evaluation the weight is cached, cast and laid out
    as the product needs it.

    Shapes: (..., in_features) -> (..., out_features).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, out_features, bias)
        self.cache = EvalCache()

    def prepared(self, x: Tensor) -> PreparedLinear:
        """The layer prepared for inputs like x; cached while weight and bias stay unchanged."""
        dtype, kind = result_dtype(x), x.device.type
        sources = [self.weight] if self.bias is None else [self.weight, self.bias]
        return self.cache.get(
            f"{dtype} {kind}",
            sources,
            lambda: PreparedLinear(self.weight, self.bias, dtype, kind),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if may_prepare_weights():
            return self.prepared(x)(x)
        return linear(x, self.weight, self.bias)
