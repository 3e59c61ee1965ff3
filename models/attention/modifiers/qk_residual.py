"""QK residual: q and k start at, and decay towards, the input of the attention module."""

import torch
from torch import Tensor

from kernels.derivatives import is_transformed
from kernels.window_attention.layout import cache_tensors
from models.attention.geometry import Geometry

from .base import MODIFIERS, ProjectionModifier


@cache_tensors
def identity_rows(dim: int, parts: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(3C, C): the identity in the rows of each of q, k, v that `parts` names, zero elsewhere."""
    eye = torch.eye(dim, dtype=dtype, device=device)
    return torch.cat([eye if part in parts else torch.zeros_like(eye) for part in "qkv"])


@MODIFIERS.register("qk_residual")
class QKResidual(ProjectionModifier):
    """Adds the input of the attention module to q and k before the head split.

        q = x (W_q + I)ᵀ + b_q,   k = x (W_k + I)ᵀ + b_k,   v = x W_vᵀ + b_v

    Decoupled weight decay shrinks W, so it pulls W + I towards I, and q and k towards x: attention
    towards the identity.

    Args:
        which: "both" (or "qk"), "q" or "k".
        drop_bias: leave the biases of the q and k named by `which` out (decay does not reach them);
            they keep their place in the state dict, without effect.
    Shapes: weight (3C, C), x (..., C), qkv (..., 3C); no parameter is added.
    Raises: ValueError for another `which`.
    Source: github.com/AllenHaoHuang/improving-redundancy-in-attention. In 16-bit autocast 1 + w
        rounds to steps of 0.004 to 0.008 in bfloat16. In training on the CPU x is therefore added
        to the projected tokens; elsewhere I is added to the float32 weight
        before it is cast: q and k are rounded as coarsely themselves, and on a GPU another pass
            over the tokens costs much.
    """

    def __init__(self, geometry: Geometry, which: str = "both", drop_bias: bool = False):
        super().__init__(geometry)
        if which not in ("both", "qk", "q", "k"):
            raise ValueError(f"qk_residual(which={which}): allowed are both, q, k")
        self.parts = "qk" if which == "both" else which
        self.drop_bias = drop_bias

    def fold(self, weight: Tensor) -> Tensor:
        """(3C, C) -> (3C, C) with the identity added to the rows of q and k."""
        return weight + identity_rows(self.geometry.dim, self.parts, weight.dtype, weight.device)

    def fold_bias(self, bias: Tensor | None) -> Tensor | None:
        """(3C,) -> (3C,), zero for q and k if they lose their bias."""
        if bias is None or not self.drop_bias:
            return bias
        keep = torch.tensor([part not in self.parts for part in "qkv"], device=bias.device)
        return bias * keep.repeat_interleave(self.geometry.dim)

    def add(self, x: Tensor, qkv: Tensor) -> Tensor:
        """x (..., C) is added to the q and k of qkv (..., 3C), in place unless under
        torch.compile or a transform.
        """
        places = slice(*{"qk": (0, 2), "q": (0, 1), "k": (1, 2)}[self.parts])
        x = x.to(qkv.dtype)
        if not (torch.compiler.is_compiling() or is_transformed()):
            return _AddInPlace.apply(qkv, x, places)
        zero = torch.zeros_like(x)
        return qkv + torch.cat([x if part in self.parts else zero for part in "qkv"], dim=-1)


class _AddInPlace(torch.autograd.Function):
    """qkv (..., 3C), of which the parts in `places` get x (..., C) added; what autograd would do
    for a view costs two more passes.
    """

    @staticmethod
    def forward(ctx, qkv: Tensor, x: Tensor, places: slice) -> Tensor:
        ctx.places = places
        ctx.dim = x.shape[-1]
        qkv.unflatten(-1, (3, ctx.dim))[..., places, :].add_(x.unsqueeze(-2))
        ctx.mark_dirty(qkv)
        return qkv

    @staticmethod
    def backward(ctx, grad: Tensor):
        # is_grads_batched knows reshape, but not unflatten
        parts = grad.reshape(*grad.shape[:-1], 3, ctx.dim)
        return grad, parts[..., ctx.places, :].sum(-2), None
