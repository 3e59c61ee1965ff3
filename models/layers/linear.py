"""A linear layer that is made ready once for evaluation, not in every forward."""

from torch import Tensor, nn

from .cache import EvalCache
from .products import Ready, keeps_ready, linear, result_dtype


class Linear(nn.Linear):
    """nn.Linear, same parameters and result. In evaluation the weight is kept cast and laid out as
    the product needs it.

    Shapes: (..., in_features) -> (..., out_features).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, out_features, bias)
        self.cache = EvalCache()

    def ready(self, x: Tensor) -> Ready:
        """The layer made ready for inputs like x; kept while weight and bias stay unchanged."""
        dtype, kind = result_dtype(x), x.device.type
        sources = [self.weight] if self.bias is None else [self.weight, self.bias]
        return self.cache.get(
            f"{dtype} {kind}", sources, lambda: Ready(self.weight, self.bias, dtype, kind)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return self.ready(x)(x) if keeps_ready() else linear(x, self.weight, self.bias)
