"""Whether a setting reaches what it sets: other values for every key, and what changes with them.

`Case` is one wire: a key, another value, and the settings beside which the key acts. Most cases
follow from the table of keys; those that need company or a value of their own are listed here.
"""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any
from unittest.mock import patch

import torch

from config import KEYS, SUPERSEDED, ConfigError, load_config
from data import DataError, build_data
from models import build_model
from models.build import ModelError
from tests.small_runs import SETTINGS, digest, few_digits, plain
from utils import seed_everything

FAMILIES = KEYS["MODEL.TYPE"].kind.choices
SECTIONS = {family: f"MODEL.{family.upper()}." for family in FAMILIES}
# Candidates for another value; those that the key's kind refuses are passed over.
VALUES = (True, False, 2, 3, 1, 4, 0.37, 0.5, [2, 2], [1, 2], [2], (0.3, 0.6), "refiner")


@dataclass(frozen=True)
class Case:
    """A key, the value it gets instead of its own, and the settings of both runs."""

    key: str
    value: Any
    beside: dict[str, Any] = field(default_factory=dict)
    times: int = 1  # how often main.py is called

    def __str__(self) -> str:
        return f"{self.key} {self.value} beside {self.beside}"


# ---- models: sixteen pixels, a few channels, one or two blocks

