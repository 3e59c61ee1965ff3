"""What the `from_config` of several families read alike, and the settings that only some have."""

from collections.abc import Collection
from typing import Any

from kernels.window_attention.layout import Size
from models.attention import AttentionSpec

# Settings that some families have, with the value at which each asks for nothing.
NEUTRAL: dict[str, Any] = {
    "MODEL.DROP_PATH_PROFILE": "linear",
    "MODEL.PRE_MLP.WHERE": "off",
    "MODEL.SW_MLP": "off",
    "MODEL.DYNAMIC_IMG_SIZE": False,
    "MODEL.ATTENTION.MIXER": "auto",
    "MODEL.ATTENTION.MODIFIERS": [],
    "MODEL.ATTENTION.DROP": 0.0,
    "MODEL.ATTENTION.BACKEND": "auto",
    "MODEL.ATTENTION.LOGIT_SCALE_INIT": 10.0,
    "MODEL.ATTENTION.BIAS_SIGMOID": True,
    "TRAIN.USE_CHECKPOINT": False,
}
WHY_NOT = {
    "MODEL.ATTENTION.BACKEND": "forms every attention map in the open, or none",
    "TRAIN.USE_CHECKPOINT": "has BatchNorm, whose running statistics would be updated twice",
}
# A family names those it has in `optional_settings`, mostly by these groups.
PYRAMID = frozenset(("MODEL.PRE_MLP.WHERE", "MODEL.DYNAMIC_IMG_SIZE"))
SOFTMAX = frozenset(f"MODEL.ATTENTION.{key}" for key in ("MIXER", "MODIFIERS", "DROP", "BACKEND"))
COSINE = frozenset(f"MODEL.ATTENTION.{key}" for key in ("LOGIT_SCALE_INIT", "BIAS_SIGMOID"))
DEPTH = frozenset(("MODEL.DROP_PATH_PROFILE", "TRAIN.USE_CHECKPOINT"))


def refuse_unread(config, families: dict[str, Collection[str]]) -> None:
    """Raises ValueError for a setting that MODEL.TYPE does not read and that asks for something.

    families: MODEL.TYPE -> the keys of NEUTRAL that it reads.
    """
    family = config.MODEL.TYPE
    for key, neutral in NEUTRAL.items():
        value = config
        for name in key.split("."):
            value = value[name]
        if key in families[family] or value == neutral:
            continue
        readers = [other for other, read in families.items() if key in read]
        reason = WHY_NOT.get(key, "has no such part")
        raise ValueError(
            f"{key} {value} is for {_listed(readers)}; {family} {reason}: set it to {neutral}"
        )


def _listed(names: list[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def attention_spec(config, own: str = "softmax") -> AttentionSpec:
    """MODEL.ATTENTION as plain values; mixer auto is the family's `own`."""
    node = config.MODEL.ATTENTION
    return AttentionSpec(
        modifiers=tuple(node.MODIFIERS),
        drop=node.DROP,
        logit_scale_init=node.LOGIT_SCALE_INIT,
        bias_sigmoid=node.BIAS_SIGMOID,
        backend=node.BACKEND,
        mixer=own if node.MIXER == "auto" else node.MIXER,
    )


def pixels(value) -> int | Size:
    """A side, or (rows, columns), as a constructor takes it."""
    return value if isinstance(value, int) else tuple(value)
