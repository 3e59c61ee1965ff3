"""Small models of every family, and whether a setting changes what they compute."""

from typing import Any

import torch

from config import KEYS, ConfigError
from models import build_model
from models.build import ModelError
from tests.wiring.cases import SECTIONS, config_of, others, value_of
from tests.wiring.runs import digest

# Sixteen pixels, a few channels, one or two blocks.
PYRAMID = {"PATCH_SIZE": 2, "EMBED_DIM": 8, "DEPTHS": [1, 2], "NUM_HEADS": [2, 4], "WINDOW_SIZE": 2}
COLUMN = {"PATCH_SIZE": 4, "EMBED_DIM": 8, "DEPTH": 2, "NUM_HEADS": 2}
SMALL = {
    "swin": PYRAMID,
    "swinv2": PYRAMID | {"PRETRAINED_WINDOW_SIZES": [0, 0]},
    "swin_mlp": PYRAMID,
    "vit": COLUMN,
    "cait": COLUMN | {"CLASS_DEPTH": 1},
    "pit": {"PATCH_SIZE": 4, "EMBED_DIM": 8, "DEPTHS": [1, 2], "NUM_HEADS": [2, 4]},
    "t2t": {"EMBED_DIM": 8, "DEPTH": 2, "NUM_HEADS": 2, "TOKEN_DIM": 8},
    "refined_vit": COLUMN | {"DEPTH": 3},
    "swiftformer": {"EMBED_DIMS": [4, 8], "DEPTHS": [2, 2]},
    "sasa_resnet": {"WIDTH": 8, "DEPTHS": [1, 2], "NUM_HEADS": 2, "KERNEL_SIZE": 3},
    "timm": {"MODEL": "vit_tiny_patch16_224(patch_size=4, embed_dim=8, depth=2, num_heads=2)"},
}
COMPANY = {
    "MODEL.DROP_PATH_PROFILE": {"MODEL.DROP_PATH_RATE": 0.5},
    "MODEL.PRE_MLP.RATIO": {"MODEL.PRE_MLP.WHERE": "stage"},
    "MODEL.PRE_MLP.DROP_PATH": {"MODEL.PRE_MLP.WHERE": "stage", "MODEL.DROP_PATH_RATE": 0.5},
    "MODEL.VIT.CLASS_TOKEN": {"MODEL.VIT.POOL": "mean"},
    "MODEL.T2T.MODIFIED": {"MODEL.ATTENTION.MODIFIERS": ["crpw"]},
    "MODEL.REFINED_VIT.COS_PAIRS": {"MODEL.REFINED_VIT.COS_REG": 0.5},
    "MODEL.SWIFTFORMER.NUM_HEADS": {"MODEL.ATTENTION.MIXER": "local"},
    "MODEL.SASA_RESNET.STEM_HEADS": {"MODEL.SASA_RESNET.STEM": "attention"},
    "MODEL.SASA_RESNET.STEM_MIXTURES": {"MODEL.SASA_RESNET.STEM": "attention"},
}
GENERAL = (
    "DATA.IMG_SIZE",
    "MODEL.NUM_CLASSES",
    "MODEL.DROP_RATE",
    "MODEL.DROP_PATH_RATE",
    "MODEL.DROP_PATH_PROFILE",
    "MODEL.BN_MOMENTUM",
    "MODEL.DYNAMIC_IMG_SIZE",
    "MODEL.SW_MLP",
    "TRAIN.USE_CHECKPOINT",
    *(key for key in KEYS if key.startswith(("MODEL.ATTENTION.", "MODEL.PRE_MLP."))),
)
# Arrivals that no result on a CPU shows; an attribute of some module has to show them.
BY_ATTRIBUTE = ("MODEL.ATTENTION.BACKEND",)
BY_LARGER_IMAGES = ("MODEL.DYNAMIC_IMG_SIZE",)


def model_keys(family: str) -> list[str]:
    """The keys that say how a model of this family is built."""
    return [*GENERAL, *(key for key in KEYS if key.startswith(SECTIONS[family]))]


