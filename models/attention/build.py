"""An attention module for a place: softmax attention with its modifiers, or the mixer that stands
in for it.
"""

from torch import nn

from .geometry import Geometry
from .global_attention import GlobalAttention
from .mixed import GlobalMixer, WindowMixer
from .softmax import SoftmaxAttention
from .spec import AttentionSpec


def global_attention(geometry: Geometry, spec: AttentionSpec, **options) -> nn.Module:
    """(B, N, C) -> (B, N, C) on the whole grid of `geometry`; `options` are those of
    GlobalAttention.

    Raises: ValueError where a mixer cannot take what is asked.
    """
    return (GlobalAttention if spec.mixer == "softmax" else GlobalMixer)(geometry, spec, **options)


def window_attention(
    kind: type[SoftmaxAttention], geometry: Geometry, spec: AttentionSpec, **options
) -> nn.Module:
    """(B, H, W, C), layout -> (B, H, W, C) within windows; `kind` is the family's softmax
    attention, `options` are its own.

    Raises: ValueError where a mixer cannot take what is asked.
    """
    return (kind if spec.mixer == "softmax" else WindowMixer)(geometry, spec, **options)
