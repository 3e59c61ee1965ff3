"""Linear layers and the MLP of two of them: in which precision and by which product they are
fastest on this machine, what evaluation may prepare once, and the GELU between two products.
"""

from .cache import EvalCache
from .layer import Linear
from .mlp import fused_mlp
from .precision import computed_in, describe_products, result_dtype
from .prepared import PreparedLinear, may_prepare_weights
from .products import linear

__all__ = [
    "EvalCache",
    "Linear",
    "PreparedLinear",
    "computed_in",
    "describe_products",
    "fused_mlp",
    "linear",
    "may_prepare_weights",
    "result_dtype",
]
