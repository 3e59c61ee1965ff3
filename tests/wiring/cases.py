"""Other values for every key, and the runs of main.py in which they have to show."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from config import KEYS, SUPERSEDED, load_config
from tests.wiring.runs import SETTINGS

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


# Leaf of a key: a value worth trying before VALUES.
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


# Wires that need a value of their own, company, or more than one case. Files in braces are those
# of a finished run: {last}, {weights}, {partial}, {other}, {reversed}, {yaml}.
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
    Case(
        "TRAIN.RESUME_CHANGED",
        True,
        {
            "MODEL.RESUME": "{last}",
            "TRAIN.EPOCHS": 2,
            "MODEL.ATTENTION.MODIFIERS": ["qk_residual"],
        },
    ),
    Case("MODEL.HEAD_RESET", True, {"MODEL.PRETRAINED": "{weights}"}),
    Case("MODEL.PARTIAL_LOAD", True, {"MODEL.PRETRAINED": "{partial}"}),
    Case("MODEL.ENTRY", "ema", {"MODEL.PRETRAINED": "{average}"}),
    Case(
        "MODEL.INIT_OVER_PRETRAINED",
        True,
        {"MODEL.PRETRAINED": "{weights}", "MODEL.ATTENTION.MODIFIERS": ["init_identity"]},
    ),
    Case("MODEL.MATCH_CLASSES", False, {"MODEL.PRETRAINED": "{reversed}"}),
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
