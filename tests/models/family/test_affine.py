"""A' = alpha I + beta A - gamma U and its special cases."""

import pytest
import torch

from checkpoint import CheckpointError, load_weights
from kernels.window_attention import window_layout
from models.attention import AttentionSpec
from models.attention.modifiers import MODIFIERS
from models.attention.regions import region_means, spread_regions
from tests.models.builders import randomise, small
from tests.models.family.dense import (
    Dense,
    Place,
    cases,
    compare,
    compare_fused_over,
    distance,
    exact,
    lone_cases,
    visible,
)

COEFFICIENTS = {  # (alpha, beta, gamma) of a modifier's parameters
    "affine": lambda m: (m.alpha, m.beta, m.gamma),
    "affine(beta=0.5, learned=gamma)": lambda m: (0, 0.5, m.gamma),
    "affine(gamma=2, learned=['alpha', 'beta'])": lambda m: (m.alpha, m.beta, 2),
    "self_mix": lambda m: (m.g, 1 - m.g, 0),
    "self_mix(init=0.25, squash=sigmoid)": lambda m: (m.p.sigmoid(), 1 - m.p.sigmoid(), 0),
    "shaped": lambda m: (m.alpha, m.beta, m.gamma),
    "value_skipinit": lambda m: (m.alpha, m.beta, 0),
    "attn_scale": lambda m: (0, 1 + m.excess, m.excess),
    "high_pass": lambda m: (0, 1, 1),
}
PARAMETERS = {
    "affine": ["alpha", "beta", "gamma"],
    "affine(learned=none, alpha=1)": [],
    "affine(learned=['beta', 'gamma'])": ["beta", "gamma"],
    "self_mix": ["g"],
    "self_mix(init=0.25, squash=sigmoid)": ["p"],
    "shaped": ["alpha", "beta", "gamma"],
    "value_skipinit": ["alpha", "beta"],
    "attn_scale": ["excess"],
    "high_pass": [],
}
NEUTRAL = ["affine", "self_mix", "shaped", "value_skipinit", "attn_scale"]
SHIFTED = Place("swin", (6, 6), (4, 4), (2, 2))
WITH_CLASS_TOKEN = Place("vit", (3, 4), (3, 4), prefix=1)
PLACES = {
    "affine": [*cases("swin", "vit"), *cases("swinv2")[3:4], *lone_cases("swin")[1:]],
}
every_place = pytest.mark.parametrize("place", [SHIFTED, WITH_CLASS_TOKEN], ids=str)


def formula(spec):
    """alpha v + beta A v - gamma U v over all tokens."""

    def edited(dense):
        values = COEFFICIENTS[spec](dense.modifier(spec.partition("(")[0]))
        alpha, beta, gamma = (
            c[:, None, None] if isinstance(c, torch.Tensor) else c for c in values
        )
        return alpha * dense.v + beta * dense.y - gamma * (dense.U @ dense.v)

    return edited


def fresh(place, spec, dtype=torch.float32):
    """Random weights, and the modifier as it starts."""
    attention = place.attention(spec)
    name = spec.partition("(")[0]
    attention.modifiers[name] = MODIFIERS.create(spec, attention.geometry)
    attention.initialise_modifiers("test")
    return attention.to(dtype)


def call(attention, place, dtype=torch.float32, **options):
    x = place.x(**options).to(dtype)
    return attention(x, place.layout) if place.layout else attention(x)


def own_values(attention, place):
    """proj(v): the result where the map is the identity."""
    dense = Dense(attention, place.x().to(attention.qkv.weight.dtype), place.layout)
    return dense.result(dense.v)


@pytest.mark.parametrize(
    "spec, place",
    [
        pytest.param(spec, place, id=f"{spec}-{place}")
        for spec in COEFFICIENTS
        for place in PLACES.get(spec, [SHIFTED, WITH_CLASS_TOKEN])
    ],
)
def test_it_is_the_formula_over_the_whole_grid(spec, place):
    compare(place.attention(spec), place.x(), place.layout, formula(spec))


