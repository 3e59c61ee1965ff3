"""The free mask: its size, its neutral values, and its company with modifiers that are tables over
offsets.
"""

import pytest
import torch

from kernels.window_attention import OffsetTerms, window_attention, window_layout
from models.attention import AttentionSpec
from models.attention.geometry import Geometry
from models.attention.modifiers import MODIFIERS
from tests.models.builders import WINDOW_FAMILIES, randomise, small

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
both_families = pytest.mark.parametrize("family", WINDOW_FAMILIES)


def with_modifiers(family, *modifiers):
    return small(family, attention=AttentionSpec(modifiers))


def test_64_tokens_have_4096_numbers_whatever_the_heads():
    for heads in (1, 4):
        modifier = MODIFIERS.create("elementwise_mask", Geometry(16, heads, (8, 8)))
        assert sum(p.numel() for p in modifier.parameters()) == 4096


@both_families
def test_ones_are_the_plain_model_and_zeros_leave_the_bias_alone(family):
    plain = randomise(small(family))
    model = with_modifiers(family, "elementwise_mask(init=ones)")
    model.load_state_dict({**model.state_dict(), **plain.state_dict()})
    torch.testing.assert_close(model(IMAGES), plain(IMAGES), rtol=0, atol=1e-5)
    attention = with_modifiers(family, "elementwise_mask").layers[0].blocks[0].attn
    assert not attention.terms().dense("scale").any()


def test_without_a_bias_zeros_are_uniform_attention():
    attention = with_modifiers("swin", "elementwise_mask").layers[0].blocks[0].attn
    torch.nn.init.zeros_(attention.relative_position_bias_table)
    maps = []
    attention.map_tap.register_forward_hook(lambda _module, _inputs, attn: maps.append(attn))
    attention(torch.randn(1, 8, 8, 8), window_layout((8, 8), (4, 4)))
    torch.testing.assert_close(maps[0], torch.full_like(maps[0], 1 / 16))


@pytest.mark.parametrize(
    "crpw",
    [
        f"crpw(source=table, {options})"
        for options in ("mode=add_to_scale", "mode=one_plus", "mode=sigmoid16", "apply=probs")
    ],
)
def test_a_table_of_offsets_joins_it_in_the_order_of_the_config(crpw):
    for order in (("elementwise_mask", crpw), (crpw, "elementwise_mask")):
        attention = randomise(with_modifiers("swin", *order)).layers[0].blocks[0].attn
        mask, table = (
            attention.modifiers["elementwise_mask"].mask,
            attention.modifiers["crpw"].table,
        )
        w = table[attention.relative_position_index].permute(2, 0, 1)  # (heads, N, N)
        steps = {"mask": lambda scale, mask=mask: scale * mask}
        steps["crpw"] = {
            "add_to_scale": lambda scale, w=w: scale + w,
            "one_plus": lambda scale, w=w: scale * (1 + w),
            "sigmoid16": lambda scale, w=w: scale + 16 * torch.sigmoid(w),
            "probs": lambda scale: scale,
        }[crpw.rpartition("=")[2].strip(")")]
        expected = torch.full((2, 16, 16), attention.scale)
        for name in order:
            expected = steps["mask" if name == "elementwise_mask" else "crpw"](expected)
        terms = attention.terms()
        torch.testing.assert_close(terms.dense("scale").expand(2, 16, 16), expected)
        if "probs" in crpw:
            torch.testing.assert_close(terms.dense("post"), 1 + w)


@pytest.mark.parametrize(
    "first", ["elementwise_mask", "crpw(source=table)", "gaussian_mixture_mask"]
)
def test_class_tokens_keep_the_scale_alone(first):
    geometry = Geometry(8, 2, (3, 3), prefix=1)
    texts = sorted(
        {"elementwise_mask", "crpw(source=table)", "gaussian_mixture_mask"},
        key=lambda text: text != first,
    )
    terms = OffsetTerms((3, 3), torch.full((1, 2), 0.25), torch.randn(25, 2), prefix=1)
    for text in texts:
        terms = randomise(MODIFIERS.create(text, geometry))(terms)
    scale = terms.dense("scale")
    assert scale.shape == (2, 10, 10)
    assert (scale[:, 0] == 0.25).all()
    assert (scale[:, :, 0] == 0.25).all()
    assert (scale[:, 1:, 1:] != 0.25).all()


@both_families
def test_fast_and_open_paths_agree(family):
    model = randomise(with_modifiers(family, "elementwise_mask", "crpw", "gaussian_mixture_mask"))
    fast = model(IMAGES)
    for layer in model.layers:
        for block in layer.blocks:
            block.attn.map_tap.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(model(IMAGES), fast, rtol=1e-4, atol=1e-5)


def test_sdpa_refuses_a_dense_weight_even_of_one_head():
    terms = OffsetTerms((2, 2), torch.rand(1, 4, 4))
    with pytest.raises(ValueError, match="use backend 'eager'"):
        window_attention(
            torch.randn(1, 2, 2, 12), terms, window_layout((2, 2), (2, 2)), 1, backend="sdpa"
        )


def test_another_start_is_refused():
    with pytest.raises(ValueError, match="allowed are zeros, ones"):
        MODIFIERS.create("elementwise_mask(init=random)", Geometry(8, 2, (4, 4)))