def model_settings(family: str) -> dict[str, Any]:
    """A small model of the family."""
    own = {SECTIONS[family] + leaf: value for leaf, value in SMALL.get(family, {}).items()}
    return {
        "MODEL.TYPE": family,
        "DATA.DATASET": "folder",
        "DATA.IMG_SIZE": 16,
        "MODEL.NUM_CLASSES": 7,
        "MODEL.DROP_PATH_RATE": 0.0,
        **own,
    }


def behaviour(config, key: str) -> dict[str, Any]:
    """What a model computes: initial values, results in training and evaluation, what backward
    will need, and running statistics; and what `key` alone calls for.
    """
    torch.manual_seed(0)
    model = build_model(config)
    size = config.DATA.IMG_SIZE
    channels = config.MODEL[config.MODEL.TYPE.upper()].IN_CHANS
    images = torch.linspace(-2, 2, 2 * channels * size * size).view(2, channels, size, size).sin()
    initial = {name: digest(value) for name, value in model.state_dict().items()}
    shake(model)
    saved = []
    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: saved.append(x.shape) or x, lambda x: x
    ):
        training = model(images)
    training = training if isinstance(training, dict) else {"logits": training}
    buffers = {name: digest(value) for name, value in model.named_buffers() if value.numel()}
    with torch.no_grad():
        model.eval()
        logits = model(images)
    return {
        "initial": initial,
        "training": {name: digest(value) for name, value in training.items()},
        "saved": saved,
        "buffers": buffers,
        "logits": digest(logits),
        "larger": on_larger_images(model, images) if key in BY_LARGER_IMAGES else None,
        "attributes": plain_attributes(model) if key in BY_ATTRIBUTE else None,
    }


@torch.no_grad()
def on_larger_images(model: torch.nn.Module, images: torch.Tensor) -> str:
    """The result for images of twice the side, or why there is none."""
    try:
        return digest(model(torch.nn.functional.interpolate(images, scale_factor=2)))
    except (AssertionError, RuntimeError, ValueError) as error:
        return str(error)


def shake(model: torch.nn.Module) -> None:
    """Moves every parameter off its initial value, so that no branch is multiplied by nothing."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


def plain_attributes(model: torch.nn.Module) -> list:
    """Names and values of all modules' attributes that are numbers or text."""
    return [
        (name, key, value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, (bool, int, float, str))
    ]


def outcome(settings: dict[str, Any], key: str) -> dict[str, Any] | str:
    """The behaviour of these settings' model, or the error that refuses them."""
    try:
        return behaviour(config_of(settings), key)
    except (ConfigError, ModelError, ValueError) as error:
        return str(error)


def arrival_in_model(family: str, key: str, cache: dict) -> str:
    """`arrives`, `refused`, `ignored: ...`, or `untried: ...` where no value could be tried. Of a
    key with a few choices, every choice has to arrive or to be refused.
    """
    beside = model_settings(family) | COMPANY.get(key, {})
    special = key in BY_ATTRIBUTE + BY_LARGER_IMAGES
    name = repr((sorted(beside.items(), key=str), special and key))
    if name not in cache:
        cache[name] = outcome(beside, key)
    before = cache[name]
    if isinstance(before, str):  # the part that the key belongs to is refused itself
        return "refused"
    current = value_of(config_of(beside), key)
    leaf, refusals, arrived = key.split(".")[-1], [], False
    for value in others(key, current):
        after = outcome(beside | {key: value}, key)
        if after == before:
            if key in BY_ATTRIBUTE:  # auto may be this choice
                continue
            return f"ignored: {value!r}"
        if isinstance(after, str):
            refusals.append(f"{value!r}: {after}")
        else:
            arrived = True
        if not KEYS[key].kind.choices and (arrived or leaf in str(after)):
            break
    if arrived:
        return "arrives"
    if not key.startswith(SECTIONS[family]) and any(leaf in refusal for refusal in refusals):
        return "refused"
    return f"untried: {refusals}"
