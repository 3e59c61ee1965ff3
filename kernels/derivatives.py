"""Derivatives beyond the first backward pass.

The fast operations bring a backward of their own, which nothing can differentiate again. Second
derivatives, forward mode and the transforms of torch.func therefore take the plain formula, whose
derivatives are PyTorch's.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is at work: a fast
    operation would drop its tangents or refuse it.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_differentiated_again(grad: Tensor) -> bool:
    """Whether the backward that is running for `grad` must be made of operations that PyTorch can
    differentiate or transform: under create_graph, forward mode or is_grads_batched.
    """
    batched = torch._C._functorch.is_legacy_batchedtensor(grad)
    return torch.is_grad_enabled() or batched or is_transformed()


def plain_gradients(
    formula: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    grad: Tensor | tuple[Tensor | None, ...],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of formula(*inputs) that are `needed`, differentiable in `grad` and `inputs`.

    grad: of the result; of a formula with several results one each, None where it does not count.
    inputs: as they were given to the operation, so that the edges of its graph lead on from here.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        views = [_view(x, needs) for x, needs in zip(inputs, needed, strict=True)]
        places = [i for i, needs in enumerate(needed) if needs]
        results = formula(*views)
        if isinstance(results, tuple):
            pairs = [(r, g) for r, g in zip(results, grad, strict=True) if g is not None]
            results, grad = zip(*pairs, strict=True)
        found = torch.autograd.grad(
            results,
            [views[i] for i in places],
            grad,
            create_graph=again,
            allow_unused=True,  # not every result depends on every input
            materialize_grads=True,
        )
    own = dict(zip(places, found, strict=True))
    return [own.get(i) for i in range(len(views))]


def _view(x: Tensor | None, needed: bool) -> Tensor | None:
    """A tensor of its own in the graph: where one input is computed from another, each then gets
    its own part alone.
    """
    if x is None:
        return None
    return x.view_as(x) if x.requires_grad or not needed else x.detach().requires_grad_()
