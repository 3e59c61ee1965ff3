"""What `build_model` does for every family."""

import inspect
import re
from functools import partial

import pytest
import torch
from torch import nn

from config import KEYS, ConfigError, load_config
from models import BACKBONES, build_model, timm_model
from models.base.options import NEUTRAL
from models.build import ModelError
from models.sasa_resnet import SasaResNet
from models.swiftformer import SwiftFormer
from optimizer import LayerIds
from tests.helpers import ROOT
from tests.models.builders import FAMILIES, small

VIT = [
    "MODEL.TYPE",
    "vit",
    "DATA.IMG_SIZE",
    32,
    "MODEL.VIT.DEPTH",
    2,
    "MODEL.VIT.EMBED_DIM",
    12,
    "MODEL.VIT.NUM_HEADS",
    2,
]


def test_one_momentum_reaches_every_batch_norm():
    plain, slow = (
        build_model(
            load_config(
                None,
                [
                    *VIT,
                    "MODEL.ATTENTION.MODIFIERS",
                    ["re_attention"],
                    "MODEL.BN_MOMENTUM",
                    momentum,
                ],
            )
        )
        for momentum in (None, 1e-4)
    )
    own, set_ = (
        [module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        for model in (plain, slow)
    )
    assert own == [0.1, 0.1] and set_ == [1e-4, 1e-4]


def test_a_momentum_without_batch_norm_is_refused():
    with pytest.raises(
        ModelError,
        match="MODEL.BN_MOMENTUM 0.1: VisionTransformer has no BatchNorm; set it to None",
    ):
        build_model(load_config(None, [*VIT, "MODEL.BN_MOMENTUM", 0.1]))


TINY = ["DATA.DATASET", "digits", "DATA.IMG_SIZE", 16, "MODEL.DROP_PATH_RATE", 0.3]


def tiny_pyramid(family, *opts):
    """A model of one stage of three blocks, from a config."""
    section = f"MODEL.{family.upper()}"
    sizes = {"PATCH_SIZE": 2, "EMBED_DIM": 16, "DEPTHS": [3], "NUM_HEADS": [2], "WINDOW_SIZE": 4}
    pairs = [word for key, value in sizes.items() for word in (f"{section}.{key}", value)]
    return build_model(load_config(None, ["MODEL.TYPE", family, *TINY, *pairs, *opts]))


@pytest.mark.parametrize("family", ["swin", "swinv2", "swin_mlp"])
def test_the_profile_of_stochastic_depth_reaches_the_windowed_families(family):
    for profile, rates in (("linear", [0, 0.15, 0.3]), ("constant", [0.3, 0.3, 0.3])):
        blocks = tiny_pyramid(family, "MODEL.DROP_PATH_PROFILE", profile).layers[0].blocks
        found = [getattr(block.drop_path, "drop_prob", 0) for block in blocks]
        assert found == pytest.approx(rates)


OTHER_VALUES = {
    "MODEL.DROP_PATH_PROFILE": "constant",
    "MODEL.PRE_MLP.WHERE": "stem",
    "MODEL.SW_MLP": "shift",
    "MODEL.DYNAMIC_IMG_SIZE": True,
    "MODEL.ATTENTION.MIXER": "separable",
    "MODEL.ATTENTION.MODIFIERS": ["qk_residual"],
    "MODEL.ATTENTION.DROP": 0.5,
    "MODEL.ATTENTION.BACKEND": "fused",
    "MODEL.ATTENTION.LOGIT_SCALE_INIT": 5.0,
    "MODEL.ATTENTION.BIAS_SIGMOID": False,
    "TRAIN.USE_CHECKPOINT": True,
}


@pytest.mark.parametrize("family", BACKBONES.names())
def test_a_setting_that_a_family_does_not_read_is_refused(family):
    assert OTHER_VALUES.keys() == NEUTRAL.keys()
    for key in NEUTRAL.keys() - BACKBONES[family].optional_settings:
        message = rf"{key}.*{family}.*(set|leave) it (to|at) "
        with pytest.raises((ConfigError, ModelError), match=message):
            build_model(load_config(None, ["MODEL.TYPE", family, key, OTHER_VALUES[key]]))


@pytest.mark.parametrize("family", BACKBONES.names())
def test_every_backbone_has_a_yaml_and_a_docstring_with_shapes(family):
    yamls = (ROOT / "configs").rglob("*.yaml")
    assert any(re.search(rf"TYPE: *['\"]?{family}\b", path.read_text()) for path in yamls)
    entry = BACKBONES[family] if family != "timm" else timm_model
    assert "Shapes:" in inspect.getdoc(entry)


def test_neutral_values_are_the_defaults_of_the_config():
    assert {key: KEYS[key].default for key in NEUTRAL} == NEUTRAL


@pytest.mark.parametrize("family", [*FAMILIES, "swiftformer", "sasa_resnet"])
def test_layer_decay_finds_the_blocks_of_every_family_in_the_order_of_the_forward_pass(family):
    others = {"swiftformer": SwiftFormer, "sasa_resnet": SasaResNet}
    model = others[family](num_classes=5) if family in others else small(family)
    layers = LayerIds(model)
    ids = {name: layers[name] for name, _ in model.named_parameters()}
    assert sorted(set(ids.values())) == list(range(layers.last + 1))
    assert model.classifiers()
    assert {ids[f"{name}.weight"] for name in model.classifiers()} == {layers.last}
    blocks = [depth for name, depth in ids.items() if "block" in name or name.startswith("layer1.")]
    assert blocks == sorted(blocks)


EMBEDDINGS = {  # what comes before the first block beside the patches
    "swin": dict(ape=True, pre_mlp="stem"),
    "swinv2": dict(ape=True),
    "swin_mlp": dict(ape=True),
    "pit": dict(distilled=True, class_position=True),
    "timm": dict(
        text="beitv2_base_patch16_224(embed_dim=8, depth=2, num_heads=2, use_abs_pos_emb=True)"
    ),
    "swiftformer": dict(),
    "sasa_resnet": dict(stem="attention"),
}


@pytest.mark.parametrize("family", [*FAMILIES, "swiftformer", "sasa_resnet"])
def test_layer_decay_gives_all_that_comes_before_the_blocks_the_rate_of_the_patches(family):
    """By the order in which modules run; a model's own parameters are tokens and positions."""
    others = {"swiftformer": SwiftFormer, "sasa_resnet": SasaResNet}
    options = EMBEDDINGS.get(family, {})
    with torch.random.fork_rng():
        build = others[family] if family in others else partial(small, family)
        model = build(num_classes=5, **options).eval()
    order = []
    for name, module in model.named_modules():
        if name and module._parameters:
            module.register_forward_hook(lambda _m, _i, _o, name=name: order.append(name))
    side = 32 if family in others else 16
    with torch.no_grad():
        model(torch.zeros(1, 3, side, side))
    blocks = [name for name in model.layer_groups()[1] if "pre_mlp" not in name]
    first = next(i for i, name in enumerate(order) if name.startswith(tuple(blocks)))
    layers = LayerIds(model)
    early = [
        f"{name}.{own}" for name in order[:first] for own in model.get_submodule(name)._parameters
    ]
    assert early
    assert {layers[name] for name in [*early, *model._parameters]} == {0}
    last = max(i for i, name in enumerate(order) if layers[f"{name}.weight"] < layers.last)
    late = [name for name in order[last + 1 :] if "pool" not in name]
    assert late and {layers[f"{name}.weight"] for name in late} == {layers.last}
