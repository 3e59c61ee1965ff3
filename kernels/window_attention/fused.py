"""Window attention through the compiled kernels (csrc/): where they apply, and the call."""

import torch
from torch import Tensor

from kernels.derivatives import is_transformed
from kernels.library import loader
from kernels.library.loader import DTYPES
from kernels.modes import autocast_dtype

from . import operations, selfcheck
from .arguments import check_arguments, check_epilogue
from .epilogue import FACTORS, Epilogue
from .layout import WindowLayout
from .reference import merge_windows, window_attention_reference, with_endings
from .terms import OffsetTerms

# What the kernel of a device takes: channels of a head; tokens along a side of a window and in all
# of it. Other devices have no kernel.
HEAD_DIMS = {"cuda": (16, 32, 64), "cpu": tuple(range(8, 257, 8))}
MOST_TOKENS = {"cuda": (576, 576), "cpu": (32, 1024)}


def cannot(qkv: Tensor, terms: OffsetTerms, kind: str = "") -> str | None:
    """Why the kernel of a kind of device (cpu, cuda; by default qkv's) cannot do this, or None;
    whether it is compiled is not asked. Under autocast its dtype is what counts.
    """
    if _dtype(qkv) not in DTYPES:
        given = str(_dtype(qkv)).removeprefix("torch.")
        return f"{given}; compiled are float32, float16 and bfloat16"
    if terms.renormalise:
        return "the map is renormalised after the softmax"
    if terms.prefix:
        return "class tokens have no place on the grid"
    rows = (2 * terms.window[0] - 1) * (2 * terms.window[1] - 1)
    for name, allowed in (("scale", (1, rows)), ("bias", (rows,)), ("post", (rows,))):
        table = getattr(terms, name)
        if table is not None and (table.dim() != 2 or table.shape[0] not in allowed):
            return f"{name} is not given per offset"
    if not kind:
        kind = "cpu" if qkv.device.type == "cpu" else "cuda"
    head_dim = qkv.shape[-1] // (3 * terms.scale.shape[-1])
    compiled = HEAD_DIMS[kind]
    if head_dim not in compiled:
        allowed = ", ".join(map(str, compiled))
        if len(compiled) > 4:
            allowed = f"multiples of {compiled[0]} up to {compiled[-1]}"
        return (
            f"head_dim {head_dim} is not compiled (compiled: {allowed}); choose NUM_HEADS so that"
            " EMBED_DIM / NUM_HEADS is one of these"
        )
    side, area = MOST_TOKENS[kind]
    if max(terms.window) > side or terms.window[0] * terms.window[1] > area:
        return (
            f"a window of {terms.window[0]}x{terms.window[1]} tokens; compiled are up to {area}, at"
            f" most {side} along a side"
        )
    return None


def never(qkv: Tensor, terms: OffsetTerms) -> str | None:
    """Why the kernel of no kind of device can do this, or None."""
    reasons = [cannot(qkv, terms, kind) for kind in HEAD_DIMS]
    return reasons[0] if all(reasons) else None


def _dtype(qkv: Tensor) -> torch.dtype:
    """What the operation computes in."""
    autocast = autocast_dtype(qkv.device.type)
    return qkv.dtype if autocast is None or qkv.dtype == torch.float64 else autocast


def missing(device: torch.device | str) -> str | None:
    """Why there is no compiled kernel for tensors on `device` on this machine, or None; the first
    call may compile it.

    On a GPU the first call also compares it with the specification, for each card of its own, so
    that a card, driver or compiler it does not fit costs speed, not results.
    """
    if isinstance(device, str):
        device = torch.device(device)
    return _missing(device.type, device.index)


@torch.compiler.assume_constant_result
def _missing(kind: str, index: int | None) -> str | None:
    if kind == "cuda" and index is None:
        index = torch.cuda.current_device() if loader.device_reason() is None else 0
    place = (kind, index)
    if place not in _answers:
        cuda = kind == "cuda"
        _answers[place] = _look_at_card(f"cuda:{index}") if cuda else loader.missing(kind)
    return _answers[place]


_answers: dict[tuple[str, int | None], str | None] = {}


def _look_at_card(device: str) -> str | None:
    reason = loader.missing(device)
    if reason:
        return reason
    fault = selfcheck.find_fault(window_attention_fused, device)
    if fault is None:
        return None
    reason = f"it failed its check on {device}: {fault}; report it"
    loader.say(
        f"window_attention: no fused kernel, since {reason}; PyTorch's own operations are used"
    )
    return reason


def window_attention_fused(
    qkv: Tensor,
    terms: OffsetTerms,
    layout: WindowLayout,
    num_heads: int,
    cosine: bool = False,
    dropout: float = 0.0,
    *,
    epilogue: Epilogue | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """(B, H, W, 3C) -> (B, H, W, C); see `window_attention`. Under autocast the result has
    autocast's dtype; the log-sum-exp is float32.

    Deterministic. Which entries of the map are dropped follows from one number drawn from PyTorch's
    generator of the device, so `torch.manual_seed` and activation checkpoints reproduce them.
    Second derivatives, forward mode and transforms of torch.func go through the plain formula.
    Raises: ValueError where the kernel cannot do this, or there is none on this machine.
    """
    check_arguments(qkv, terms, layout, num_heads, dropout)
    plain = qkv.is_meta or is_transformed()
    reason = never(qkv, terms) if plain else cannot(qkv, terms) or missing(qkv.device)
    if reason:
        raise ValueError(f"window_attention: the fused backend does not apply: {reason}")
    if plain:
        y = window_attention_reference(qkv, terms, layout, num_heads, cosine, dropout)
        return with_endings(y, qkv, terms, layout, num_heads, cosine, epilogue, return_lse)
    check_epilogue(epilogue, qkv, num_heads)
    tables = (terms.scale, terms.bias, terms.post)
    scale, bias, post = (
        None if table is None else table.float().expand(-1, num_heads) for table in tables
    )
    seed = torch.randint(2**63 - 1, (1,), device=qkv.device) if dropout else None
    factors = [None if epilogue is None else getattr(epilogue, name) for name in FACTORS]
    factors = [None if x is None else x.float() for x in factors]
    differentiable = (qkv, scale, bias, post, *factors)
    need_lse = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in differentiable
    )
    y, lse = operations.call(
        *differentiable,
        seed,
        layout.window,
        layout.shift,
        num_heads,
        cosine,
        layout.mask_value,
        float(dropout),
        need_lse or return_lse,
    )
    if not return_lse:
        return y
    return y, merge_windows(lse.flatten(0, 1).unsqueeze(-1), layout)
