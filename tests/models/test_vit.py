"""ViT: the small-image models of the Gaussian mixture mask's paper, vectors of their original, and
timm's ViT.
"""

import pytest
import timm
import torch

from models import VisionTransformer
from models.attention import AttentionSpec, Geometry, GlobalAttention
from tests.models.builders import randomise, size, small
from tests.models.originals import MASK, assert_same_as_original, patches, renamed, trained

GMM, ELM = "gaussian_mixture_mask", "elementwise_mask"
PAPER = dict(
    img_size=32,
    patch_size=4,
    embed_dim=192,
    depth=9,
    num_heads=12,
    mlp_ratio=2.0,
    qkv_bias=False,
    norm_eps=1e-5,
)
NO_CLASS = dict(class_token=False, pool="mean")
TINY = dict(img_size=64, patch_size=8, num_classes=200)


@pytest.mark.parametrize(
    ("options", "without", "with_class"),
    [
        (dict(num_classes=10), 2_692_042, 2_692_426),
        (dict(num_classes=100), 2_709_412, 2_709_796),
        (TINY, 2_756_360, 2_756_744),
    ],
)
def test_the_paper_s_vit_has_its_exact_size(options, without, with_class):
    options = {**PAPER, **options}
    assert size(VisionTransformer, **options) == with_class
    assert size(VisionTransformer, **options, **NO_CLASS) == without
    assert (
        size(VisionTransformer, **options, **NO_CLASS, attention=AttentionSpec((GMM,)))
        == without + 1080
    )
    assert size(VisionTransformer, **options, attention=AttentionSpec((GMM,))) == with_class + 1080
    assert (
        size(VisionTransformer, **options, **NO_CLASS, attention=AttentionSpec((ELM,)))
        == without + 9 * 4096
    )


@pytest.mark.parametrize(
    ("dim", "depth", "parameters"),
    [
        (252, 6, 3_115_072),
        (144, 15, 2_536_948),
        (72, 30, 1_277_164),
        (108, 30, 2_848_816),
        (192, 30, 8_935_204),
        (72, 60, 2_538_604),
    ],
)
def test_the_deeper_and_narrower_variants_have_their_exact_sizes(dim, depth, parameters):
    assert (
        size(VisionTransformer, **{**PAPER, "embed_dim": dim, "depth": depth, "num_classes": 100})
        == parameters
    )


@pytest.mark.parametrize(
    "options",
    [{}, dict(class_token=False, global_pool="avg"), dict(init_values=0.5, qkv_bias=False)],
)
def test_timm_s_weights_load_under_the_same_keys_and_give_the_same_logits(options):
    theirs = randomise(
        timm.create_model(
            "vit_tiny_patch16_224", img_size=(64, 48), num_classes=7, depth=2, **options
        ),
        std=0.1,
    ).eval()
    ours = VisionTransformer(
        (64, 48),
        16,
        num_classes=7,
        embed_dim=192,
        depth=2,
        num_heads=3,
        class_token=options.get("class_token", True),
        pool="mean" if "global_pool" in options else "token",
        layer_scale=options.get("init_values"),
        qkv_bias=options.get("qkv_bias", True),
    ).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 48)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)


def test_the_class_token_needs_to_exist_to_be_pooled():
    with pytest.raises(ValueError, match="without a class token use pool=mean"):
        VisionTransformer(16, 4, class_token=False)


def test_activation_checkpointing_changes_nothing():
    plain, again = (randomise(small("vit", use_checkpoint=use)) for use in (False, True))
    images, gradients = torch.randn(2, 3, 16, 16), []
    for model in (plain, again):
        model(images).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


# ---- vectors of the original

KEYS = {
    "to_patch_embedding.1": "patch_embed.proj",
    "pos_embedding": "pos_embed",
    "transformer.layers": "blocks",
    ".0.norm.": ".norm1.",
    ".1.norm.": ".norm2.",
    ".0.fn.to_qkv": ".attn.qkv",
    ".0.fn.to_out.0": ".attn.proj",
    ".1.fn.net.0": ".mlp.fc1",
    ".1.fn.net.3": ".mlp.fc2",
    ".0.fn.mask.": f".attn.{MASK}",
    "mlp_head.1": "head",
}


def convert(state):
    pooled = {"mlp_head.0": "norm"} if "cls_token" in state else {"mlp_head.0": "fc_norm"}
    result = {}
    for key, value in state.items():
        key = renamed(key, {**KEYS, **pooled})
        if key.endswith(f"{MASK}mask"):
            key = key.replace(GMM, ELM)
        result[key] = (
            patches(value, 3)
            if key == "patch_embed.proj.weight"
            else value.flatten(1)
            if MASK in key
            else value
        )
    return result


def model_of(config, modifiers):
    options = dict(
        img_size=config["img_size"],
        patch_size=config["patch_size"],
        num_classes=config["num_classes"],
        embed_dim=config["dim"],
        depth=config["depth"],
        num_heads=config["heads"],
        head_dim=config["dim_head"],
        mlp_ratio=config["mlp_dim_ratio"],
    )
    options |= NO_CLASS if modifiers else {}
    return VisionTransformer(
        **options, qkv_bias=False, norm_eps=1e-5, attention=AttentionSpec(modifiers)
    )


@pytest.mark.parametrize(
    ("name", "modifiers"),
    [
        ("gmm_vit", (GMM,)),
        ("gmm_vit", (f"{GMM}(legacy_pow=True)",)),
        ("gmm_vit_plain", ()),
        ("gmm_vit_elm", (ELM,)),
        ("gmm_vit_grid16", (f"{GMM}(num_kernels=3, legacy_pow=True)",)),
    ],
)
def test_the_original_s_vit_gives_the_same_logits_and_gradients(name, modifiers):
    """Grids of 4 x 4 are free of underflow, so the formula itself agrees; on 16 x 16 only the
    powers do.
    """
    meta, _ = trained(name, "state_dict")
    features = {
        f"blocks.{block}.attn": f"transformer.layers.{block}.0.fn"
        for block in range(meta["config"]["depth"])
    }
    assert_same_as_original(name, model_of(meta["config"], modifiers), convert, features)


def test_the_formula_differs_from_the_original_where_that_underflows():
    meta, state = trained("gmm_vit_grid16", "state_dict")
    logits = []
    for legacy in (False, True):
        model = model_of(meta["config"], (f"{GMM}(num_kernels=3, legacy_pow={legacy})",)).eval()
        model.load_state_dict(convert(state))
        logits.append(model(torch.ones(1, 3, 32, 32)))
    assert (logits[0] - logits[1]).abs().max() > 1e-3


@pytest.mark.parametrize("legacy", [False, True])
def test_the_original_s_attention_gives_the_same_result_and_gradients(legacy):
    keys = {"to_qkv": "qkv", "to_out.0": "proj", "mask.": MASK}
    module = GlobalAttention(
        Geometry(16, 2, (4, 4)),
        AttentionSpec((f"{GMM}(num_kernels=3, legacy_pow={legacy})",)),
        qkv_bias=False,
    )
    assert_same_as_original(
        "gmm_attention",
        module,
        lambda state: {
            renamed(key, keys): value.flatten(1) if "mask" in key else value
            for key, value in state.items()
        },
        output="output",
    )