def test_the_fused_kernel_is_as_near_to_it_as_plain_operations():
    compare_fused_over(cases("swin"), ["shaped"], formula("shaped"))


@pytest.mark.slow
@pytest.mark.parametrize("spec", [spec for spec in COEFFICIENTS if spec != "high_pass"])
def test_the_fused_kernel_is_as_near_to_each_of_them(spec):
    """Without high_pass, under which v's bias has no effect: its gradient is rounding alone."""
    places = cases("swin", "swinv2") + cases("vit")[:1] + lone_cases()
    compare_fused_over(places, [spec], formula(spec))


@pytest.mark.slow
@pytest.mark.parametrize("place", cases() + lone_cases(), ids=str)
@pytest.mark.parametrize("spec", COEFFICIENTS)
def test_each_of_them_is_the_formula_everywhere(spec, place):
    compare(place.attention(spec), place.x(), place.layout, formula(spec))


@every_place
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("spec", NEUTRAL)
def test_it_starts_as_the_plain_model_to_the_last_bit(spec, autocast, place):
    plain, edited = place.attention(), fresh(place, spec)
    edited.load_state_dict({**edited.state_dict(), **plain.state_dict()})
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        assert torch.equal(call(edited, place), call(plain, place))


@pytest.mark.parametrize("spec", PARAMETERS)
def test_parameters_are_one_number_per_head_and_constants_are_not_saved(spec):
    modifier = MODIFIERS.create(spec, fresh(SHIFTED, spec).geometry)
    shapes = {name: tuple(value.shape) for name, value in modifier.state_dict().items()}
    assert shapes == dict.fromkeys(PARAMETERS[spec], (2,))
    assert [name for name, _ in modifier.named_parameters()] == PARAMETERS[spec]


