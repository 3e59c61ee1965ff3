"""What a linear layer computes, by the fastest product where nobody looks at the layer itself."""

import torch
from torch import Tensor, nn

from .evaluation import EvalCache, kept_for
from .precision import computed_in, result_dtype
from .prepared import PreparedLinear
from .products import linear
from .watched import is_cpu_inference, is_plain

Linear = nn.Linear  # its former name: the layers are PyTorch's own


def run_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x), (..., in) -> (..., out): without the call where `layer` is plain (see `is_plain`),
    with the weight prepared inside `evaluation`.
    """
    if not is_plain(layer) or (torch.compiler.is_compiling() and not _is_widened(x)):
        return layer(x)
    cache = kept_for(layer)
    if cache is None and not is_cpu_inference(x):
        return linear(x, layer.weight, layer.bias)
    return prepared(layer, x, cache)(x)


def prepared(layer: nn.Linear, x: Tensor, cache: EvalCache | None) -> PreparedLinear:
    """A plain layer prepared for inputs like x: kept in `cache`, or else for one call."""
    arguments = (layer.weight, layer.bias, result_dtype(x), x.device.type)
    if cache is None:
        return PreparedLinear(*arguments, calls="one")
    weight, bias, *place = arguments
    sources = [weight] if bias is None else [weight, bias]
    return cache.get(tuple(place), sources, lambda: PreparedLinear(*arguments))


def _is_widened(x: Tensor) -> bool:
    dtype = result_dtype(x)
    return computed_in(dtype, x.device.type) != dtype
