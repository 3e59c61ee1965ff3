"""Talking heads: the neutral start, both places of mixing, and the mask that no mixing blends."""

import pytest
import torch

from kernels.window_attention import window_layout
from kernels.window_attention.reference import add_mask, merge_windows, split_windows
from models.attention import AttentionSpec
from models.attention.geometry import Geometry
from models.attention.modifiers import MODIFIERS
from tests.models.builders import WINDOW_FAMILIES, randomise, small

NAME = "talking_heads"
WHERE = ("both", "pre", "post")
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("family", WINDOW_FAMILIES)
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("bias", [False, True])
def test_a_fresh_one_is_the_plain_model(family, where, bias):
    plain = randomise(small(family))
    model = small(family, attention=AttentionSpec((f"{NAME}(where={where}, bias={bias})",)))
    model.load_state_dict({**model.state_dict(), **plain.state_dict()})
    torch.testing.assert_close(model(IMAGES), plain(IMAGES), rtol=0, atol=1e-5)


@pytest.mark.parametrize("where", WHERE)
def test_logits_are_mixed_before_the_mask_and_maps_after_the_softmax(where):
    attention = (
        randomise(small("swin", attention=AttentionSpec((f"{NAME}(where={where}, bias=True)",))))
        .layers[0]
        .blocks[1]
        .attn
    )
    mixing, layout, x = (
        attention.modifiers[NAME],
        window_layout((8, 8), (4, 4), (2, 2)),
        torch.randn(2, 8, 8, 8),
    )
    q, k, v = split_windows(attention.project(x), layout, 2)
    maps = q @ k.mT * attention.scale + attention.terms().dense("bias")
    if where != "post":
        maps = torch.stack(
            [
                sum(mixing.pre.weight[g, h] * maps[:, h] for h in (0, 1)) + mixing.pre.bias[g]
                for g in (0, 1)
            ],
            1,
        )
    maps = add_mask(maps, layout.mask).softmax(-1)
    if where != "pre":
        maps = torch.stack(
            [
                sum(mixing.post.weight[g, h] * maps[:, h] for h in (0, 1)) + mixing.post.bias[g]
                for g in (0, 1)
            ],
            1,
        )
    maps = (maps.unflatten(0, (2, -1)) * (layout.mask == 0)[:, None]).flatten(0, 1)
    torch.testing.assert_close(
        attention(x, layout), attention.proj(merge_windows(maps @ v, layout)), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("where", "matrices"),
    [("both", {"pre.weight", "post.weight"}), ("pre", {"pre.weight"}), ("post", {"post.weight"})],
)
def test_each_place_has_its_own_matrix_of_heads(where, matrices):
    modifier = MODIFIERS.create(f"{NAME}(where={where})", Geometry(12, 3, (4, 4)))
    assert {name: p.shape for name, p in modifier.named_parameters()} == dict.fromkeys(
        matrices, (3, 3)
    )


def test_normal_matrices_are_drawn_for_each_layer_and_place():
    model = small(
        "swin", attention=AttentionSpec((f"{NAME}(init=normal)",)), num_heads=(4, 8), embed_dim=16
    )
    drawn = [p for name, p in model.named_parameters() if NAME in name]
    assert len({p.flatten()[0].item() for p in drawn}) == len(drawn) == 6
    assert torch.cat([p.flatten() for p in drawn]).std().item() == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("where=middle", "allowed are both, pre, post"),
        ("init=zeros", "allowed are identity, normal"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(text, message):
    with pytest.raises(ValueError, match=message):
        MODIFIERS.create(f"{NAME}({text})", Geometry(8, 2, (4, 4)))
