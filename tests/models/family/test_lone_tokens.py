"""Every modifier where a window holds a single token, a region holds none, and in one image all
tokens are equal: finite, and the same on every backend.
"""

from dataclasses import replace

import pytest
import torch
from torch import nn

from kernels.window_attention.interface import why_never
from models.attention.modifiers import MODIFIERS
from tests.models.family.dense import Place, exact

SMALL = Place("swin", (4, 4), (3, 3), (1, 1))  # a token alone beside forbidden ones
# Alone beside padding; alone beside forbidden tokens; regions of padding alone.
PLACES = [
    Place("swin", (8, 8), (7, 7)),
    Place("swinv2", (8, 8), (7, 7), (1, 1)),
    Place("swin", (8, 8), (7, 7), (3, 3)),
]
USUAL = ("affine", "exclusive", "gpsa", "self_exclude", "self_mask", "sink")  # by default


def products() -> list:
    """(name, place)."""
    return [
        pytest.param(
            name, place, marks=() if place is SMALL and name in USUAL else pytest.mark.slow
        )
        for name in MODIFIERS.names()
        for place in (SMALL, *PLACES)
    ]


def backends(attention: nn.Module, x: torch.Tensor) -> list[str]:
    """Those that can compute it."""
    if attention.is_open():
        return ["auto"]
    qkv, terms = attention.tokens(x), attention.terms()
    names = ("reference", "eager", "fused")
    return [name for name in names if why_never(name, qkv, terms) is None]


def results(attention: nn.Module, x: torch.Tensor, place: Place) -> dict[str, torch.Tensor]:
    """Output and gradients, in the dtype of the module."""
    attention.zero_grad()
    x = x.to(attention.qkv.weight.dtype, copy=True).requires_grad_()
    output = attention(x, place.layout)
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    (output * weights).sum().backward()
    gradients = {name: p.grad for name, p in attention.named_parameters() if p.grad is not None}
    return {"output": output.detach(), "x": x.grad, **gradients}


@pytest.mark.parametrize(("name", "place"), products(), ids=str)
def test_every_backend_gives_the_same_finite_result(name, place):
    try:
        attention = place.attention(name)
    except ValueError as refusal:
        pytest.skip(str(refusal))
    x = place.x(batch=2)
    x[1] = x[1, 0, 0]
    expected = results(exact(attention), x, place)
    assert all(value.isfinite().all() for value in expected.values())
    for backend in backends(attention, x):
        attention.spec = replace(attention.spec, backend=backend)
        for key, value in results(attention, x, place).items():
            error = (value - expected[key]).abs().max()
            assert error <= 2e-5 * expected[key].abs().max().clamp(min=1), f"{backend}, {key}"
