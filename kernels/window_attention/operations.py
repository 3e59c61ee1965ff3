"""What Python adds to the compiled operations of csrc/binding.cpp: shapes for tracing, gradients,
autocast.

`torch.ops.idsw.window_attention_forward` returns (out, lse),
`torch.ops.idsw.window_attention_backward` the gradients of qkv, scale, bias and post. Both are
deterministic, and one node each in a compiled or exported graph.
"""

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import flop_registry, register_flop_formula

from kernels.derivatives import is_differentiated_again, plain_gradients
from kernels.library.loader import after_loading

from .plain import plain_attention

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


def call(*inputs) -> torch.Tensor:
    """The result of the forward for the inputs of its schema."""
    return torch.ops.idsw.window_attention_forward(*inputs)[0]


def _fake_forward(
    qkv, scale, bias, post, seed, window, shift, num_heads, cosine, mask_value, dropout, need_lse
):
    batch, height, width, channels = qkv.shape
    windows = -(-height // window[0]) * -(-width // window[1])
    shape = (batch, windows, num_heads, window[0] * window[1]) if need_lse else (0,)
    out = qkv.new_empty((batch, height, width, channels // 3))
    return out, qkv.new_empty(shape, dtype=torch.float32)


def _fake_backward(
    grad_out,
    qkv,
    lse,
    scale,
    bias,
    post,
    seed,
    window,
    shift,
    num_heads,
    cosine,
    mask_value,
    dropout,
    need_scale,
    need_bias,
    need_post,
):
    tables = [(scale, need_scale), (bias, need_bias), (post, need_post)]
    shapes = [table.shape if needed and table is not None else (0,) for table, needed in tables]
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


def _forward_flops(qkv, scale, bias, post, seed, window, *_, **__) -> int:
    return 2 * _products(qkv, window)  # q kᵀ, and the map times v


def _backward_flops(grad_out, qkv, lse, scale, bias, post, seed, window, *_, **__) -> int:
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
    qkv, scale, bias, post, seed, *options, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, output[1], scale, bias, post, seed)
    ctx.options = options


def _backward(ctx, grad, _):
    if grad is None:
        return (None,) * 12
    qkv, lse, scale, bias, post, seed = ctx.saved_tensors
    needed = ctx.needs_input_grad[:4]
    if is_differentiated_again(grad):
        grads = plain_gradients(
            lambda *inputs: plain_attention(*inputs, seed, *ctx.options),
            (qkv, scale, bias, post),
            grad,
            needed,
        )
        return *grads, *(None,) * 8
    grads = torch.ops.idsw.window_attention_backward(
        grad.contiguous(), qkv, lse, scale, bias, post, seed, *ctx.options, *needed[1:]
    )
    return (
        *(table if needs else None for table, needs in zip(grads, needed, strict=True)),
        *(None,) * 8,
    )
