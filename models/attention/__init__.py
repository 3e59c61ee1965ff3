"""Attention: one formula, and the modifications of it that a config switches on."""

from .softmax import SoftmaxAttention, WindowAttention, WindowAttentionV2
from .spec import AttentionSpec

__all__ = ["AttentionSpec", "SoftmaxAttention", "WindowAttention", "WindowAttentionV2"]
