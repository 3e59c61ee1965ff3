"""Small models for tests, and the ways identity sharpening can be switched on."""

import itertools

import torch

from models import SwinMLP, SwinTransformer, SwinTransformerV2
from models.attention import AttentionSpec

FAMILIES = {"swin": SwinTransformer, "swinv2": SwinTransformerV2, "swin_mlp": SwinMLP}
ATTENTION_FAMILIES = ("swin", "swinv2")
GRID = list(itertools.product((False, True), repeat=3))


def identity_options(qk_residual: bool, crpw: bool, pre_mlp: bool) -> dict:
    """Constructor arguments of one of the 2 x 2 x 2 combinations."""
    modifiers = ("qk_residual",) * qk_residual + ("crpw",) * crpw
    return {"attention": AttentionSpec(modifiers), "pre_mlp": "stage" if pre_mlp else "off"}


def small(family: str, **changes) -> torch.nn.Module:
    """Two stages on 8 x 8 and 4 x 4 tokens, window 4, 10 classes."""
    options = dict(img_size=16, patch_size=2, num_classes=10, embed_dim=8, depths=(2, 1), num_heads=(2, 4), window_size=4, mlp_ratio=2.0,
                   drop_path_rate=0.0)
    if family == "swinv2":
        options["pretrained_window_sizes"] = (0, 0)
    return FAMILIES[family](**{**options, **changes})


def randomise(model: torch.nn.Module, std: float = 0.3, seed: int = 0) -> torch.nn.Module:
    """Gives every parameter random values, so that a wrong sign, order or missing term shows; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model
