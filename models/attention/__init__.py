"""Attention: one formula, and the modifications of it that a config switches on."""

from .geometry import Geometry
from .global_attention import GlobalAttention
from .softmax import SoftmaxAttention
from .spec import AttentionSpec
from .swin_attention import WindowAttention, WindowAttentionV2

__all__ = [
    "AttentionSpec",
    "Geometry",
    "GlobalAttention",
    "SoftmaxAttention",
    "WindowAttention",
    "WindowAttentionV2",
]
