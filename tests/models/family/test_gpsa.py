"""Gated positional self-attention: a second map, of positions alone."""

import math

import pytest
import torch

from checkpoint import CheckpointError
from checkpoint.initial import check_initial
from kernels.window_attention import window_layout
from models.attention import AttentionSpec, Geometry, WindowAttention, softmax
from models.attention.modifiers import MODIFIERS
from models.counting import count_macs
from tests.models.builders import WINDOW_FAMILIES, randomise, small
from tests.models.family.dense import (
    Dense,
    Place,
    cases,
    compare,
    compare_fused_over,
    exact,
    in_tiers,
    lone_cases,
)

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
PLACES = [place for place in cases() + lone_cases("swin") if not place.prefix]
SHIFTED = Place("swin", (6, 6), (4, 4), (2, 2))


def positional(dense):
    """softmax(p), from the offsets of the key."""
    w = dense.modifier("gpsa").w[:, :, None, None]
    dy, dx = (-dense.offset).to(w.dtype).unbind(-1)
    return dense.softmax(w[:, 0] * dx + w[:, 1] * dy + w[:, 2] * (dx**2 + dy**2))


def mixed(dense):
    """The sum of both maps, times v."""
    g = torch.sigmoid(dense.modifier("gpsa").l)[:, None, None]
    return ((1 - g) * dense.A + g * positional(dense)) @ dense.v


def only_positions(place, heads=4, locality=1.0):
    """Attention whose gates are open for the positions alone, as it starts."""
    attention = place.attention(f"gpsa(locality={locality}, init=40)", dim=4 * heads, heads=heads)
    gpsa = attention.modifiers["gpsa"]
    gpsa.initialise(attention)
    torch.nn.init.constant_(gpsa.l.detach(), 40.0)
    return exact(attention)


@pytest.mark.parametrize("place", in_tiers(PLACES))
def test_two_maps_each_over_the_visible_keys_are_mixed(place):
    compare(place.attention("gpsa"), place.x(), place.layout, mixed)


def test_the_fused_kernel_errs_no_more_than_plain_operations():
    compare_fused_over(PLACES[:-3:2], ["gpsa"], mixed)


@pytest.mark.parametrize("place", [SHIFTED, cases("vit")[0]], ids=str)
def test_with_all_centres_at_0_and_a_narrow_look_it_mixes_in_the_own_value(place):
    attention = place.attention("gpsa")
    with torch.no_grad():
        attention.modifiers["gpsa"].w.copy_(torch.tensor([0.0, 0.0, -800.0]))

    def self_mix(dense):
        g = torch.sigmoid(dense.modifier("gpsa").l)[:, None, None]
        return (1 - g) * dense.y + g * dense.v + 0 * dense.modifier("gpsa").w.sum()

    compare(attention, place.x(), place.layout, self_mix)


def test_each_of_nine_heads_starts_at_the_key_at_its_own_offset_from_the_query():
    place = Place("vit", (5, 7), (5, 7))
    attention = only_positions(place, heads=9, locality=40.0)
    attention.proj = torch.nn.Identity()
    x = place.x(dim=36).double()
    v = Dense(attention, x).v.unflatten(2, (5, 7))  # (B, heads, rows, columns, D)
    y = attention(x).unflatten(-1, (9, 4)).transpose(1, 2).unflatten(2, (5, 7))
    offsets = [(dy, dx) for dx in (-1, 0, 1) for dy in (-1, 0, 1)]
    for head, (dy, dx) in enumerate(offsets):
        at = slice(1, 4), slice(1, 6)  # queries whose neighbours are all there
        key = slice(1 + dy, 4 + dy), slice(1 + dx, 6 + dx)
        found, own = y[:, head][(slice(None), *at)], v[:, head][(slice(None), *key)]
        torch.testing.assert_close(found, own, rtol=0, atol=1e-9)


def test_other_heads_than_a_square_number_start_at_random_and_differ_from_layer_to_layer():
    torch.manual_seed(0)
    model = small("swin", num_heads=(2, 8), attention=AttentionSpec(("gpsa(locality=2)",)))
    first, second, third = (p for name, p in model.named_parameters() if name.endswith("gpsa.w"))
    assert torch.equal(first[0], torch.tensor([0.0, 0.0, -2.0])) and first[1].abs().max() < 0.4
    assert not torch.equal(first[1], second[1])
    grid = [[2.0 * mx, 2.0 * my, -2.0] for mx in (-1, 1) for my in (-1, 1)]
    assert third[:4].tolist() == grid and third[4:].abs().max() < 0.4


@pytest.mark.parametrize("locality", [1.0, 400.0])
def test_no_strength_reaches_a_forbidden_key(locality):
    attention, x = only_positions(SHIFTED, locality=locality), SHIFTED.x(1, 16).double()
    x.requires_grad_()
    seen = Dense(attention, x, SHIFTED.layout).visible
    output = attention(x, SHIFTED.layout).flatten(0, 2)
    for query in (0, 13, 35):
        (reached,) = torch.autograd.grad(output[query].sum(), x, retain_graph=True)
        assert not reached.flatten(0, 2)[~seen[query]].any()
        assert reached.any()


