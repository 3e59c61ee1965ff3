"""Attention: one formula, and the modifications of it that a config switches on."""

from .geometry import Geometry
from .global_attention import GlobalAttention
from .softmax import SoftmaxAttention, WindowAttention, WindowAttentionV2
from .spec import AttentionSpec

__all__ = [
    "AttentionSpec",
    "Geometry",
    "GlobalAttention",
    "SoftmaxAttention",
    "WindowAttention",
    "WindowAttentionV2",
]
