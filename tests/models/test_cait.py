"""CaiT: exact sizes, timm's weights, talking heads among the modifiers, the two kinds of class
attention, vectors of the original.
"""

import pytest
import timm
import torch

from models import CaiT
from models.attention import AttentionSpec
from tests.models.builders import EVERYWHERE, randomise, size, small
from tests.models.originals import MASK, assert_same_as_original, patches, renamed, trained

GMM = "gaussian_mixture_mask"
SMALL_FORM = dict(
    qkv_bias=False,
    mixing="normal",
    mixing_bias=False,
    class_context="patches",
    class_mixing=True,
    layer_scale="depth",
    norm_eps=1e-5,
)
PAPER = dict(SMALL_FORM, img_size=32, patch_size=4, num_heads=4, head_dim=64)
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        (dict(embed_dim=108, mlp_ratio=384 / 108, num_classes=10), 5_078_834),
        (dict(embed_dim=108, mlp_ratio=384 / 108, num_classes=100), 5_088_644),
        (dict(embed_dim=192, mlp_ratio=2.0, num_classes=10), 9_020_618),
        (dict(embed_dim=192, mlp_ratio=2.0, num_classes=100), 9_037_988),
        (dict(embed_dim=192, mlp_ratio=2.0, num_classes=200, img_size=64, patch_size=8), 9_084_936),
    ],
)
def test_the_paper_s_cait_has_its_exact_size(options, parameters):
    assert size(CaiT, **{**PAPER, **options}) == parameters
    assert size(CaiT, **{**PAPER, **options}, attention=AttentionSpec((GMM,))) == parameters + 960


@pytest.mark.parametrize("name", ["cait_xxs24_224", "cait_s24_224"])
def test_timm_s_weights_load_under_the_same_keys_and_give_the_same_logits(name):
    theirs = timm.create_model(name, img_size=32, num_classes=7, depth=2)
    theirs = randomise(theirs, std=0.05).eval()
    heads = len(theirs.blocks[0].attn.proj_l.weight)
    ours = CaiT(32, 16, num_classes=7, embed_dim=theirs.embed_dim, depth=2, num_heads=heads).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)


def test_layer_scale_falls_with_the_depth_of_the_block():
    model = CaiT(**{**PAPER, "embed_dim": 8, "head_dim": 4, "depth": 26})
    gammas = [block.gamma_1[0].item() for block in model.blocks]
    assert gammas == pytest.approx([0.1] * 18 + [1e-5] * 6 + [1e-6] * 2)
    assert [block.gamma_2[0].item() for block in model.blocks_token_only] == pytest.approx(
        [0.1, 0.1]
    )


