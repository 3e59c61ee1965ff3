"""What the tests of edits of the diagonal and of a head's scale have in common."""

import pytest
import torch
from torch import Tensor, nn

from models.attention.report import why_not_fused
from tests.models.family.dense import Dense, Place, cases, lone_cases

PLACES = [
    Place("swin", (8, 8), (4, 4), (2, 2)),
    Place("swinv2", (6, 6), (4, 4), (2, 2)),
    Place("vit", (3, 4), (3, 4)),
    Place("vit", (3, 4), (3, 4), prefix=1),
]
LONE_SHIFTED = Place("swin", (8, 8), (3, 3), (1, 1))  # alone in its region at all four corners
OTHERS = [place for place in cases() if place not in PLACES]
CASES = [*PLACES, *(pytest.param(place, marks=pytest.mark.slow) for place in OTHERS)]
LONE = lone_cases()
LONE_CASES = [
    LONE[0],
    LONE_SHIFTED,
    *(pytest.param(place, marks=pytest.mark.slow) for place in LONE[1:]),
]
FUSED_PLACES = PLACES[:2] + [Place("vit", (5, 3), (5, 3))]


def products(dense: Dense) -> Tensor:
    """(q kᵀ) * scale, without the bias: (B, H, L, L)."""
    return dense.logits - dense.bias


def by_head(values: Tensor) -> Tensor:
    """(H,) -> (H, 1, 1)."""
    return values[:, None, None]


def run(attention: nn.Module, place: Place) -> Tensor:
    """The module's output for the place's own input."""
    x = place.x()
    return attention(x, place.layout) if place.layout else attention(x)


def assert_neutral(place: Place, *modifiers: str) -> None:
    """With all their parameters at 0 the modifiers change no bit, in float32 and in bfloat16."""
    plain, edited = place.attention(), place.attention(*modifiers)
    edited.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        for parameter in edited.modifiers.parameters():
            parameter.zero_()
    assert torch.equal(run(edited, place), run(plain, place))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(edited, place), run(plain, place))


def assert_runs_fused(attention: nn.Module) -> None:
    """In float32 and in bfloat16."""
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            assert set(why_not_fused(attention).values()) == {None}
