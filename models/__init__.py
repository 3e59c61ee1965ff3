"""The backbones; `build_model` makes one from a config."""

from .build import build_model
from .swin_mlp import SwinMLP
from .swin_transformer import SwinTransformer
from .swin_transformer_v2 import SwinTransformerV2

__all__ = ["SwinMLP", "SwinTransformer", "SwinTransformerV2", "build_model"]
