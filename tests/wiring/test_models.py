"""Constructors of models have the values of the settings, and every block has them."""

import inspect
import re
import sys
from itertools import islice
from unittest.mock import patch

import pytest
import torch
from timm.layers import DropPath
from torch import nn

from config import KEYS, ConfigError
from models import build_model
from models.base.backbone import BACKBONES
from models.build import ModelError
from models.layers.pre_mlp import PreMlp
from optimizer import muon_groups, parameter_groups
from tests.wiring.cases import FAMILIES, SECTIONS, config_of, others, value_of
from tests.wiring.models import COMPANY, SMALL, model_keys, model_settings

# Arguments that are not their key's last word in small letters.
ARGUMENTS = {
    "MODEL.DROP_RATE": "drop_rate",
    "MODEL.DROP_PATH_RATE": "drop_path_rate",
    "MODEL.DROP_PATH_PROFILE": "drop_path_profile",
    "MODEL.DYNAMIC_IMG_SIZE": "dynamic_img_size",
    "MODEL.SW_MLP": "sw_mlp",
    "MODEL.PRE_MLP.WHERE": "pre_mlp",
    "MODEL.PRE_MLP.RATIO": "pre_mlp_ratio",
    "MODEL.PRE_MLP.DROP_PATH": "pre_mlp_drop_path",
    "TRAIN.USE_CHECKPOINT": "use_checkpoint",
    "DATA.IMG_SIZE": "img_size",
    "MODEL.SASA_RESNET.STEM_MIXTURES": "mixtures",
    "MODEL.SWIFTFORMER.DISTILL_HEAD": "distillation",
    "MODEL.TIMM.MODEL": "text",
}


class Recorded(Exception):
    """Stops a model's constructor once its arguments are known."""


def arguments_of(family: str, settings: dict) -> dict | None:
    """What the family's constructor is called with; None where the settings are refused."""
    where, name = ("models.timm_models", "timm_model") if family == "timm" else (None, "__init__")
    owner = sys.modules[where] if where else BACKBONES[family]
    signature, given = inspect.signature(getattr(owner, name)), {}

    def record(*args, **options):
        given.update(options | signature.bind(*args, **options).arguments)
        raise Recorded

    with patch.object(owner, name, record):
        try:
            build_model(config_of(settings), 9)
        except Recorded:
            return given
        except (ConfigError, ModelError):
            return None
    raise AssertionError(f"{family} is not built by {owner.__name__}.{name}")


def found(arguments: dict, key: str):
    """The argument that a key sets."""
    leaf = key.split(".")[-1].lower()
    name = ARGUMENTS.get(key, leaf)
    if not key.startswith("MODEL.ATTENTION."):
        return arguments.get(name, "not an argument")
    spec = arguments["attention"]
    return spec if isinstance(spec, str) else getattr(spec, leaf)


def fixed(value):
    """Lists as tuples."""
    return tuple(value) if isinstance(value, list) else value


@pytest.mark.parametrize("family", FAMILIES)
def test_every_setting_of_a_model_is_the_argument_of_its_name(family):
    base = model_settings(family)
    current = config_of(base)
    wrong = []
    for key in model_keys(family):
        if key in ("MODEL.NUM_CLASSES", "MODEL.BN_MOMENTUM"):
            continue
        beside = base | COMPANY.get(key, {})
        for value in islice(others(key, value_of(current, key)), 2):
            arguments = arguments_of(family, beside | {key: value})
            if arguments is not None and fixed(found(arguments, key)) != fixed(value):
                wrong.append(f"{key} {value!r}: {found(arguments, key)!r}")
    assert not wrong
    assert arguments_of(family, base)["num_classes"] == 9  # the data's


@pytest.mark.parametrize("profile", ["linear", "constant"])
@pytest.mark.parametrize("family", SMALL)
def test_rates_reach_every_block(family, profile):
    section, small = SECTIONS[family], SMALL[family]
    rates = {"MODEL.DROP_RATE": 0.25, "MODEL.DROP_PATH_RATE": 0.5}
    rates |= {"MODEL.DROP_PATH_PROFILE": profile} if family != "timm" else {}
    rates |= {f"{section}NORM_EPS": 0.125} if f"{section}NORM_EPS" in KEYS else {}
    modules = dict(build_model(config_of(model_settings(family) | rates)).named_modules())
    spared = ("attn_drop", "head_drop") if family == "timm" else "attn_drop"
    drops = {
        name: module.p
        for name, module in modules.items()
        if isinstance(module, nn.Dropout) and not name.endswith(spared)
    }
    assert drops and set(drops.values()) == {0.25}, drops
    paths = [module.drop_prob for module in modules.values() if isinstance(module, DropPath)]
    blocks = small["DEPTH"] if "DEPTH" in small else sum(small.get("DEPTHS", (2,)))
    rising = torch.linspace(0, 0.5, blocks).tolist()[1:]
    expected = [0.5] * blocks if profile == "constant" and family != "timm" else rising
    assert sorted(set(paths)) == pytest.approx(sorted(set(expected)))
    assert len(paths) == len(expected) * (2 if family == "timm" else 1)
    epsilons = {module.eps for module in modules.values() if isinstance(module, nn.LayerNorm)}
    if f"{section}NORM_EPS" in rates:
        assert min(epsilons) == 0.125