PYRAMID = {"PATCH_SIZE": 2, "EMBED_DIM": 8, "DEPTHS": [2, 2], "NUM_HEADS": [2, 4], "WINDOW_SIZE": 2}
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
# Leaf of a key: other values worth trying before VALUES; with them, settings it needs.
BETTER = {
    "IMG_SIZE": 32,
    "COS_PAIRS": 1,
    "MLP_RATIO": 3.0,
    "IN_CHANS": 1,
    "NUM_HEADS": 1,
    "DEPTHS": [1, 1],
    "EMBED_DIMS": [8, 8],
    "HEAD_DIM": 2,
    "KERNEL_SIZE": 5,
    "CONV_GROUPS": [1],
    "MODIFIERS": ["qk_residual"],
    "MODEL": "vit_tiny_patch16_224(patch_size=8, embed_dim=8, depth=2, num_heads=2)",
    "MIXER": "separable",
    "REFINE": "re_attention",
    "PRETRAINED_WINDOW_SIZES": [4, 4],
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


def config_of(settings: dict[str, Any]):
    """The configuration of these settings alone."""
    return load_config(None, [word for pair in settings.items() for word in pair])


def others(key: str, current: Any) -> Iterator[Any]:
    """Values that the key's kind takes, other than the current one."""
    kind = KEYS[key].kind
    leaf = key.split(".")[-1]
    for candidate in ([BETTER[leaf]] if leaf in BETTER else []) + [*kind.choices, *VALUES]:
        try:
            value = kind.convert(candidate)
        except ValueError:
            continue
        same_type = current is None or isinstance(value, type(current))
        if value != current and (same_type or isinstance(value, str)):
            yield value


def value_of(config, key: str) -> Any:
    """The value of a dotted key."""
    for name in key.split("."):
        config = config[name]
    return config


def behaviour(config, attributes: bool = False) -> dict[str, Any]:
    """What a model computes: initial values, results in training and evaluation, what backward
    will need, and running statistics. attributes: those of its modules too, where they are plain.
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
        try:
            larger = digest(model(torch.nn.functional.interpolate(images, scale_factor=2)))
        except (AssertionError, RuntimeError, ValueError) as error:
            larger = str(error)
    seen = {
        "initial": initial,
        "training": {name: digest(value) for name, value in training.items()},
        "saved": saved,
        "buffers": buffers,
        "logits": digest(logits),
        "larger": larger,
    }
    return seen | ({"attributes": plain_attributes(model)} if attributes else {})


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


def outcome(settings: dict[str, Any], attributes: bool = False) -> dict[str, Any] | str:
    """The behaviour of these settings' model, or the error that refuses them."""
    try:
        return behaviour(config_of(settings), attributes)
    except (ConfigError, ModelError, ValueError) as error:
        return str(error)


def arrival_in_model(family: str, key: str, cache: dict) -> str:
    """`arrives`, `refused`, `ignored: ...`, or `untried: ...` where no value could be tried. Of a
    key with a few choices, every choice has to arrive or to be refused.
    """
    beside = model_settings(family) | COMPANY.get(key, {})
    attributes = key in BY_ATTRIBUTE
    name = repr((sorted(beside.items(), key=str), attributes))
    if name not in cache:
        cache[name] = outcome(beside, attributes)
    before = cache[name]
    if isinstance(before, str):  # the part that the key belongs to is refused itself
        return "refused"
    current = value_of(config_of(beside), key)
    leaf, refusals, arrived = key.split(".")[-1], [], False
    for value in others(key, current):
        after = outcome(beside | {key: value}, attributes)
        if after == before:
            if attributes:  # auto may be this choice
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


# ---- runs of main.py

# Wires that need a value of their own, company, or more than one case. Files in braces are those
# of a finished run: {last}, {weights}, {partial}, {other}, {yaml}.
STEPS = {"TRAIN.LR_SCHEDULER.NAME": "multistep", "TRAIN.LR_SCHEDULER.MULTISTEPS": [1]}
TEACHER = {
    "TRAIN.DISTILL.KIND": "soft",
    "TRAIN.DISTILL.TEACHER": "{yaml}",
    "TRAIN.DISTILL.TEACHER_WEIGHTS": "{other}",
}
AVERAGE = {"MODEL.EMA.ENABLE": True, "MODEL.EMA.DECAY": 0.5}
CASES = (
    Case("MODEL.TYPE", "cait", {"MODEL.CAIT.EMBED_DIM": 8, "MODEL.CAIT.DEPTH": 1}),
    Case("MODEL.NAME", "another"),
    Case("MODEL.PRETRAINED", "{weights}"),
    Case("MODEL.PRETRAINED", "{other}", {"MODEL.PRETRAINED": "{weights}"}),
    Case("MODEL.RESUME", "{last}", {"TRAIN.EPOCHS": 2}),
    Case("MODEL.HEAD_RESET", True, {"MODEL.PRETRAINED": "{weights}"}),
    Case("MODEL.PARTIAL_LOAD", True, {"MODEL.PRETRAINED": "{partial}"}),
    Case("MODEL.SOURCE", "q", {"MODEL.PRETRAINED": "{weights}"}),
    Case("MODEL.LABEL_SMOOTHING", 0.4),
    Case("MODEL.LABEL_SMOOTHING", 0.4, {"AUG.MIXUP": 0.8}),
    Case("MODEL.EMA.DECAY", 0.9, AVERAGE),
    Case("MODEL.EMA.EVAL", False, AVERAGE),
    Case("MODEL.EMA.EVAL", False, AVERAGE | {"MODEL.RESUME": "{average}", "EVAL_MODE": True}),
    Case("MODEL.COMPILE", True),
    Case("MODEL.COMPILE", True, {"THROUGHPUT_MODE": True}),
    Case("TRAIN.EPOCHS", 2, {"TRAIN.START_EPOCH": 0}),
    Case("TRAIN.START_EPOCH", 1, {"TRAIN.EPOCHS": 2}),
    Case("TRAIN.WARMUP_EPOCHS", 1),
    Case("TRAIN.WARMUP_LR", 0.05, {"TRAIN.WARMUP_EPOCHS": 1}),
    Case("TRAIN.MIN_LR", 0.05),
    Case("TRAIN.COOLDOWN_EPOCHS", 1, {"TRAIN.EPOCHS": 2}),
    Case("TRAIN.WEIGHT_DECAY", 0.5),
    Case("TRAIN.CLIP_GRAD", 0.1, {"TRAIN.OPTIMIZER.NAME": "sgd"}),
    Case("TRAIN.CLIP_MODE", "value", {"TRAIN.OPTIMIZER.NAME": "sgd", "TRAIN.CLIP_GRAD": 0.1}),
    Case("TRAIN.CLIP_MODE", "agc", {"TRAIN.OPTIMIZER.NAME": "sgd", "TRAIN.CLIP_GRAD": 0.1}),
    Case("TRAIN.LAYER_DECAY", 0.5),
    Case("TRAIN.LR_SCHEDULER.MULTISTEPS", [2], STEPS | {"TRAIN.EPOCHS": 3}),
    Case("TRAIN.LR_SCHEDULER.GAMMA", 0.5, STEPS | {"TRAIN.EPOCHS": 2}),
    *(
        Case(
            f"TRAIN.LR_SCHEDULER.{leaf}",
            value,
            {
                "TRAIN.LR_SCHEDULER.NAME": "step",
                "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": 1,
                "TRAIN.EPOCHS": 3,
            },
        )
        for leaf, value in (("DECAY_EPOCHS", 2), ("DECAY_RATE", 0.5))
    ),
    Case("TRAIN.LR_SCHEDULER.WARMUP_PREFIX", False, {"TRAIN.EPOCHS": 2, "TRAIN.WARMUP_EPOCHS": 1}),
    Case("TRAIN.OPTIMIZER.NAME", "sgd"),
    Case("TRAIN.OPTIMIZER.NAME", "muon"),
    Case("TRAIN.OPTIMIZER.NAME", "lamb"),
    Case("TRAIN.OPTIMIZER.EPS", 1.0),
    Case("TRAIN.OPTIMIZER.BETAS", (0.5, 0.999)),
    Case("TRAIN.OPTIMIZER.BETAS", (0.9, 0.5)),
    Case("TRAIN.OPTIMIZER.MOMENTUM", 0.5, {"TRAIN.OPTIMIZER.NAME": "sgd"}),
    Case("TRAIN.DISTILL.KIND", "hard", TEACHER),
    Case("TRAIN.DISTILL.TEACHER", "{wider}", TEACHER),
    Case("TRAIN.DISTILL.TEACHER_WEIGHTS", "{weights}", TEACHER),
    Case("TRAIN.DISTILL.ALPHA", 0.1, TEACHER),
    Case("TRAIN.DISTILL.TAU", 4.0, TEACHER),
    Case(
        "TRAIN.MAX_NONFINITE", 1, {"TRAIN.BASE_LR": 1e38, "TRAIN.CLIP_GRAD": 0, "TRAIN.EPOCHS": 2}
    ),
    Case("TRAIN.SAVE_STEPS", 1),
    Case("TRAIN.KEEP", 1, {"TRAIN.EPOCHS": 3}),
    Case("TRAIN.MAX_STEPS", 1),
    Case("TRAIN.THREADS", 1),
    Case("TRAIN.AUTO_RESUME", False, times=2),
    Case("LOG.PLOT", True),
    Case("SAVE_FREQ", 2, {"TRAIN.EPOCHS": 3}),
    Case("PRINT_FREQ", 2),
    Case("TAG", "another"),
    Case("OUTPUT", "{folder}/output/elsewhere"),
    Case("DEVICE", "cuda"),
    Case("AMP_DTYPE", "bfloat16"),
    Case("AMP_ENABLE", False, {"AMP_DTYPE": "bfloat16"}),
    Case("AMP_DTYPE", "bfloat16", {"MODEL.RESUME": "{last}", "EVAL_MODE": True}),
    Case("AMP_DTYPE", "bfloat16", {"THROUGHPUT_MODE": True}),
    Case("EVAL_MODE", True, {"MODEL.RESUME": "{last}"}),
    Case("MODEL.RESUME", "{last}", {"EVAL_MODE": True}),
    Case("TEST.PER_CLASS", True, {"MODEL.RESUME": "{last}", "EVAL_MODE": True}),
    Case("TEST.PER_CLASS", True),
    Case("PRINT_FREQ", 2, {"MODEL.RESUME": "{last}", "EVAL_MODE": True}),
)


def run_cases(claimed: set[str]) -> list[Case]:
    """CASES, and one for every other key that is not `claimed` by models or data."""
    listed = {case.key for case in CASES}
    rest = [key for key in KEYS if key not in claimed | listed | SUPERSEDED.keys()]
    usual = {key: SETTINGS.get(key, KEYS[key].default) for key in rest}
    return [*CASES, *(Case(key, next(others(key, value))) for key, value in usual.items())]


# ---- data: fifteen small images in three classes, one of them unreadable, or the digits

FOLDER = {
    "DATA.DATASET": "folder",
    "DATA.DATA_PATH": "{folder}",
    "DATA.IMG_SIZE": 40,
    "DATA.BATCH_SIZE": 4,
    "DATA.NUM_WORKERS": 0,
    "DEVICE": "cpu",
}
DIGITS = FOLDER | {
    "DATA.DATASET": "digits",
    "DATA.DATA_PATH": "",
    "DATA.IMG_SIZE": 16,
    "AUG.AUTO_AUGMENT": "none",
    "AUG.AFFINE": True,
}
ALWAYS_ERASED = {"AUG.REPROB": 1.0}
BY_CUDA = {"DEVICE": "auto"}
ZIPPED = {"DATA.DATASET": "imagenet", "DATA.DATA_PATH": "{zip}", "DATA.ZIP_MODE": True}
UNMIXED = {"AUG.MIXUP": 0.0, "AUG.CUTMIX": 0.0}
DATA_CASES = (
    Case("DATA.BATCH_SIZE", 2),
    Case("DATA.BATCH_SIZE", 2, DIGITS),
    Case("DATA.BATCH_SIZE", 3),
    Case("DATA.DATA_PATH", "{other}"),
    Case("DATA.DATA_PATH", ""),
    Case("DATA.DATASET", "digits"),
    Case("DATA.DOWNLOAD", True, {"DATA.DATASET": "cifar10"}),
    Case("DATA.DOWNLOAD", True, {"DATA.DATASET": "svhn"}),
    Case("DATA.IMG_SIZE", 48),
    Case("DATA.IMG_SIZE", (40, 48)),
    Case("DATA.IMG_SIZE", 8, DIGITS),
    *(
        Case("DATA.INTERPOLATION", name, {"AUG.AUTO_AUGMENT": "none"})
        for name in ("random", "bilinear", "lanczos", "hamming")
    ),
    Case("DATA.INTERPOLATION", "bilinear", DIGITS),
    Case("DATA.CROP_RATIO", 0.5),
    *(
        Case(
            f"DATA.{leaf}",
            (0.1, 0.2, 0.3),
            base | {"DATA.MEAN": (0.5,) * 3, "DATA.STD": (0.5,) * 3},
        )
        for leaf in ("MEAN", "STD")
        for base in ({}, DIGITS)
    ),
    Case("DATA.ZIP_MODE", False, ZIPPED),
    Case("DATA.CACHE_MODE", "no", ZIPPED),
    Case("DATA.CACHE_MODE", "full", ZIPPED),
    Case("DATA.PIN_MEMORY", False, BY_CUDA),
    Case("DATA.PIN_MEMORY", False, DIGITS | BY_CUDA),
    Case("DEVICE", "cpu", BY_CUDA),
    Case("DATA.NUM_WORKERS", 2),
    Case("DATA.NUM_WORKERS", 2, DIGITS),
    Case("DATA.TIMEOUT", 7.0, {"DATA.NUM_WORKERS": 2}),
    Case("DATA.REPEATED_AUG", 2),
    Case("DATA.REPEATED_AUG", 2, DIGITS),
    Case("DATA.CORRUPT_LIMIT", 0),
    Case("MODEL.SWIN.IN_CHANS", 1),
    Case("MODEL.SWIN.IN_CHANS", 1, DIGITS),
    Case("MODEL.LABEL_SMOOTHING", 0.0),
    Case("MODEL.NUM_CLASSES", 4),
    Case("SEED", 1),
    Case("SEED", 1, DIGITS),
    Case("SEED", 1, {"TEST.SHUFFLE": True}),
    Case("AUG.COLOR_JITTER", 0.9, {"AUG.AUTO_AUGMENT": "none"}),
    Case("AUG.AUTO_AUGMENT", "none"),
    Case("AUG.AUTO_AUGMENT", "imagenet"),
    Case("AUG.AUTO_AUGMENT", "rand-m3", DIGITS),
    Case("AUG.SCALE", (0.5, 1.0)),
    Case("AUG.SCALE", (0.08, 0.2)),
    Case("AUG.RATIO", (1.0, 1.3333)),
    Case("AUG.RATIO", (0.75, 1.0)),
    Case("AUG.RANDOM_CROP_PADDING", 4),
    Case("AUG.HFLIP", 0.0),
    Case("AUG.HFLIP", 0.0, DIGITS),
    Case("AUG.AFFINE", True),
    Case("AUG.AFFINE", False, DIGITS),
    *(
        case
        for base in ({}, DIGITS)
        for case in (
            Case("AUG.REPROB", 0.0, base),
            Case("AUG.REMODE", "const", base | ALWAYS_ERASED),
            Case("AUG.REMODE", "rand", base | ALWAYS_ERASED),
            Case("AUG.RECOUNT", 4, base | ALWAYS_ERASED),
            Case("AUG.REAREA", (0.2, 0.3333), base | ALWAYS_ERASED),
            Case("AUG.REAREA", (0.02, 0.1), base | ALWAYS_ERASED),
        )
    ),
    Case("AUG.MIXUP", 0.0),
    Case("AUG.MIXUP", 0.1),
    Case("AUG.CUTMIX", 0.0),
    Case("AUG.CUTMIX", 0.1),
    Case("AUG.CUTMIX_MINMAX", (0.2, 0.3)),
    Case("AUG.CUTMIX_MINMAX", (0.2, 0.3), UNMIXED),
    Case("AUG.MIXUP_PROB", 0.5),
    Case("AUG.MIXUP_SWITCH_PROB", 0.1),
    Case("AUG.MIXUP_MODE", "pair"),
    Case("AUG.MIXUP_MODE", "elem"),
    Case("TEST.CROP", False),
    Case("TEST.SEQUENTIAL", True),
    Case("TEST.SHUFFLE", True),
    Case("TEST.SHUFFLE", True, DIGITS),
)


@contextmanager
def loaders_without_workers():
    """What DataLoaders are asked for, in a list; they load in this process and in plain memory."""
    asked, build = [], torch.utils.data.DataLoader.__init__
    plain = {"num_workers": 0, "pin_memory": False, "timeout": 0}

    def record(loader, *args, **options):
        asked.append({key: options.get(key) for key in (*plain, "persistent_workers")})
        for key in ("persistent_workers", "prefetch_factor"):
            options.pop(key, None)
        build(loader, *args, **options | plain)

    def no_network(*args, download=False, **options):
        raise RuntimeError(f"no files, download {download}")

    with (
        patch("torch.utils.data.DataLoader.__init__", record),
        patch("torch.cuda.is_available", lambda: True),
        patch("torchvision.datasets.CIFAR10", no_network),
        patch("torchvision.datasets.SVHN", no_network),
        patch("sklearn.datasets.load_digits", few_digits),
    ):
        yield asked


def mixed(mixup, images: torch.Tensor, targets: torch.Tensor) -> list:
    """Digests of twenty mixtures of one batch."""
    seed_everything(0)
    return plain([mixup(images.clone(), targets) for _ in range(20)])


def data_seen(settings: dict[str, Any]) -> dict[str, Any] | str:
    """An epoch of training batches, mixed, and the validation batches of both ranks of two, as
    digests, with all that the loaders were asked for; or the error that refuses it.
    """
    try:
        config = config_of(settings)
        with loaders_without_workers() as asked:
            data = build_data(config)
            second = build_data(config, rank=1, world_size=2)
            batches = list(islice(data.train_loader.epoch(0), 4))
            seen = {
                "train": plain(batches),
                "mixed": data.mixup and mixed(data.mixup, *batches[0]),
                "val": plain(list(islice(data.val_loader, 4))),
                "second": plain(list(islice(second.val_loader, 4))),
                "about": [data.num_classes, data.class_names, data.mean, data.std],
                "memory": len(pickle.dumps(second.train_loader.dataset)),
            }
        return seen | {"asked": asked}
    except (ConfigError, DataError) as error:
        return str(error)
