"""configs/identity/family: every file builds, differs from its plain model in one thing, and adds
the parameters that the arm's formula has, decayed or not as documented.
"""

import pytest
import torch

from config import load_config, to_dict
from models import build_model
from models.attention.modified import Modified
from models.attention.modifiers import MODIFIERS
from optimizer import decay_rule
from registry import parse_call
from tests.helpers import ROOT
from tests.models.builders import EVERYWHERE

FOLDER = ROOT / "configs/identity/family"
# Folder of the plain model of each kind of file, and options that make it shallow.
PLAIN = {
    "swin_tiny_patch4_window7_224": ("../", "SWIN", ["DEPTHS", [2], "NUM_HEADS", [3]]),
    "swinv2_tiny_patch4_window8_256": ("../", "SWINV2", ["DEPTHS", [2], "NUM_HEADS", [3]]),
    "vit_small_patch16_224": ("", "VIT", ["DEPTH", 2]),
    "digits_swin": ("../../digits/", "SWIN", ["DEPTHS", [2], "NUM_HEADS", [2]]),
}
NONE, HEADS = (lambda g: 0), (lambda g: g.num_heads)
# What an arm adds to a layer of this geometry, by the end of its files' names.
ADDED = {
    "self_mix": HEADS,
    "affine": lambda g: 3 * g.num_heads,
    "shaped": lambda g: 3 * g.num_heads,
    "shaped_paper": lambda g: 3 * g.num_heads,
    "value_skipinit": lambda g: 2 * g.num_heads,
    "value_skipinit_paper": lambda g: 2 * g.num_heads,
    "attn_scale": HEADS,
    "high_pass": NONE,
    "exclusive": NONE,
    "exclusive_learned": HEADS,
    "qkres_exclusive": NONE,
    "self_mask": HEADS,
    "self_exclude": NONE,
    "self_bias": HEADS,
    "self_weight": HEADS,
    "head_temperature": HEADS,
    "mimetic": NONE,
    "mimetic_qk": NONE,
    "mimetic_vo": NONE,
    "orthogonal": NONE,
    "orthogonal_random": NONE,
    "orthogonal_unmatched": NONE,
    "impulse_bias": NONE,
    "value_residual": lambda g: 2 * bool(g.block),
    "value_residual_half": NONE,
    "value_residual_svformer": NONE,
    "neutreno": NONE,
    "qk_norm": lambda g: 2 * g.head_channels,
    "qkres_qk_norm": lambda g: 2 * g.head_channels,
    "sink": HEADS,
    "softmax1": NONE,
    "gate": lambda g: g.dim * g.num_heads,
    "gate_paper": lambda g: g.dim * g.num_heads,
    "gate_element": lambda g: g.dim * g.inner,
    "gpsa": lambda g: 4 * g.num_heads,
    "branch_gain": lambda g: 1,
    "branch_gain_0": lambda g: 1,
    "orthogonal_update": NONE,
}
DECAYED = {"gate", "gpsa"}  # have matrices
# What a family has no form of, with the reason in the refusal.
NO_FORM = {
    ("swinv2_tiny_patch4_window8_256", "shaped_paper"),
    ("swinv2_tiny_patch4_window8_256", "impulse_bias"),
    ("swinv2_tiny_patch4_window8_256", "qk_norm"),
    ("swinv2_tiny_patch4_window8_256", "qkres_qk_norm"),
    ("vit_small_patch16_224", "impulse_bias"),
}
FILES = {
    (plain, path.stem.removeprefix(f"{plain}_")): path
    for plain in PLAIN
    for path in sorted(FOLDER.glob(f"{plain}_*.yaml"))
}
REGISTERS = FILES.pop(("vit_small_patch16_224", "registers"))  # no modifier, and ViT's alone


def plain_and_options(plain):
    """The file of a plain model, and what makes it two blocks deep."""
    folder, section, options = PLAIN[plain]
    keys = [f"MODEL.{section}.{word}" if isinstance(word, str) else word for word in options]
    return FOLDER / f"{folder}{plain}.yaml", keys


def built(config):
    """The model on no device, and its attention modules."""
    with torch.device("meta"):
        model = build_model(config)
    return model, [module for module in model.modules() if isinstance(module, Modified)]


def number(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "plain",
    [
        "digits_swin",
        "swin_tiny_patch4_window7_224",
        pytest.param("swinv2_tiny_patch4_window8_256", marks=pytest.mark.slow),
        pytest.param("vit_small_patch16_224", marks=pytest.mark.slow),
    ],
)
def test_each_file_switches_one_arm_on_and_adds_its_parameters(plain):
    base, options = plain_and_options(plain)
    plain_config = load_config(base, options)
    expected, size = to_dict(plain_config), number(built(plain_config)[0])
    for (kind, arm), path in FILES.items():
        if kind != plain:
            continue
        arm_config = load_config(path, options)
        config = to_dict(arm_config)
        assert config["MODEL"].pop("NAME") == path.stem
        texts = config["MODEL"]["ATTENTION"].pop("MODIFIERS")
        assert config == without_what_an_arm_changes(expected), path.name
        model, layers = built(arm_config)
        assert number(model) == size + sum(ADDED[arm](layer.geometry) for layer in layers), arm
        decays = decay_rule(model)
        decayed = {
            parse_call(text)[0]
            for text in texts
            for name, parameter in model.named_parameters()
            if f".modifiers.{parse_call(text)[0]}." in name and decays(name, parameter)
        }
        assert decayed == DECAYED & {parse_call(text)[0] for text in texts}, arm


def without_what_an_arm_changes(config):
    model = {name: value for name, value in config["MODEL"].items() if name != "NAME"}
    attention = {k: value for k, value in model["ATTENTION"].items() if k != "MODIFIERS"}
    return {**config, "MODEL": {**model, "ATTENTION": attention}}


def test_every_arm_has_a_file_for_each_family_that_has_a_form_of_it():
    arms = {arm for _, arm in FILES}
    for plain in PLAIN:
        present = {arm for kind, arm in FILES if kind == plain}
        if plain == "digits_swin":
            continue
        assert present == {arm for arm in arms if (plain, arm) not in NO_FORM}


def test_every_arm_has_a_small_file():
    names = set()
    for (plain, _), path in FILES.items():
        if plain == "digits_swin":
            names |= {parse_call(text)[0] for text in load_config(path).MODEL.ATTENTION.MODIFIERS}
    assert names == set(MODIFIERS.names()) - set(EVERYWHERE)


@pytest.mark.parametrize(("plain", "arm"), sorted(NO_FORM))
def test_where_there_is_no_form_of_an_arm_the_model_says_so(plain, arm):
    base, options = plain_and_options(plain)
    texts = load_config(FILES["swin_tiny_patch4_window7_224", arm]).MODEL.ATTENTION.MODIFIERS
    with pytest.raises(ValueError, match=";") as caught:
        built(load_config(base, [*options, "MODEL.ATTENTION.MODIFIERS", list(texts)]))
    assert "\n" not in str(caught.value)


def test_registers_are_four_tokens_and_nothing_else():
    base, options = plain_and_options("vit_small_patch16_224")
    expected, config = to_dict(load_config(base)), to_dict(load_config(REGISTERS))
    assert config["MODEL"].pop("NAME") == REGISTERS.stem
    assert config["MODEL"]["VIT"].pop("REGISTERS") == 4
    del expected["MODEL"]["NAME"], expected["MODEL"]["VIT"]["REGISTERS"]
    assert config == expected
    plain, registers = (load_config(path, options) for path in (base, REGISTERS))
    assert number(built(registers)[0]) == number(built(plain)[0]) + 4 * 384
