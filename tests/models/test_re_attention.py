"""Re-attention: what it does to maps, and vectors of the original."""

import pytest
import torch
import torch.nn.functional as F

from kernels.window_attention import window_layout
from models.attention import AttentionSpec
from models.attention.geometry import Geometry
from models.attention.modifiers import MODIFIERS
from tests.helpers import golden, subtree
from tests.models.builders import randomise, small

NAME = "re_attention"


def relative(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)).item()


def test_it_mixes_and_normalises_the_maps_of_the_heads():
    modifier = randomise(
        MODIFIERS.create(f"{NAME}(bias=True, scale=True)", Geometry(12, 3, (2, 3)))
    )
    maps = torch.rand(4, 3, 6, 6).softmax(-1)
    mixed = torch.einsum("gh,bhij->bgij", modifier.weight, maps) + modifier.bias[:, None, None]
    mean, variance = mixed.mean((0, 2, 3)), mixed.var((0, 2, 3), unbiased=False)
    expected = (mixed - mean[:, None, None]) / (variance + 1e-5).sqrt()[:, None, None]
    expected = (
        expected * modifier.norm.weight[:, None, None] + modifier.norm.bias[:, None, None]
    ) / 2  # head_dim 4
    torch.testing.assert_close(modifier(maps), expected, rtol=1e-4, atol=1e-5)


def test_without_a_change_by_mixing_and_statistics_it_is_the_identity():
    modifier = MODIFIERS.create(NAME, Geometry(12, 3, (2, 3))).eval()
    modifier.norm.eps = 0.0
    maps = torch.rand(4, 3, 6, 6).softmax(-1)
    torch.testing.assert_close(modifier(maps), maps, rtol=0, atol=1e-6)


def test_masked_pairs_are_zero_although_the_norm_shifts_everything():
    attention = randomise(small("swin", attention=AttentionSpec((NAME,)))).layers[0].blocks[1].attn
    layout, maps = window_layout((8, 8), (4, 4), (2, 2)), []
    attention.map_tap.register_forward_hook(lambda _module, _inputs, attn: maps.append(attn))
    attention(torch.randn(3, 8, 8, 8), layout)
    forbidden = (layout.mask != 0)[None, :, None].expand(3, -1, 2, -1, -1).flatten(0, 1)
    assert not maps[0][forbidden].any()
    assert (maps[0][~forbidden] != 0).all()


def test_uniform_weights_are_drawn_within_the_fan_in():
    model = small(
        "swin", attention=AttentionSpec((f"{NAME}(init=uniform)",)), num_heads=(4, 8), embed_dim=16
    )
    weights = [
        block.attn.modifiers[NAME].weight for layer in model.layers for block in layer.blocks
    ]
    assert not torch.equal(weights[0], weights[1])
    assert all(0.5 * len(w) ** -0.5 < w.abs().max() <= len(w) ** -0.5 for w in weights)
    with pytest.raises(ValueError, match="allowed are identity, uniform"):
        small("swin", attention=AttentionSpec((f"{NAME}(init=normal)",)))


@pytest.mark.parametrize("name", ["deepvit_reattention", "deepvit_reattention_train"])
def test_maps_outputs_and_gradients_are_the_original_s(name):
    meta, tensors = golden(name)
    options, state = meta["config"], subtree(tensors, "state_dict")
    heads, dim = options["num_heads"], options["dim"]
    modifier = MODIFIERS.create(
        f"{NAME}(bias=True, scale={options['transform_scale']})", Geometry(dim, heads, (1, 1))
    )
    names = {
        "weight": "reatten_matrix.weight",
        "bias": "reatten_matrix.bias",
        **{f"norm.{key}": f"var_norm.{key}" for key in modifier.norm.state_dict()},
    }
    modifier.load_state_dict(
        {
            ours: state[theirs].view(modifier.state_dict()[ours].shape)
            for ours, theirs in names.items()
        }
    )
    modifier.train(meta["mode"] == "train")

    x = tensors["input"].clone().requires_grad_()
    q, k, v = (
        F.linear(x, state["qkv.weight"], state["qkv.bias"])
        .unflatten(-1, (3, heads, -1))
        .permute(2, 0, 3, 1, 4)
    )
    attn = modifier((q @ k.mT * (dim // heads) ** -0.5).softmax(-1))
    output = F.linear(
        (attn @ v).transpose(1, 2).flatten(2), state["proj.weight"], state["proj.bias"]
    )
    (output * tensors["loss_weight"]).sum().backward()
    assert relative(attn, tensors["map"]) <= 1e-5
    assert (output - tensors["output"]).abs().max() <= 1e-5 * tensors["output"].abs().max().clamp(
        min=1
    )
    assert relative(x.grad, tensors["input_grad"]) <= 2e-5
    for key, parameter in modifier.named_parameters():
        if names[key] not in meta["zero_gradients"]:
            assert (
                relative(parameter.grad, tensors[f"grad/{names[key]}"].view(parameter.shape))
                <= 5e-5
            ), key
    for key, value in subtree(tensors, "after").items():
        torch.testing.assert_close(
            modifier.norm.state_dict()[key.removeprefix("var_norm.")], value, rtol=1e-5, atol=1e-5
        )
