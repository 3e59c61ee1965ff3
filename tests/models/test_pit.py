"""PiT: exact sizes, timm's weights, pooling, masks on the grid of each stage, vectors of the
original.
"""

import pytest
import timm
import torch

from models import PiT
from models.attention import AttentionSpec
from models.pit import TokenPooling
from tests.models.builders import size, small
from tests.models.originals import MASK, assert_same_as_original, renamed, trained

GMM = "gaussian_mixture_mask"
SMALL_FORM = dict(qkv_bias=False, pointwise=True, class_position=True, norm_eps=1e-5)
PAPER = dict(
    SMALL_FORM,
    img_size=32,
    patch_size=2,
    embed_dim=96,
    depths=(2, 6, 4),
    num_heads=(2, 4, 8),
    head_dim=48,
    mlp_ratio=2.0,
)


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        (dict(num_classes=10), 6_972_586),
        (dict(num_classes=100), 7_007_236),
        (dict(num_classes=200, img_size=64, patch_size=4), 7_049_192),
    ],
)
def test_the_paper_s_pit_has_its_exact_size(options, parameters):
    assert size(PiT, **{**PAPER, **options}) == parameters
    assert size(PiT, **{**PAPER, **options}, attention=AttentionSpec((GMM,))) == parameters + 600


@pytest.mark.parametrize(
    "name", ["pit_ti_224", "pit_xs_224", "pit_s_224", "pit_b_224", "pit_xs_distilled_224"]
)
def test_timm_s_weights_load_under_the_same_keys_and_give_the_same_logits(name):
    theirs = timm.create_model(name, img_size=48, num_classes=7, depth=(1, 2, 1)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    embed = theirs.patch_embed.conv
    ours = PiT(
        48,
        embed.kernel_size[0],
        num_classes=7,
        embed_dim=embed.out_channels,
        depths=[len(s.blocks) for s in theirs.transformers],
        num_heads=theirs.heads,
        stride=embed.stride[0],
        distilled="distilled" in name,
    ).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)


def test_the_grid_halves_from_stage_to_stage_rounding_up():
    model = PiT((20, 28), 4, embed_dim=8, depths=(1, 1, 1), num_heads=(1, 2, 4), num_classes=3)
    assert [stage.blocks[0].attn.geometry.window for stage in model.transformers] == [
        (5, 7),
        (3, 4),
        (2, 2),
    ]
    assert model(torch.randn(1, 3, 20, 28)).shape == (1, 3)


def test_pooling_moves_class_tokens_by_the_linear_layer_and_patches_by_the_convolution_alone():
    pooling = TokenPooling(4, 8, (4, 6), 1, pointwise=True)
    x, other = torch.randn(2, 25, 4), torch.randn(2, 1, 4)
    changed = torch.cat([other, x[:, 1:]], dim=1)
    torch.testing.assert_close(pooling(x)[:, 1:], pooling(changed)[:, 1:], rtol=0, atol=0)
    torch.testing.assert_close(pooling(changed)[:, :1], pooling.fc(other))
    assert pooling(x).shape == (2, 1 + 2 * 3, 8)


def test_masks_are_on_the_grid_of_their_stage_and_leave_the_class_token_alone():
    model = small("pit", attention=AttentionSpec((GMM,)))
    for stage, side in zip(model.transformers, (4, 2), strict=True):
        scale = stage.blocks[0].attn.terms().dense("scale")
        heads, count_ = stage.blocks[0].attn.num_heads, side**2 + 1
        expected = torch.tensor(4**-0.5)
        assert scale.shape == (heads, count_, count_)
        assert scale[:, 0].allclose(expected)
        assert scale[:, :, 0].allclose(expected)


def test_two_heads_are_averaged_and_the_second_reads_its_own_token():
    model = small("pit", distilled=True)
    first, second = model.forward_heads(torch.randn(2, 3, 16, 16))
    assert not torch.equal(first, second)
    assert small("pit", distilled=True, num_classes=0)(torch.randn(2, 3, 16, 16)).shape == (2, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(depths=(1, 1, 1)), "one entry per stage"),
        (dict(patch_size=17), "smaller than one patch"),
        (
            dict(attention=AttentionSpec(("qk_residual",)), head_dim=5),
            "x can be added to q and k only where both agree",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(options, message):
    with pytest.raises(ValueError, match=message):
        small("pit", **options)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match="the model was built for 16x16; set DATA.IMG_SIZE"):
        small("pit")(torch.randn(1, 3, 20, 16))


# ---- vectors of the original

KEYS = {
    "to_patch_embedding.0": "patch_embed.conv",
    ".0.fn.to_qkv": ".attn.qkv",
    ".0.fn.to_out.0": ".attn.proj",
    ".0.norm.": ".norm1.",
    ".1.norm.": ".norm2.",
    ".1.fn.net.0": ".mlp.fc1",
    ".1.fn.net.3": ".mlp.fc2",
    ".0.fn.mask.": f".attn.{MASK}",
    ".cls_ff": ".fc",
    ".downsample.net.0": ".conv",
    ".downsample.net.1": ".proj",
    "mlp_head.0": "norm",
    "mlp_head.1": "head",
}


def convert(state):
    """Stages and poolings alternate in the original; the position of the class token is the first
    of all positions.
    """
    result = {}
    for key, value in state.items():
        if key.startswith("layers."):
            _, number, rest = key.split(".", 2)
            stage = (int(number) + 1) // 2
            key = f"transformers.{stage}." + (
                f"pool.{rest}" if int(number) % 2 else rest.replace("layers.", "blocks.", 1)
            )
            key = renamed(key.replace("pool.cls_ff", "pool.fc"), KEYS)
        elif key == "pos_embedding":
            side = round((value.shape[1] - 1) ** 0.5)
            result["cls_pos"], result["pos_embed"] = (
                value[:, :1],
                value[:, 1:].transpose(1, 2).unflatten(2, (side, side)),
            )
            continue
        result[renamed(key, KEYS)] = value.flatten(1) if MASK in key else value
    return result


@pytest.mark.parametrize(("name", "modifiers"), [("gmm_pit", (GMM,)), ("gmm_pit_plain", ())])
def test_the_original_gives_the_same_logits_and_gradients(name, modifiers):
    config = trained(name, "state_dict")[0]["config"]
    model = PiT(
        config["img_size"],
        config["patch_size"],
        num_classes=config["num_classes"],
        embed_dim=config["dim"],
        depths=config["depth"],
        num_heads=config["heads"],
        head_dim=config["dim_head"],
        mlp_ratio=config["mlp_dim_ratio"],
        **SMALL_FORM,
        attention=AttentionSpec(modifiers),
    )
    features = {
        f"transformers.{stage}.blocks.{block}.attn": f"layers.{2 * stage}.layers.{block}.0.fn"
        for stage, depth in enumerate(config["depth"])
        for block in range(depth)
    }
    assert_same_as_original(name, model, convert, features)
