"""T2T-ViT: exact sizes, the soft splits, what the released code does otherwise, vectors of the
original.
"""

import pytest
import torch

from models import T2TViT
from models.attention import AttentionSpec, GlobalAttention
from models.t2t import SkipAttention, sinusoid, soft_split
from tests.models.builders import randomise, size, small
from tests.models.originals import MASK, assert_same_as_original, renamed, trained

GMM = "gaussian_mixture_mask"
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("options", "parameters", "mask"),
    [
        (dict(num_classes=10), 6_486_080, 490),
        (dict(num_classes=100), 6_509_210, 490),
        (dict(num_classes=200, img_size=64, token_transformers=2), 6_659_262, 500),
    ],
)
def test_the_paper_s_t2t_has_its_exact_size(options, parameters, mask):
    assert size(T2TViT, **options, preset="release") == parameters
    assert (
        size(T2TViT, **options, preset="release", attention=AttentionSpec((GMM,)))
        == parameters + mask
    )
    assert size(T2TViT, **options) == parameters - 256 - 1152  # without what nothing uses


def test_a_soft_split_joins_the_neighbourhoods_of_every_second_place():
    x = torch.randn(1, 2, 6, 8)
    tokens = soft_split(x)
    assert tokens.shape == (1, 3 * 4, 9 * 2)
    patch = x[0, :, 1:4, 3:6]  # around (2, 4), the token in row 1, column 2
    torch.testing.assert_close(tokens[0, 1 * 4 + 2], patch.flatten())


def test_positions_are_a_frozen_sinusoid():
    positions = sinusoid(5, 6)[0]
    assert positions[3, 2].item() == pytest.approx(torch.tensor(3 / 10000 ** (2 / 6)).sin().item())
    assert positions[3, 3].item() == pytest.approx(torch.tensor(3 / 10000 ** (2 / 6)).cos().item())
    model = small("t2t")
    assert "pos_embed" not in model.state_dict()
    assert not any("pos_embed" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("skip", ["none", "value", "input"])
def test_the_skip_adds_v_or_the_input_behind_the_projection(skip):
    geometry = small("t2t").blocks[0].attn.geometry
    plain, skipping = (
        GlobalAttention(geometry, AttentionSpec(), qkv_bias=False),
        SkipAttention(geometry, AttentionSpec(), skip=skip),
    )
    randomise(plain)
    skipping.load_state_dict(plain.state_dict())
    x = torch.randn(2, 16, 8)
    added = {"none": 0, "value": plain.qkv(x)[..., 16:], "input": x}[skip]
    torch.testing.assert_close(skipping(x), plain(x) + added)


def test_what_nothing_uses_is_frozen_and_exists_in_the_release_alone():
    frozen = {
        name
        for name, parameter in small("t2t", preset="release").named_parameters()
        if not parameter.requires_grad
    }
    assert frozen == {"cls_token", "patch_embed.norm.weight", "patch_embed.norm.bias"}
    assert all(parameter.requires_grad for parameter in small("t2t").parameters())


def test_masks_reach_the_token_transformers_on_their_own_grids():
    model = small("t2t", img_size=32, token_transformers=2, attention=AttentionSpec((GMM,)))
    first, second = model.patch_embed.attention1.attn, model.patch_embed.attention2.attn
    assert (
        first.geometry.window,
        second.geometry.window,
        model.blocks[0].attn.geometry.window,
    ) == ((16, 16), (8, 8), (4, 4))
    assert first.modifiers[GMM].alpha.shape == (5, 1)
    spared = small("t2t", modified="blocks", attention=AttentionSpec((GMM,)))
    assert not spared.patch_embed.attention1.attn.modifiers
    assert all(GMM in block.attn.modifiers for block in spared.blocks)


@pytest.mark.parametrize("name", ["qk_residual", "init_identity"])
def test_what_needs_q_as_wide_as_x_is_refused_for_the_token_transformers_and_fits_the_blocks(name):
    with pytest.raises(ValueError, match="27 channels, q and k have 8 .*MODEL.T2T.MODIFIED blocks"):
        small("t2t", attention=AttentionSpec((name,)))
    assert small("t2t", modified="blocks", attention=AttentionSpec((name,)))(IMAGES).shape == (
        2,
        10,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(preset="original"), "allowed are paper, release"),
        (dict(modified="none"), "allowed are all, blocks"),
        (
            dict(attention=AttentionSpec(mixer="separable")),
            "set MODEL.ATTENTION.MIXER softmax, or take MODEL.TYPE vit",
        ),
        (
            dict(modified="blocks", attention=AttentionSpec(mixer="separable")),
            "take MODEL.TYPE vit",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(options, message):
    with pytest.raises(ValueError, match=message):
        small("t2t", **options)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match="the model was built for 16x16; set DATA.IMG_SIZE"):
        small("t2t")(torch.randn(1, 3, 20, 16))


# ---- vectors of the original

KEYS = {"tokens_to_token": "patch_embed", ".attn.mask.": f".attn.{MASK}"}


def convert(state):
    return {
        renamed(key, KEYS): value.flatten(1) if ".mask." in key else value
        for key, value in state.items()
    }


@pytest.mark.parametrize(
    ("name", "modifiers"),
    [("gmm_t2t", (GMM,)), ("gmm_t2t", (f"{GMM}(legacy_pow=True)",)), ("gmm_t2t_plain", ())],
)
def test_the_original_gives_the_same_logits_and_gradients(name, modifiers):
    config = trained(name, "state_dict")[0]["config"]
    model = T2TViT(
        config["img_size"],
        num_classes=config["num_classes"],
        embed_dim=config["embed_dim"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        mlp_ratio=config["mlp_ratio"],
        token_dim=config["token_dim"],
        preset="release",
        attention=AttentionSpec(modifiers),
    )
    features = {f"blocks.{block}.attn": f"blocks.{block}.attn" for block in range(config["depth"])}
    features |= {
        "patch_embed.attention1": "tokens_to_token.attention1",
        "patch_embed.attention1.attn": "tokens_to_token.attention1.attn",
    }
    assert_same_as_original(name, model, convert, features)
