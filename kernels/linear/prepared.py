"""A product x Wᵀ + b without gradients; its weight may be cast and laid out once for many calls."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import precision
from .precision import computed_in, row_chunks

_MKLDNN = torch.ops.mkldnn


def can_pack(weight: Tensor, kind: str) -> bool:
    """Whether oneDNN can lay out this weight in its own way: a plain matrix in a dtype that it
    multiplies here.
    """
    mkldnn = torch.backends.mkldnn
    if kind != "cpu" or weight.numel() == 0 or not mkldnn.is_available() or not mkldnn.enabled:
        return False
    dtypes = [torch.float32]
    if _MKLDNN._is_mkldnn_bf16_supported():
        dtypes.append(torch.bfloat16)
    return (
        type(weight) in (Tensor, torch.nn.Parameter)
        and weight.dtype in dtypes
        and hasattr(_MKLDNN, "_linear_pointwise")
    )


class PreparedLinear:
    """Weight and bias of a linear layer, prepared for calls without gradients.

    Args:
        weight: (out, in).
        bias: (out,) or None.
        dtype: of the result.
        kind: of the device.
        calls: "many" or "one", for which the weight keeps its layout.
    On the CPU oneDNN multiplies, where it can, for many calls with the weight in its own layout; a
    GELU behind the product is then part of it.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        kind: str,
        calls: str = "many",
    ):
        self.dtype = dtype
        self.inner = computed_in(dtype, kind)
        self.width, self.columns = weight.shape
        self.weight = weight.detach().to(self.inner)
        self.bias = None if bias is None else bias.detach().to(self.inner)
        self.by_onednn = can_pack(self.weight, kind)
        if self.by_onednn and calls == "many":
            self.weight = _MKLDNN._reorder_linear_weight(self.weight.contiguous())

    def __call__(self, x: Tensor, gelu: bool = False, dtype: torch.dtype | None = None) -> Tensor:
        """(..., in) -> (..., out) of `dtype`, by default of the layer's own."""
        if x.shape[-1] != self.columns:
            raise ValueError(
                f"a linear layer of {self.columns} channels got {tuple(x.shape)}; the last"
                " dimension must be those channels"
            )
        dtype = dtype or self.dtype
        width = self.width
        result_bytes = x.numel() // x.shape[-1] * width * self.inner.itemsize
        if self.inner == dtype or result_bytes <= precision.CHUNK_BYTES:
            return self._product(x, gelu).to(dtype)
        tokens = x.reshape(-1, x.shape[-1])
        y = x.new_empty(len(tokens), width, dtype=dtype)
        for part in row_chunks(len(tokens), x.shape[-1] + width, self.inner):
            y[part] = self._product(tokens[part], gelu)
        return y.view(*x.shape[:-1], width)

    def _product(self, x: Tensor, gelu: bool) -> Tensor:
        x = x.to(self.inner)
        if not self.by_onednn:
            y = self._plain_product(x)
            return F.gelu(y) if gelu else y
        if x.numel() == 0:
            return x.new_empty(*x.shape[:-1], self.width)
        activation = "gelu" if gelu else "none"
        return _MKLDNN._linear_pointwise(x, self.weight, self.bias, activation, [], "none")

    def _plain_product(self, x: Tensor) -> Tensor:
        if self.inner == self.dtype:
            return F.linear(x, self.weight, self.bias)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, self.weight, self.bias)
