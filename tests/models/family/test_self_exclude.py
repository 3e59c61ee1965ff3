"""Self-exclusion: the diagonal of the map is taken out, and its mass is lost."""

import copy

import pytest
import torch

from tests.models.family.dense import compare, compare_fused
from tests.models.family.table_edits import (
    CASES,
    FUSED_PLACES,
    LONE,
    LONE_CASES,
    LONE_SHIFTED,
    PLACES,
    assert_runs_fused,
)


def excluded(dense):
    """y_i - A_ii v_i."""
    return dense.y - (dense.A * dense.own).sum(-1, keepdim=True) * dense.v


@pytest.mark.parametrize("place", [*CASES, *LONE_CASES], ids=str)
def test_it_takes_from_the_result_what_the_token_gave_itself(place):
    compare(place.attention("self_exclude"), place.x(), place.layout, excluded)


@pytest.mark.parametrize("place", [*FUSED_PLACES, LONE_SHIFTED], ids=str)
def test_the_fused_kernel_is_as_exact_as_plain_operations(place):
    attention = place.attention("self_exclude")
    assert_runs_fused(attention)
    assert not list(attention.modifiers.parameters())
    compare_fused(attention, place.x(), place.layout, excluded)


def test_who_is_alone_receives_nothing():
    place = LONE[0]
    attention = place.attention("self_exclude")
    output = attention(place.x(), place.layout)[:, 7, 7]
    assert torch.equal(output, attention.proj.bias.expand(2, -1))


@pytest.mark.parametrize("place", [PLACES[0], *LONE_CASES], ids=str)
def test_renormalised_it_is_self_mask_but_for_who_is_alone(place):
    """In either order; a row of zeros stays one."""
    renormalise = "crpw(source=table, apply=probs, renormalise=True)"

    def formula(dense):
        factor = 1 + dense.by_offset(dense.modifier("crpw").table)
        A = dense.A * factor * (1 - dense.own)  # noqa: N806
        total = A.sum(-1, keepdim=True)
        return A / torch.where(total == 0, 1, total) @ dense.v

    for texts in (("self_exclude", renormalise), (renormalise, "self_exclude")):
        attention = place.attention(*texts)
        compare(attention, place.x(), place.layout, formula)


@pytest.mark.parametrize("place", PLACES[:3], ids=str)
def test_renormalised_beside_a_large_logit_of_its_own_the_rest_still_counts(place):
    """Of a logit 120 above all others float32 leaves them numbers below the normal ones: dividing
    by their sum gave gradients that are no numbers.
    """
    attention = place.attention(
        "self_bias", "self_exclude", "crpw(source=table, apply=probs, renormalise=True)"
    )
    with torch.no_grad():
        attention.modifiers["self_bias"].b.fill_(120.0)
    found, expected = (
        with_gradients(module, place) for module in (attention, copy.deepcopy(attention).double())
    )
    for one, other in zip(found, expected, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-4)


def with_gradients(attention, place):
    """The output, and the gradients of its squares by all parameters but the logit's."""
    x = place.x().to(attention.proj.weight.dtype)
    output = attention(x, place.layout) if place.layout else attention(x)
    parameters = [p for name, p in attention.named_parameters() if not name.endswith("self_bias.b")]
    return [output, *torch.autograd.grad(output.square().sum(), parameters)]
