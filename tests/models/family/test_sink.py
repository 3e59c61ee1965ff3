"""Sinks and softmax-1: one more key of logit b without a value."""

import math

import pytest
import torch

from kernels.window_attention import window_layout
from models.attention import AttentionSpec
from models.attention.geometry import Geometry
from models.attention.modifiers.sink import Sink
from tests.models.builders import WINDOW_FAMILIES, randomise, small
from tests.models.family.dense import (
    Dense,
    Place,
    cases,
    compare,
    compare_fused,
    compare_fused_over,
    distance,
    exact,
    in_tiers,
    lone_cases,
)

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
SHIFTED = Place("swin", (6, 6), (4, 4), (2, 2))


def with_sink(dense):
    """The softmax over the keys and the sink, whose column has no value."""
    b = dense.modifier("sink").b.double().view(-1, 1, 1)
    weights = dense.logits.masked_fill(~dense.visible, -math.inf).exp()
    return weights / (b.exp() + weights.sum(-1, keepdim=True)) @ dense.v


@pytest.mark.parametrize("place", in_tiers(cases() + lone_cases()))
def test_rows_share_their_sum_with_the_sink(place):
    compare(place.attention("sink"), place.x(), place.layout, with_sink)


@pytest.mark.parametrize("place", [SHIFTED, *cases("vit")], ids=str)
def test_softmax_1_is_a_sink_of_logit_0(place):
    attention = place.attention("sink(learned=False)")
    assert not list(attention.modifiers.parameters())
    compare(attention, place.x(), place.layout, with_sink)


def test_the_fused_kernel_errs_no_more_than_plain_operations():
    compare_fused_over(
        cases("swin")[::2] + cases("swinv2")[1::2] + cases("vit")[:1], ["sink"], with_sink
    )


