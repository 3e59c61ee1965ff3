"""Exclusive self-attention: z_i = y_i - a (y_i . v_i) / max(|v_i|^2, 1e-8) v_i."""

from dataclasses import replace

import pytest
import torch

from models.attention.modifiers import MODIFIERS
from tests.models.family.dense import (
    Dense,
    Place,
    cases,
    compare,
    compare_fused_over,
    exact,
    lone_cases,
    visible,
)
from tests.models.family.test_affine import call, fresh

LEARNED = "exclusive(a=learned, init=0.5)"
SHIFTED = Place("swin", (6, 6), (4, 4), (2, 2))
WITH_CLASS_TOKEN = Place("vit", (3, 4), (3, 4), prefix=1)
every_place = pytest.mark.parametrize("place", [SHIFTED, WITH_CLASS_TOKEN], ids=str)


def formula(dense):
    modifier = dense.modifier("exclusive")
    a = modifier.a if modifier.p is None else modifier.p.tanh()
    norm = dense.v.square().sum(-1, keepdim=True).clamp(min=1e-8)
    along = (dense.y * dense.v).sum(-1, keepdim=True) / norm
    return dense.y - a[:, None, None] * along * dense.v


def heads(place, attention):
    """What the projection is given, and v, (B, L, H, D) each."""
    seen = []
    attention.proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    call(attention, place, attention.qkv.weight.dtype)
    dense = Dense(attention, place.x().to(attention.qkv.weight.dtype), place.layout)
    return seen[0].view(2, -1, 2, 8), dense.v.transpose(1, 2), dense


@pytest.mark.parametrize(
    "place", [*cases("swin", "vit"), *cases("swinv2")[3:4], *lone_cases("swin")[1:]], ids=str
)
def test_it_is_the_formula_over_the_whole_grid(place):
    compare(place.attention(LEARNED), place.x(), place.layout, formula)


@every_place
@pytest.mark.parametrize("spec", ["exclusive", "exclusive(a=-0.5)"])
def test_a_fixed_share_is_the_formula_too(place, spec):
    compare(place.attention(spec), place.x(), place.layout, formula)


def test_the_fused_kernel_is_as_near_to_it_as_plain_operations():
    compare_fused_over(cases("swin"), [LEARNED], formula)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [LEARNED, "exclusive"])
def test_it_is_the_formula_everywhere_fused_too(spec):
    places = cases("swin", "swinv2") + lone_cases()
    compare_fused_over([*places, *cases("vit")[:1]], [spec], formula)
    for place in places:
        compare(place.attention(spec), place.x(), place.layout, formula)


@every_place
def test_of_two_edits_the_second_gets_what_the_first_gives(place):
    def mixed(dense):
        g = dense.modifier("self_mix").g[:, None, None]
        y = g * dense.v + (1 - g) * dense.y
        norm = dense.v.square().sum(-1, keepdim=True)
        return y - 0.5 * (y * dense.v).sum(-1, keepdim=True) / norm * dense.v

    attention = place.attention("self_mix", "exclusive(a=0.5)")
    compare(attention, place.x(), place.layout, mixed)


@every_place
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_the_learned_share_starts_as_the_plain_model_to_the_last_bit(autocast, place):
    plain, edited = place.attention(), fresh(place, "exclusive(a=learned)")
    edited.load_state_dict({**edited.state_dict(), **plain.state_dict()})
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        assert torch.equal(call(edited, place), call(plain, place))


@every_place
def test_nothing_is_left_along_the_own_value(place):
    z, v, _ = heads(place, fresh(place, "exclusive"))
    assert (z * v).sum(-1).abs().max() < 1e-5
    assert z.abs().max() > 0.1


@every_place
def test_the_length_of_a_value_does_not_matter_to_what_is_removed(place):
    attention = fresh(place, "exclusive", torch.float64)
    modifier, layout = attention.modifiers["exclusive"], place.layout
    y, v = torch.randn(2, 2, 3, 5, 16, dtype=torch.float64)
    scaled = v * torch.tensor([-3.0, 0.1, 1.0, 7.0, 2.0])[:, None]
    torch.testing.assert_close(modifier(y, scaled, y, layout), modifier(y, v, y, layout))


def test_orthogonal_values_leave_what_comes_from_others():
    """Then y_i . v_i is A_ii |v_i|^2 alone, and z_i = y_i - A_ii v_i, as in self_exclude."""
    modifier = MODIFIERS.create("exclusive", Place("vit", (2, 4), (2, 4)).attention().geometry)
    v = torch.linalg.qr(torch.randn(8, 8).double()).Q * torch.arange(1.0, 9)[:, None]
    attn = torch.randn(2, 8, 8).double().softmax(-1)  # two heads over eight tokens
    y = (attn @ v).transpose(0, 1).reshape(1, 2, 4, 16)
    own = (attn.diagonal(dim1=1, dim2=2)[..., None] * v).transpose(0, 1).reshape(y.shape)
    values = v.repeat(1, 2).view(1, 2, 4, 16)
    torch.testing.assert_close(modifier(y, values, y, None), y - own, rtol=0, atol=1e-12)


@every_place
def test_equal_values_leave_nothing(place):
    attention = fresh(place, "exclusive", torch.float64)
    attention.qkv.weight.data[32:] = 0  # v is its bias
    result = call(attention, place, torch.float64)
    torch.testing.assert_close(result, attention.proj.bias.expand_as(result), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "eager", "fused"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_a_lone_token_gets_nothing_and_gradients_are_finite(autocast, backend):
    for place in lone_cases("swin"):
        attention = fresh(place, "exclusive")
        attention.spec = replace(attention.spec, backend=backend)
        alone = visible(place.grid, place.window, place.shift).sum(1) == 1
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            result = call(attention, place).flatten(1, 2)
        left = result[:, alone] - attention.proj.bias.to(result.dtype)
        assert left.abs().max() < (2e-2 if autocast else 1e-6)
        result.float().square().sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in attention.parameters())


def test_a_value_of_zero_removes_nothing_and_has_finite_gradients():
    attention = exact(fresh(SHIFTED, "exclusive"))
    attention.qkv.weight.data[32:] = 0
    attention.qkv.bias.data[32:] = 0
    result = call(attention, SHIFTED, torch.float64)
    result.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in attention.parameters())


def test_an_identical_map_leaves_nothing():
    attention = fresh(SHIFTED, "exclusive", torch.float64)
    attention.relative_position_bias_table.data[24] = 1e3  # offset (0, 0) of a 4 x 4 window
    result = call(attention, SHIFTED, torch.float64)
    torch.testing.assert_close(result, attention.proj.bias.expand_as(result), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "spec, reason",
    [
        ("exclusive(init=0.5)", "a=learned, or leave init out"),
        ("exclusive(a=learnt)", "did you mean 'learned'"),
        ("exclusive(a=inf)", "a is"),
    ],
)
def test_what_it_cannot_be_is_refused_with_the_reason(spec, reason):
    with pytest.raises(ValueError, match=reason):
        SHIFTED.attention(spec)
