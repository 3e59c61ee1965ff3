"""Linear layers and the MLP of two of them: in which precision and by which product they are
fastest on this machine, what an evaluation prepares once, and the GELU between two products.
"""

from .evaluation import EvalCache, Evaluation, evaluation, kept_for, may_prepare_weights
from .layer import Linear, run_linear
from .mlp import fused_mlp
from .precision import computed_in, describe_products, result_dtype
from .prepared import PreparedLinear
from .products import linear
from .watched import are_all_hooked, is_cpu_inference, is_plain, is_untouched

__all__ = [
    "EvalCache",
    "Evaluation",
    "Linear",
    "PreparedLinear",
    "are_all_hooked",
    "computed_in",
    "describe_products",
    "evaluation",
    "fused_mlp",
    "is_cpu_inference",
    "is_plain",
    "is_untouched",
    "kept_for",
    "linear",
    "may_prepare_weights",
    "result_dtype",
    "run_linear",
]