@pytest.mark.parametrize("family", [*WINDOW_FAMILIES, "cait"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_far_sink_is_the_plain_model_to_the_last_bit(family, dtype):
    plain = randomise(small(family))
    sunk = small(family, attention=AttentionSpec(("sink(init=-30)",)))
    sunk.load_state_dict({**sunk.state_dict(), **plain.state_dict()})
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        assert torch.equal(sunk(IMAGES), plain(IMAGES))
        near = small(family, attention=AttentionSpec(("sink(init=2)",)))
        near.load_state_dict({**near.state_dict(), **plain.state_dict()})
        assert not torch.equal(near(IMAGES), plain(IMAGES))


@pytest.mark.parametrize("family", WINDOW_FAMILIES)
def test_the_start_is_near_the_plain_model_and_has_a_gradient(family):
    torch.manual_seed(0)
    model = small(family, attention=AttentionSpec(("sink",)))
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.data.fill_(1)  # SwinV2's start at 0
    found = model(IMAGES)
    found.square().sum().backward()
    own = [p for name, p in model.named_parameters() if name.endswith(".b")]
    assert len(own) == 3 and all(p.grad.abs().min() > 0 for p in own)
    for p in own:
        p.data.fill_(-math.inf)
    torch.testing.assert_close(found, model(IMAGES), rtol=1e-4, atol=1e-4)


def test_no_sink_at_all_has_no_gradient_and_no_effect():
    layout, geometry = window_layout((4, 4), (4, 4)), Geometry(8, 2, (4, 4))
    sink, y, lse = Sink(geometry, init=-math.inf), torch.randn(1, 4, 4, 8), torch.randn(1, 4, 4, 2)
    result = sink(y, y, y, layout, lse=lse.requires_grad_())
    assert torch.equal(result, y)
    result.sum().backward()
    assert torch.equal(sink.b.grad, torch.zeros(2)) and torch.equal(lse.grad, torch.zeros_like(lse))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_16_bits_the_product_is_rounded_once(dtype):
    layout, sink = window_layout((4, 4), (4, 4)), Sink(Geometry(8, 2, (4, 4)), init=1.0)
    y, lse = torch.randn(2, 4, 4, 8).to(dtype), torch.randn(2, 4, 4, 2)
    found = sink(y, y, y, layout, lse=lse)
    exact = y.double().unflatten(-1, (2, 4)) * torch.sigmoid(lse.double() - 1)[..., None]
    assert found.dtype == dtype
    assert distance(found, exact.flatten(-2)) <= 0.51 * torch.finfo(dtype).eps


@pytest.mark.parametrize("b", [-10.0, 0.0, 3.0])
@torch.no_grad()
def test_equal_logits_leave_n_over_n_plus_exp_b_of_the_mean(b):
    attention = SHIFTED.attention("sink")
    attention.qkv.weight[:32] = 0
    attention.qkv.bias[:32] = 0
    attention.relative_position_bias_table.zero_()
    attention.modifiers["sink"].b.fill_(b)

    def formula(dense):
        return dense.U @ dense.v / (1 + math.exp(b) / dense.count)

    attention, x = exact(attention), SHIFTED.x().double()
    dense = Dense(attention, x, SHIFTED.layout)
    assert distance(attention(x, SHIFTED.layout), dense.result(formula(dense))) < 1e-10


@pytest.mark.parametrize("other", ["talking_heads", "crpw(apply=probs)", "refiner(reduce=True)"])
def test_the_factor_follows_what_modifiers_make_of_logits_and_map(other):
    seen = []
    plain, sunk = (SHIFTED.attention(other, *more) for more in ((), ("sink(init=1)",)))
    sunk.load_state_dict({**sunk.state_dict(), **plain.state_dict()})
    torch.nn.init.ones_(sunk.modifiers["sink"].b.detach())
    for attention in (plain, sunk):
        attention.proj = torch.nn.Identity()
    plain.logit_tap.register_forward_hook(lambda module, args, logits: seen.append(logits))
    x, layout = SHIFTED.x(), SHIFTED.layout
    y = plain(x, layout).unflatten(-1, (2, 8))
    found = sunk(x, layout).unflatten(-1, (2, 8))
    kept = seen[0].exp().sum(-1) / (math.e + seen[0].exp().sum(-1))  # (B*nW, heads, N)
    kept = kept.transpose(1, 2).unflatten(0, (2, -1)).flatten(1, 2)[:, layout.tokens.argsort()]
    kept = kept.view(2, *layout.padded, 2)[:, :6, :6]
    torch.testing.assert_close(found, y * kept[..., None])


@torch.no_grad()
def test_beside_a_masked_diagonal_a_lone_token_gives_all_to_the_sink():
    place = lone_cases("swin")[0]
    attention = place.attention("self_mask(temperature=False)", "sink")
    attention.proj = torch.nn.Identity()
    y = attention(place.x(), place.layout)
    lone = Dense(exact(attention), place.x().double(), place.layout).count.view(8, 8) == 1
    assert lone.sum() == 1 and not y[:, lone].any() and y[:, ~lone].all()


def test_the_start_is_near_plain_or_noise_of_its_own():
    def sinks(text, family="swin"):
        torch.manual_seed(0)
        model = small(family, attention=AttentionSpec((text,)))
        return [p for name, p in model.named_parameters() if name.endswith(".b")], model

    near, plain = sinks("sink")
    noisy, other = sinks("sink(init=0, std=0.02)")
    assert all((b == -10).all() for b in near) and len(near) == 3
    assert all((b == 0).all() for b in sinks("sink", "swinv2")[0])
    assert all((b == -10).all() for b in sinks("sink(init=-10)", "swinv2")[0])
    values = torch.cat(noisy)
    assert 0 < values.abs().max() < 0.1 and len(set(values.tolist())) == len(values)
    for name, value in plain.state_dict().items():
        assert name.endswith(".b") or torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize("options", ["std=-1", "learned=False, std=0.02"])
def test_what_cannot_be_is_refused(options):
    with pytest.raises(ValueError, match="sink"):
        small("swin", attention=AttentionSpec((f"sink({options})",)))


@pytest.mark.parametrize("order", [("self_mix", "sink"), ("sink", "self_mix")], ids="+".join)
def test_edits_apply_in_the_order_in_which_they_are_listed(order):
    def formula(dense):
        g = dense.modifier("self_mix").g.view(-1, 1, 1)
        if order[0] == "sink":
            return (1 - g) * with_sink(dense) + g * dense.v
        kept = torch.sigmoid(dense.lse - dense.modifier("sink").b[:, None])[..., None]
        return ((1 - g) * dense.y + g * dense.v) * kept

    compare(SHIFTED.attention(*order), SHIFTED.x(), SHIFTED.layout, formula)
    compare_fused(SHIFTED.attention(*order), SHIFTED.x(), SHIFTED.layout, formula)
