"""Small models for tests, and the ways identity sharpening can be switched on."""

import itertools

import torch

from models import (
    CaiT,
    PiT,
    RefinedViT,
    SwinMLP,
    SwinTransformer,
    SwinTransformerV2,
    T2TViT,
    VisionTransformer,
    timm_model,
)
from models.attention import AttentionSpec
from models.attention.modifiers import MODIFIERS, OutputModifier, ProjectionModifier
from models.attention.modifiers.mimetic import Mimetic
from models.attention.modifiers.orthogonal import Orthogonal
from registry import parse_call

FAMILIES = {
    "swin": SwinTransformer,
    "swinv2": SwinTransformerV2,
    "swin_mlp": SwinMLP,
    "vit": VisionTransformer,
    "cait": CaiT,
    "pit": PiT,
    "t2t": T2TViT,
    "refined_vit": RefinedViT,
    "timm": timm_model,
}
WINDOW_FAMILIES = ("swin", "swinv2")
GLOBAL_FAMILIES = ("vit", "cait", "pit", "t2t", "refined_vit", "timm")
ATTENTION_FAMILIES = WINDOW_FAMILIES + GLOBAL_FAMILIES
PYRAMID = dict(
    patch_size=2, embed_dim=8, depths=(2, 1), num_heads=(2, 4), window_size=4, mlp_ratio=2.0
)
GLOBAL = dict(embed_dim=8, depth=2, num_heads=2, mlp_ratio=2.0)
OPTIONS = {
    "swin": PYRAMID,
    "swinv2": dict(PYRAMID, pretrained_window_sizes=(0, 0)),
    "swin_mlp": PYRAMID,
    "vit": dict(GLOBAL, patch_size=4),
    "cait": dict(GLOBAL, patch_size=4, class_depth=1, layer_scale=0.1, mixing_bias=False),
    "pit": dict(patch_size=4, embed_dim=8, depths=(1, 1), num_heads=(2, 4), mlp_ratio=2.0),
    "t2t": dict(GLOBAL, token_dim=8),
    "refined_vit": dict(GLOBAL, patch_size=4, mlp_gain=0.1),
    "timm": dict(
        text=(
            "vit_tiny_patch16_224(patch_size=4, embed_dim=8, depth=2, num_heads=2, qk_norm=True,"
            " class_token=False, global_pool='avg')"
        )
    ),
}
# Tried by default on every family, grid and model of timm. The arms of the near-identity family
# have a float64 formula each (tests/models/family) and are tried on one; `make test-long`: on all.
EVERYWHERE = (
    "crpw",
    "elementwise_mask",
    "gaussian_mixture_mask",
    "init_identity",
    "qk_residual",
    "re_attention",
    "refiner",
    "talking_heads",
)
GRID = list(itertools.product((False, True), repeat=3))


def identity_options(qk_residual: bool, crpw: bool, pre_mlp: bool) -> dict:
    """Constructor arguments of one of the 2 x 2 x 2 combinations."""
    modifiers = ("qk_residual",) * qk_residual + ("crpw",) * crpw
    return {"attention": AttentionSpec(modifiers), "pre_mlp": "stage" if pre_mlp else "off"}


def small(family: str, **changes) -> torch.nn.Module:
    """10 classes, 16 x 16 pixels; windows of 4 in two stages on 8 x 8 and 4 x 4 tokens, or two
    blocks of global attention from 4 x 4 on.
    """
    return FAMILIES[family](
        **{"img_size": 16, "num_classes": 10, "drop_path_rate": 0.0, **OPTIONS[family], **changes}
    )


# Term modifiers leave the pairs of a class token alone, and the head reads nothing else: those of
# the last block have no effect.
LAST_BLOCK = {"vit": "blocks.1.attn.modifiers.", "pit": "transformers.1.blocks.0.attn.modifiers."}
NO_GRADIENT = {
    (family, name): place
    for family, place in LAST_BLOCK.items()
    for name in (
        "crpw",
        "elementwise_mask",
        "gaussian_mixture_mask",
        "self_bias",
        "self_weight",
    )
}


# The form of a family that takes what its blocks add to the residual stream or hand down.
OF_BLOCKS = ("branch_gain", "orthogonal_update", "value_residual", "neutreno")
CHAINS = {
    "pit": {"depths": (2, 1)},
    "t2t": {"modified": "blocks"},
    "refined_vit": {"share_every": 1, "carry": False},
}


def modified(family: str, *texts: str, **options) -> torch.nn.Module:
    """`small` with modifiers. T2T's token transformers refuse what needs q, k and v as wide as x;
    its blocks take it. Refined ViT's blocks with a shared map refuse what changes the heads'
    results; without sharing they take it.
    """
    names = [parse_call(text)[0] for text in texts]
    kinds = [MODIFIERS[name] for name in names]

    def any_is(wanted) -> bool:
        return any(isinstance(kind, type) and issubclass(kind, wanted) for kind in kinds)

    changes = {}
    if family == "t2t" and any_is((ProjectionModifier, Mimetic, Orthogonal)):
        changes["modified"] = "blocks"
    if family == "refined_vit" and any_is(OutputModifier):
        changes["share_every"] = 1
    if not set(names).isdisjoint(OF_BLOCKS):
        changes |= CHAINS.get(family, {})
    return small(family, attention=AttentionSpec(texts), **{**changes, **options})


def randomise(model: torch.nn.Module, std: float = 0.3, seed: int = 0) -> torch.nn.Module:
    """Gives every parameter random values, so that a wrong sign, order or missing term shows;
    returns the model.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def size(build, *args, **options) -> int:
    """Parameters of what `build` returns, without memory for them or initial values."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(*args, **options).parameters())
