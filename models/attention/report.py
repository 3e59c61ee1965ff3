"""Which attention modules of a model run as the fused kernel, and why the others do not."""

import copy
import os
from collections import Counter

import torch
from torch import nn

from kernels.window_attention import interface
from registry import check_choice

from .mixers import MIXERS
from .softmax import SoftmaxAttention


def why_not_fused(model: nn.Module) -> dict[str, str | None]:
    """For each attention module of `model`, by name: why it does not run fused, or None if it does.

    The kernel is looked for, and built if need be, as in the first forward. Ask within autocast
    where the model will run in it.
    """
    kinds = (SoftmaxAttention, *(MIXERS[name] for name in MIXERS.names()))
    return {
        name: _reason(module) for name, module in model.named_modules() if isinstance(module, kinds)
    }


def describe_attention(model: nn.Module) -> str:
    """One line for a log: how many attention modules run fused, why the others do not, and which
    modifiers act in them.
    """
    reasons = Counter(why_not_fused(model).values())
    total, fused = reasons.total(), reasons.pop(None, 0)
    if not total:
        return "attention: the model has none"
    others = "".join(f"; {count} not: {reason}" for reason, count in reasons.most_common())
    named = [
        text
        for module in model.modules()
        if isinstance(module, SoftmaxAttention)
        for text in module.spec.modifiers
    ]
    arms = f"; modifiers: {', '.join(dict.fromkeys(named))}" if named else ""
    return f"attention: {fused} of {total} modules run as the fused kernel{others}{arms}"


def check_backends(model: nn.Module) -> None:
    """Raises ValueError where a forced backend cannot compute an attention module of `model`, in
    the mode that it is in, on any machine. Works on the meta device too.
    """
    for module in model.modules():
        if not isinstance(module, SoftmaxAttention):
            continue
        key, backend = _backend(module)
        if backend in ("auto", "reference"):
            continue
        if module.is_open():
            if key == interface.ENVIRONMENT:  # a preference for all that have the choice
                continue
            raise ValueError(
                f"{key} {backend}: a modifier needs the N x N matrix, which this backend does not"
                " form; set it to auto or reference, or leave the modifier out"
            )
        probe = copy.deepcopy(module).to_empty(device="cpu")
        with torch.no_grad():
            for tensor in (*probe.parameters(), *probe.buffers()):
                tensor.zero_()
            qkv = torch.empty((1, 1, 1, 3 * probe.geometry.inner))
            dropout = module.spec.drop if module.training else 0.0
            reason = interface.why_never(backend, qkv, probe.terms(), dropout)
        if reason:
            raise ValueError(f"{key} {backend}: {reason}")


def check_kernel(model: nn.Module) -> None:
    """Raises ValueError where the fused kernel is forced and this machine has none for `model`,
    which is where it will run, as in `why_not_fused`.
    """
    for module in model.modules():
        if isinstance(module, SoftmaxAttention) and _backend(module)[1] == "fused":
            reason = None if module.is_open() else _reason(module)
            if reason:
                raise ValueError(f"{_backend(module)[0]} fused does not apply: {reason}")


def _backend(attention: SoftmaxAttention) -> tuple[str, str]:
    """What decides on the backend of an attention module, and what it says.

    Raises: ValueError where the environment names no backend.
    """
    said = os.environ.get(interface.ENVIRONMENT)
    if attention.spec.backend != "auto" or not said:
        return "MODEL.ATTENTION.BACKEND", attention.spec.backend
    return interface.ENVIRONMENT, check_choice(
        interface.ENVIRONMENT, said, ["auto", *interface.BACKENDS]
    )


def _reason(attention: nn.Module) -> str | None:
    """Why this attention module does not run fused where its parameters are, with their dtype or
    autocast's, or None if it does.
    """
    if not isinstance(attention, SoftmaxAttention):
        return f"{type(attention).__name__} is no softmax attention"
    backend = _backend(attention)[1]
    if backend not in ("auto", "fused"):
        return f"the backend is set to {backend}"
    if attention.is_open():
        return "a modifier or a hook needs the N x N matrix"
    weight = getattr(attention.qkv, "weight", None)
    with torch.no_grad():
        terms = attention.terms()
        like = weight if isinstance(weight, torch.Tensor) else terms.scale  # a quantized layer
        return interface.why_not_fused(
            like.new_empty((1, 1, 1, 3 * attention.geometry.inner)), terms
        )
