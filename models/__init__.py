"""The backbones, one family a file, each registered in BACKBONES; `build_model` makes one from a
config.
"""

import importlib
import pkgutil

from kernels.linear import evaluation

from .base.backbone import BACKBONES
from .build import build_model
from .cait import CaiT
from .pit import PiT
from .refined_vit import RefinedViT
from .sasa_resnet import SasaResNet
from .swiftformer import SwiftFormer
from .swin_mlp import SwinMLP
from .swin_transformer import SwinTransformer
from .swin_transformer_v2 import SwinTransformerV2
from .t2t import T2TViT
from .timm_models import timm_model
from .vit import VisionTransformer

# a family of its own needs no line here: every file registers what it holds
for _module in pkgutil.iter_modules(__path__):
    if not _module.ispkg:
        importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "BACKBONES",
    "CaiT",
    "PiT",
    "RefinedViT",
    "SasaResNet",
    "SwiftFormer",
    "SwinMLP",
    "SwinTransformer",
    "SwinTransformerV2",
    "T2TViT",
    "VisionTransformer",
    "build_model",
    "evaluation",
    "timm_model",
]
