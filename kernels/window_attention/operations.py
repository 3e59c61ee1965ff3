"""What Python adds to the compiled operations of csrc/binding.cpp: shapes for tracing, gradients,
autocast.

`torch.ops.idsw.window_attention_forward` returns (out, lse, along) of csrc/args.h, of which out and
lse are differentiable; `torch.ops.idsw.window_attention_backward` the gradients of qkv, the tables
and the factors of the epilogue. Both are deterministic, and one node each in a compiled or exported
graph.
"""

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import flop_registry, register_flop_formula

from kernels.derivatives import is_differentiated_again, plain_gradients
from kernels.library.loader import after_loading

from .plain import plain_attention

DIFFERENTIABLE = ("qkv", "scale", "bias", "post", "alpha", "beta", "exclusion")  # come first
FORWARD, BACKWARD = "idsw::window_attention_forward", "idsw::window_attention_backward"


@after_loading
def register() -> None:
    """Registers shapes, gradients and autocast with PyTorch."""
    library = torch.library.Library("idsw", "FRAGMENT")
    torch.library.register_fake(FORWARD, _fake_forward)
    torch.library.register_fake(BACKWARD, _fake_backward)
    torch.library.register_autograd(FORWARD, _backward, setup_context=_save)
    for device in ("cpu", "cuda"):
        library.impl("window_attention_forward", _autocast(device), f"Autocast{device.upper()}")
    _registered.append(library)  # its registrations end with the object
    register_flops()


_registered: list[torch.library.Library] = []


def call(*inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Result and log-sum-exp of the forward for the inputs of its schema."""
    return torch.ops.idsw.window_attention_forward(*inputs)[:2]


def _fake_forward(
    qkv,
    scale,
    bias,
    post,
    alpha,
    beta,
    exclusion,
    seed,
    window,
    shift,
    num_heads,
    cosine,
    mask_value,
    dropout,
    need_lse,
):
    batch, height, width, channels = qkv.shape
    windows = -(-height // window[0]) * -(-width // window[1])
    rows = (batch, windows, num_heads, window[0] * window[1])
    out = qkv.new_empty((batch, height, width, channels // 3))
    return out, *(
        qkv.new_empty(rows if needed else (0,), dtype=torch.float32)
        for needed in (need_lse, need_lse and exclusion is not None)
    )


def _fake_backward(
    grad_out,
    grad_lse,
    qkv,
    out,
    lse,
    along,
    scale,
    bias,
    post,
    alpha,
    beta,
    exclusion,
    seed,
    window,
    shift,
    num_heads,
    cosine,
    mask_value,
    dropout,
    *needed,
):
    given = (scale, bias, post, alpha, beta, exclusion)
    shapes = [
        x.shape if needs and x is not None else (0,) for x, needs in zip(given, needed, strict=True)
    ]
    return qkv.new_empty(qkv.shape), *(
        qkv.new_empty(shape, dtype=torch.float32) for shape in shapes
    )


def register_flops() -> None:
    """Tells PyTorch's FLOP counter how to count both operations; also one that is counting already,
    which has a copy of what it knew at its start.
    """
    operations = torch.ops.idsw.window_attention_forward, torch.ops.idsw.window_attention_backward
    for operation, formula in zip(operations, (_forward_flops, _backward_flops), strict=True):
        if operation not in flop_registry:
            register_flop_formula(operation)(formula)
        for mode in _get_current_dispatch_mode_stack():
            known = getattr(getattr(mode, "counter", None), "flop_registry", {})
            known[operation] = flop_registry[operation]


def _forward_flops(qkv, scale, bias, post, alpha, beta, exclusion, seed, window, *_, **__) -> int:
    return 2 * _products(qkv, window)  # q kᵀ, and the map times v


def _backward_flops(
    grad_out,
    grad_lse,
    qkv,
    out,
    lse,
    along,
    scale,
    bias,
    post,
    alpha,
    beta,
    exclusion,
    seed,
    window,
    *_,
    **__,
) -> int:
    return 4 * _products(qkv, window)  # those of the plain formula: two for each in the forward


def _products(qkv, window) -> int:
    """FLOPs of one product for all heads, on whole windows."""
    batch, height, width, channels = qkv
    windows = -(-height // window[0]) * -(-width // window[1])
    area = window[0] * window[1]
    return 2 * batch * windows * area * area * (channels // 3)


def _autocast(device: str):
    """The operation under autocast: qkv is cast, as PyTorch does for a product of matrices; the
    tables stay float32.
    """
    without = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def kernel(qkv, *rest):
        dtype = torch.get_autocast_dtype(device) if qkv.dtype != torch.float64 else torch.float64
        with torch._C._ExcludeDispatchKeyGuard(without):  # as in torch.library.register_autocast
            return torch.ops.idsw.window_attention_forward(qkv.to(dtype), *rest)

    return kernel


def _save(ctx, inputs, output) -> None:
    *tensors, seed = inputs[: len(DIFFERENTIABLE) + 1]
    options, need_lse = inputs[len(DIFFERENTIABLE) + 1 : -1], inputs[-1]
    out, lse, along = output
    ctx.mark_non_differentiable(*((along,) if need_lse else (lse, along)))
    ctx.set_materialize_grads(False)
    exclusive = tensors[-1] is not None
    results = (out, lse, along) if exclusive else (None, lse, None)
    ctx.save_for_backward(*tensors, seed, *results)
    ctx.options = options


def _backward(ctx, grad, grad_lse, _):
    rest = (None,) * (2 + len(ctx.options))  # seed, options and need_lse have no gradient
    given = [g for g in (grad, grad_lse) if g is not None]
    if not given:
        return (None,) * len(DIFFERENTIABLE) + rest
    *tensors, seed, out, lse, along = ctx.saved_tensors
    needed = ctx.needs_input_grad[: len(DIFFERENTIABLE)]
    if any(is_differentiated_again(g) for g in given):
        grads = plain_gradients(
            lambda *inputs: plain_attention(*inputs, seed, *ctx.options),
            tensors,
            (grad, grad_lse),
            needed,
        )
        return *grads, *rest
    qkv = tensors[0]
    if grad is None:
        grad = qkv.new_zeros((*qkv.shape[:3], qkv.shape[3] // 3))
    grads = torch.ops.idsw.window_attention_backward(
        grad.contiguous(),
        grad_lse,
        qkv,
        out,
        lse,
        along,
        *tensors[1:],
        seed,
        *ctx.options,
        *needed[1:],
    )
    return *(g if needs else None for g, needs in zip(grads, needed, strict=True)), *rest
