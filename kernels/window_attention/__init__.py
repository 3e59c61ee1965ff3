"""Window attention with learned weights and biases over relative offsets; see `reference.py` for
the formula.
"""

from .epilogue import Epilogue, apply_epilogue
from .interface import BACKENDS, explain, window_attention
from .layout import (
    WindowLayout,
    relative_position_index,
    window_layout,
    window_partition,
    window_reverse,
)
from .reference import window_attention_reference
from .terms import OffsetTerms

__all__ = [
    "BACKENDS",
    "Epilogue",
    "OffsetTerms",
    "WindowLayout",
    "apply_epilogue",
    "explain",
    "relative_position_index",
    "window_attention",
    "window_attention_reference",
    "window_layout",
    "window_partition",
    "window_reverse",
]
