"""Settings that somebody has written down and that do nothing beside others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from models import BACKBONES

Condition = tuple[str, Callable[[Any], bool]]  # a key, and the values beside which another acts


def _is(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value in values


def _is_not(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value not in values


# Key: what it needs.
NEEDS: dict[str, Condition] = {
    "MODEL.PRE_MLP.RATIO": ("MODEL.PRE_MLP.WHERE", _is_not("off")),
    "MODEL.PRE_MLP.DROP_PATH": ("MODEL.PRE_MLP.WHERE", _is_not("off")),
    "MODEL.INIT_OVER_PRETRAINED": ("EVAL_MODE", _is(False)),
    "MODEL.EMA.DECAY": ("MODEL.EMA.ENABLE", _is(True)),
    "MODEL.EMA.EVAL": ("MODEL.EMA.ENABLE", _is(True)),
    "MODEL.REFINED_VIT.COS_PAIRS": ("MODEL.REFINED_VIT.COS_REG", _is_not(0)),
    "MODEL.SASA_RESNET.STEM_HEADS": ("MODEL.SASA_RESNET.STEM", _is("attention")),
    "MODEL.SASA_RESNET.STEM_MIXTURES": ("MODEL.SASA_RESNET.STEM", _is("attention")),
    "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": ("TRAIN.LR_SCHEDULER.NAME", _is("step")),
    "TRAIN.LR_SCHEDULER.DECAY_RATE": ("TRAIN.LR_SCHEDULER.NAME", _is("step")),
    "TRAIN.LR_SCHEDULER.GAMMA": ("TRAIN.LR_SCHEDULER.NAME", _is("multistep")),
    "TRAIN.LR_SCHEDULER.MULTISTEPS": ("TRAIN.LR_SCHEDULER.NAME", _is("multistep")),
    "TRAIN.LR_SCHEDULER.WARMUP_PREFIX": ("TRAIN.LR_SCHEDULER.NAME", _is("cosine")),
    "TRAIN.OPTIMIZER.MOMENTUM": (
        "TRAIN.OPTIMIZER.NAME",
        lambda name: name == "sgd" or name.startswith("timm:"),
    ),
    "TRAIN.OPTIMIZER.BETAS": ("TRAIN.OPTIMIZER.NAME", _is_not("sgd")),
    "TRAIN.OPTIMIZER.EPS": ("TRAIN.OPTIMIZER.NAME", _is_not("sgd")),
    "TRAIN.DISTILL.ALPHA": ("TRAIN.DISTILL.KIND", _is_not("none")),
    "TRAIN.DISTILL.TAU": ("TRAIN.DISTILL.KIND", _is("soft")),
    "AUG.COLOR_JITTER": ("AUG.AUTO_AUGMENT", _is("none", "")),
    "AUG.REMODE": ("AUG.REPROB", _is_not(0)),
    "AUG.RECOUNT": ("AUG.REPROB", _is_not(0)),
    "AUG.REAREA": ("AUG.REPROB", _is_not(0)),
    "AMP_DTYPE": ("AMP_ENABLE", _is(True)),
    "DATA.CACHE_MODE": ("DATA.ZIP_MODE", _is(True)),
}


def inert(
    written: Mapping[str, Any], values: Mapping[str, Any], defaults: Mapping[str, Any]
) -> Iterator[str]:
    """One line for each setting among `written` that is not its default and has no effect beside
    the `values` of all keys: of another family's section, or where its part is off.
    """
    family = values["MODEL.TYPE"].upper()
    others = {f"MODEL.{name.upper()}." for name in BACKBONES} - {f"MODEL.{family}."}
    for key, value in written.items():
        if value == defaults[key]:
            continue
        section = key[: key.rfind(".") + 1]
        if section in others:
            own = f"MODEL.{family}.{key[len(section) :]}"
            hint = f"; did you mean {own}?" if own in defaults else ""
            yield f"{key} {value!r} has no effect: MODEL.TYPE is {values['MODEL.TYPE']}{hint}"
        elif key in NEEDS and not NEEDS[key][1](values[NEEDS[key][0]]):
            needed = NEEDS[key][0]
            yield f"{key} {value!r} has no effect: {needed} is {values[needed]!r}"
