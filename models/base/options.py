"""Settings that only some families have, and values as constructors take them."""

from typing import Any

from kernels.window_attention.layout import Size

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


def pixels(value) -> int | Size:
    """A side, or (rows, columns), as a constructor takes it."""
    return value if isinstance(value, int) else tuple(value)