@pytest.mark.parametrize("where, expected", [("stem", [[]]), ("stage", [[], [1 / 3]])])
def test_a_pre_mlp_has_dropout_and_the_stochastic_depth_of_the_block_behind_it(where, expected):
    settings = {
        "MODEL.SWIN.DEPTHS": [2, 2],
        "MODEL.PRE_MLP.WHERE": where,
        "MODEL.PRE_MLP.DROP_PATH": True,
        "MODEL.DROP_PATH_RATE": 0.5,
        "MODEL.DROP_RATE": 0.25,
    }
    model = build_model(config_of(model_settings("swin") | settings))
    found = [list(module.modules()) for module in model.modules() if isinstance(module, PreMlp)]
    paths = [[one.drop_prob for one in inner if isinstance(one, DropPath)] for inner in found]
    assert paths == [pytest.approx(rates) for rates in expected]
    drops = {one.p for inner in found for one in inner if isinstance(one, nn.Dropout)}
    assert drops == {0.25}


HIDDEN = {
    "swin": r"layers\.",
    "swinv2": r"layers\.",
    "swin_mlp": r"layers\.",
    "vit": r"blocks\.",
    "cait": r"blocks(_token_only)?\.",
    "pit": r"transformers\.\d+\.blocks\.",
    "t2t": r"blocks\.",
    "refined_vit": r"blocks\.",
    "timm": r"blocks\.",
}


@pytest.mark.parametrize("family", HIDDEN)
def test_muon_takes_the_matrices_of_all_blocks_and_no_others(family):
    model = build_model(config_of(model_settings(family)))
    matrices = {
        name
        for name, parameter in model.named_parameters()
        if re.match(HIDDEN[family], name) and name.endswith("weight") and parameter.ndim == 2
        if "cpb_mlp" not in name  # of positions
    }
    groups = muon_groups(model, parameter_groups(model, 1.0, 0.5))
    taken = {
        parameter for group in groups if not group["use_fallback"] for parameter in group["params"]
    }
    assert {name for name, p in model.named_parameters() if p in taken} == matrices != set()


def test_the_norm_of_pooled_patches_has_the_epsilon_of_the_settings():
    settings = {"MODEL.VIT.POOL": "mean", "MODEL.VIT.NORM_EPS": 0.125}
    assert build_model(config_of(model_settings("vit") | settings)).fc_norm.eps == 0.125


SECOND_HEADS = {
    "pit": {"MODEL.PIT.DISTILLED": True},
    "refined_vit": {"MODEL.REFINED_VIT.AUX_HEAD": True},
    "swiftformer": {"MODEL.SWIFTFORMER.DISTILL_HEAD": True},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_backbone_names_every_layer_to_the_classes(family):
    settings = model_settings(family) | SECOND_HEADS.get(family, {})
    model = build_model(config_of(settings), 11)
    heads = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == 11
    }
    assert len(heads) == 1 + (family in SECOND_HEADS)
    assert set(model.classifiers()) == heads


@pytest.mark.parametrize("family", FAMILIES)
def test_position_embeddings_and_tokens_are_not_decayed(family):
    positions = {"MODEL.SWIN.APE": True, "MODEL.PIT.CLASS_POSITION": True}
    model = build_model(config_of(model_settings(family) | positions))
    own = {name for name, p in model.named_parameters() if "." not in name}
    assert own <= model.no_weight_decay() and own <= model.position_names()


def test_a_part_says_which_of_its_own_parameters_are_not_decayed():
    model = build_model(config_of(model_settings("vit")))
    model.part = nn.Linear(2, 2)
    model.part.no_weight_decay = lambda: {"weight"}
    assert "part.weight" in model.no_weight_decay()