def test_the_mask_multiplies_before_the_heads_mix():
    model = randomise(
        small("cait", mixing_bias=True, attention=AttentionSpec((f"{GMM}(num_kernels=1)",)))
    )
    attention, seen = model.blocks[0].attn, {}
    attention.proj_l.register_forward_hook(
        lambda _module, inputs, _result: seen.update(before=inputs[0])
    )
    attention.logit_tap.register_forward_hook(
        lambda _module, _inputs, logits: seen.update(after=logits)
    )
    model(IMAGES)
    x = model.blocks[0].norm1(model.patch_embed(IMAGES) + model.pos_embed)
    q, k, _ = attention.qkv(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    masked = (q @ k.mT) * attention.terms().dense("scale")
    torch.testing.assert_close(seen["before"], masked)
    mixed = (
        torch.einsum("gh,bhij->bgij", attention.proj_l.weight, masked)
        + attention.proj_l.bias[:, None, None]
    )
    torch.testing.assert_close(seen["after"], mixed)


def test_identical_mixings_are_a_plain_transformer_of_patches():
    mixed = randomise(small("cait", mixing="identity", mixing_bias=True))
    with torch.no_grad():
        for block in mixed.blocks:
            for part in block.attn.built_in():
                part.weight.copy_(torch.eye(2))
                part.bias.zero_()
    expected = mixed(IMAGES)
    for block in mixed.blocks:
        block.attn.built_in = lambda: ()
    torch.testing.assert_close(mixed(IMAGES), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("context", ["all", "patches"])
def test_the_class_token_sees_itself_only_in_the_released_form(context):
    model = randomise(small("cait", class_context=context))
    block, sizes = model.blocks_token_only[0], []
    block.attn.map_tap.register_forward_hook(
        lambda _module, _inputs, attn: sizes.append(attn.shape[-1])
    )
    model(IMAGES)
    assert sizes == [17 if context == "all" else 16]


@pytest.mark.parametrize("name", EVERYWHERE)
def test_every_modifier_reaches_the_patch_blocks_alone(name):
    model = small("cait", attention=AttentionSpec((name,)))
    assert all(name in block.attn.modifiers for block in model.blocks)
    assert not any(name in key for key in model.state_dict() if "blocks_token_only" in key)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(attention=AttentionSpec(mixer="separable")),
            "set MODEL.ATTENTION.MIXER softmax, or take MODEL.TYPE vit",
        ),
        (dict(mixing="zeros"), "mixing"),
        (dict(class_context="none"), "class_context"),
        (
            dict(attention=AttentionSpec(("qk_residual",)), head_dim=5),
            "x can be added to q and k only where both agree",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(options, message):
    with pytest.raises(ValueError, match=message):
        small("cait", **options)


def test_multiply_accumulates_follow_from_the_widths():
    model = small("cait")
    tokens, dim, hidden, heads = 16, 8, 16, 2
    patch = tokens * (4 * dim * dim + 2 * dim * hidden + 2 * dim) + 2 * tokens**2 * (dim + heads**2)
    token = 2 * dim * dim * (1 + 17) + 2 * 17 * dim + 2 * dim * hidden + 18 * dim
    assert model.flops() == tokens * 3 * 16 * dim + 2 * patch + token + dim + dim * 10


# ---- vectors of the original

KEYS = {
    "to_patch_embedding.1": "patch_embed.proj",
    "pos_embedding": "pos_embed",
    "patch_transformer.layers": "blocks",
    "cls_transformer.layers": "blocks_token_only",
    ".0.scale": ".gamma_1",
    ".1.scale": ".gamma_2",
    ".0.fn.norm.": ".norm1.",
    ".1.fn.norm.": ".norm2.",
    ".0.fn.fn.to_q.": ".attn.q.",
    ".0.fn.fn.to_out.0": ".attn.proj",
    ".1.fn.fn.net.0": ".mlp.fc1",
    ".1.fn.fn.net.3": ".mlp.fc2",
    ".0.fn.fn.mix_heads_pre_attn": ".attn.proj_l.weight",
    ".0.fn.fn.mix_heads_post_attn": ".attn.proj_w.weight",
    ".0.fn.fn.mask.": f".attn.{MASK}",
    ".0.fn.fn.to_kv.": ".attn.kv.",
    "mlp_head.0": "norm",
    "mlp_head.1": "head",
}


def convert(state):
    """Class layers keep q apart and split k from v, patch layers join all three; mixings are [from,
    to] in the original.
    """
    state, result = {renamed(key, KEYS): value for key, value in state.items()}, {}
    for key, value in state.items():
        if ".attn.kv." in key:
            place, query = key.removesuffix("kv.weight"), state[key.replace(".kv.", ".q.")]
            if key.startswith("blocks."):
                result[place + "qkv.weight"] = torch.cat([query, value])
            else:
                result |= dict(
                    zip(
                        (place + "q.weight", place + "k.weight", place + "v.weight"),
                        (query, *value.chunk(2)),
                        strict=True,
                    )
                )
        elif ".attn.q." not in key:
            result[key] = (
                patches(value, 3)
                if key == "patch_embed.proj.weight"
                else (
                    value.t()
                    if ".proj_l." in key or ".proj_w." in key
                    else (
                        value.flatten()
                        if "gamma" in key
                        else value.flatten(1)
                        if MASK in key
                        else value
                    )
                )
            )
    return result


@pytest.mark.parametrize(("name", "modifiers"), [("gmm_cait", (GMM,)), ("gmm_cait_plain", ())])
def test_the_original_gives_the_same_logits_and_gradients(name, modifiers):
    config = trained(name, "state_dict")[0]["config"]
    model = CaiT(
        config["img_size"],
        config["patch_size"],
        num_classes=config["num_classes"],
        embed_dim=config["dim"],
        depth=config["depth"],
        num_heads=config["heads"],
        head_dim=config["dim_head"],
        class_depth=config["cls_depth"],
        mlp_ratio=config["mlp_dim"] / config["dim"],
        **SMALL_FORM,
        attention=AttentionSpec(modifiers),
    )
    features = {
        f"blocks.{block}.attn": f"patch_transformer.layers.{block}.0.fn.fn"
        for block in range(config["depth"])
    }
    features |= {
        f"blocks_token_only.{block}.attn": f"cls_transformer.layers.{block}.0.fn.fn"
        for block in range(config["cls_depth"])
    }
    assert_same_as_original(name, model, convert, features)
