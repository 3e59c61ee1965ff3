"""Attention: one formula, and the modifications of it that a config switches on."""

from .spec import AttentionSpec
from .softmax import SoftmaxAttention, WindowAttention, WindowAttentionV2

__all__ = ["AttentionSpec", "SoftmaxAttention", "WindowAttention", "WindowAttentionV2"]