@every_place
@pytest.mark.parametrize(
    "spec",
    ["affine(alpha=1, beta=0, learned=none)", "self_mix(init=1)", "value_skipinit(preset=paper)"],
)
def test_with_all_weight_on_the_identity_each_token_gets_its_own_value(spec, place):
    attention = fresh(place, spec, torch.float64)
    torch.testing.assert_close(
        call(attention, place, torch.float64), own_values(attention, place), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("place", [SHIFTED, *cases("vit")], ids=str)
def test_shaped_attention_of_the_paper_starts_as_the_identity(place):
    attention = fresh(place, "shaped(preset=paper)", torch.float64)
    assert call(attention, place, torch.float64).sub(own_values(attention, place)).abs().max() < (
        1e-12
    )
    attention.qkv.weight.data[0, 0] = 1.0  # of q
    assert call(attention, place, torch.float64).sub(own_values(attention, place)).abs().max() > (
        1e-3
    )


def test_shaped_attention_of_the_paper_is_refused_where_q_does_not_start_or_learn_from_0():
    with pytest.raises(ValueError, match="SwinV2.*preset=neutral"):
        small("swinv2", attention=AttentionSpec(("shaped(preset=paper)",)))
    for residual in ("qk_residual", "qk_residual(which=q)"):
        with pytest.raises(ValueError, match="qk_residual adds"):
            small("swin", attention=AttentionSpec(("shaped(preset=paper)", residual)))
    small("swin", attention=AttentionSpec(("shaped(preset=paper)", "qk_residual(which=k)")))


def test_shaped_attention_of_the_paper_goes_over_pretrained_weights_with_consent_alone():
    model = small("swin", attention=AttentionSpec(("shaped(preset=paper)",)))
    weights = randomise(small("swin")).state_dict()
    with pytest.raises(CheckpointError, match="shaped sets initial values"):
        load_weights(model, weights)
    load_weights(model, weights, init_over=True)
    attention = model.layers[0].blocks[0].attn
    queries = attention.qkv.weight[:8], attention.qkv.bias[:8]
    assert not any(part.any() for part in (*queries, attention.relative_position_bias_table))
    key = "layers.0.blocks.0.attn.qkv.weight"
    assert torch.equal(attention.qkv.weight[8:], weights[key][8:])
    load_weights(small("swin", attention=AttentionSpec(("shaped",))), weights)


@every_place
def test_high_pass_of_equal_values_is_0(place):
    attention = fresh(place, "high_pass", torch.float64)
    attention.qkv.weight.data[32:] = 0  # v is its bias
    result = call(attention, place, torch.float64)
    torch.testing.assert_close(result, attention.proj.bias.expand_as(result), rtol=0, atol=1e-12)


@pytest.mark.parametrize("spec", ["high_pass", "affine(gamma=1, learned=none)"])
@pytest.mark.parametrize("place", lone_cases("swin"), ids=str)
def test_a_lone_token_has_nothing_but_its_mean(place, spec):
    attention = fresh(place, spec)
    alone = visible(place.grid, place.window, place.shift).sum(1) == 1
    result = call(attention, place).flatten(1, 2)[:, alone]
    torch.testing.assert_close(result, attention.proj.bias.expand_as(result), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "grid, window, shift",
    [
        ((8, 8), (4, 4), (2, 2)),
        ((5, 9), (3, 4), (1, 2)),
        ((8, 3), (4, 3), (2, 0)),
        ((9, 9), (5, 5), (3, 4)),
        ((2, 5), (4, 4), (3, 1)),  # all tokens of an axis come round
        ((8, 8), (7, 7), (3, 3)),
        ((3, 4), (3, 4), (0, 0)),
    ],
    ids=str,
)
def test_the_visible_mean_is_that_over_the_pairs_without_a_mask(grid, window, shift):
    v, layout = torch.randn(2, *grid, 3).double(), window_layout(grid, window, shift)
    seen = visible(grid, window, shift).double()
    means = (seen / seen.sum(1, keepdim=True)) @ v.flatten(1, 2)
    found = spread_regions(region_means(v, layout), layout)
    assert distance(found.flatten(1, 2), means) < 1e-14
    low = spread_regions(region_means(v.bfloat16(), layout), layout)
    assert low.dtype == torch.float32
    assert distance(low, spread_regions(region_means(v.bfloat16().double(), layout), layout)) < 1e-6


def test_the_map_modifiers_of_the_open_path_go_before_it():
    """A hook on the map takes the open path, to the same result."""
    attention, place = exact(SHIFTED.attention("shaped")), SHIFTED
    fused = call(attention, place, torch.float64)
    attention.map_tap.register_forward_hook(lambda *_: None)
    assert attention.is_open()
    assert distance(call(attention, place, torch.float64), fused) < 1e-12


def test_a_hook_on_the_modifier_sees_its_result_and_changes_nothing():
    attention, seen = SHIFTED.attention("attn_scale"), []
    before = call(attention, SHIFTED)
    attention.modifiers["attn_scale"].register_forward_hook(lambda *args: seen.append(args[-1]))
    torch.testing.assert_close(call(attention, SHIFTED), before)
    assert [tuple(y.shape) for y in seen] == [(2, 6, 6, 16)]


@pytest.mark.parametrize(
    "spec, reason",
    [
        ("self_mix(squash=sigmoid)", "init is the share g.*init=0.01"),
        ("self_mix(init=1, squash=sigmoid)", "init is the share g"),
        ("affine(learned=none)", "changes nothing"),
        ("affine(learned=delta)", "learned is 'delta'"),
        ("shaped(preset=papr)", "did you mean 'paper'"),
    ],
)
def test_what_it_cannot_be_is_refused_with_the_reason(spec, reason):
    with pytest.raises(ValueError, match=reason) as refusal:
        SHIFTED.attention(spec)
    assert "\n" not in str(refusal.value)