@pytest.mark.parametrize("family", [*WINDOW_FAMILIES, "cait"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_closed_gates_are_the_plain_model_to_the_last_bit(family, dtype):
    plain = randomise(small(family))
    gated = small(family, attention=AttentionSpec(("gpsa(init=-200)",)))
    gated.load_state_dict({**gated.state_dict(), **plain.state_dict()})
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        assert torch.equal(gated(IMAGES), plain(IMAGES))
        for name, parameter in gated.named_parameters():
            parameter.data.fill_(0) if name.endswith("gpsa.l") else None
        assert not torch.equal(gated(IMAGES), plain(IMAGES))


def test_the_value_projection_starts_at_the_identity_where_asked():
    def network(*modifiers):
        torch.manual_seed(0)
        return small("swin", attention=AttentionSpec(modifiers))

    plain, kept, own = network(), network("gpsa"), network("gpsa(value=identity)")
    for name, value in plain.state_dict().items():
        assert torch.equal(kept.state_dict()[name], value), name
        changed = own.state_dict()[name]
        if name.endswith("qkv.weight"):
            rows = len(value) // 3
            assert torch.equal(changed[2 * rows :], torch.eye(rows))
            changed, value = changed[: 2 * rows], value[: 2 * rows]
        assert torch.equal(changed, value), name
    blocks = [block.attn for layer in own.layers for block in layer.blocks]
    assert all(block.overwriting == ["gpsa"] for block in blocks)
    with pytest.raises(CheckpointError, match="gpsa sets initial values"):
        check_initial(own, False, "pretrained weights")
    assert not any(b.attn.overwriting for layer in kept.layers for b in layer.blocks)


def test_the_gate_is_free_of_weight_decay_and_the_look_is_not():
    model = small("swin", attention=AttentionSpec(("gpsa",)))
    shapes = {n: p.dim() for n, p in model.named_parameters() if ".gpsa." in n}
    assert {name.rpartition(".")[2]: dim for name, dim in shapes.items()} == {"l": 1, "w": 2}
    assert not set(shapes) & model.no_weight_decay()


def test_the_second_call_has_the_dropout_and_the_backend_of_the_first(monkeypatch):
    calls = []

    def spy(qkv, terms, layout, heads, cosine, dropout, backend, **asked):
        calls.append((dropout, backend, layout.shift))
        return call(qkv, terms, layout, heads, cosine, dropout, backend, **asked)

    call = softmax.window_attention
    monkeypatch.setattr(softmax, "window_attention", spy)
    spec = AttentionSpec(("gpsa",), drop=0.25, backend="reference")
    attention = WindowAttention(Geometry(8, 2, (4, 4)), spec)
    attention(torch.randn(1, 8, 8, 8), window_layout((8, 8), (4, 4), (2, 2)))
    assert calls == [(0.25, "reference", (2, 2))] * 2


def test_its_two_products_are_counted():
    plain, gated = (small("swin", attention=AttentionSpec(m)) for m in ((), ("gpsa",)))
    products = 2 * (2 * 64 * 16 * 8 + 16 * 16 * 16)  # tokens * keys * channels of each block
    assert gated.flops() - plain.flops() == products
    assert (count_macs(gated, IMAGES) - count_macs(plain, IMAGES)).attention == products


@pytest.mark.parametrize("family", ["vit", "pit", "refined_vit"])
def test_class_tokens_are_refused_with_the_way_out(family):
    changes = {"share_every": 1} if family == "refined_vit" else {}
    with pytest.raises(ValueError, match=r"class token.*CLASS_TOKEN False"):
        small(family, attention=AttentionSpec(("gpsa",)), **changes)


@pytest.mark.parametrize("options", ["locality=0", "locality=-1", "value=eye"])
def test_numbers_and_words_that_cannot_be_are_refused(options):
    with pytest.raises(ValueError, match="gpsa"):
        MODIFIERS.create(f"gpsa({options})", Geometry(8, 2, (4, 4)))


def test_an_identity_between_unequal_widths_is_refused():
    with pytest.raises(ValueError, match="24 channels, x has 8; take value=keep"):
        MODIFIERS.create("gpsa(value=identity)", Geometry(8, 2, (4, 4), head_dim=12))


def test_one_token_to_a_window_gives_the_own_value():
    attention = WindowAttention(Geometry(8, 2, (1, 1)), AttentionSpec(("gpsa",)))
    plain = WindowAttention(Geometry(8, 2, (1, 1)), AttentionSpec())
    plain.load_state_dict(attention.state_dict(), strict=False)
    x, layout = torch.randn(1, 3, 3, 8), window_layout((3, 3), (1, 1))
    torch.testing.assert_close(attention(x, layout), plain(x, layout))
    assert math.prod(attention.modifiers["gpsa"].offsets.shape) == 3
