"""Names of other implementations -> Swin's. Pure functions from state dict to state dict; tensors
are shared, not copied.

A source is one decorated function: how its names are recognised, and what they become.
"""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from registry import Registry

from .errors import CheckpointError

State = Mapping[str, Tensor]
# What a model rebuilds from its geometry; the values in a file are never used (k_bias: timm's
# constant zero).
REBUILT = ("relative_position_index", "relative_coords_table", "attn_mask", "k_bias")


class Source(NamedTuple):
    """An implementation with names of its own. recognise: the reason why a state dict is one of
    its, or None. convert: its names -> Swin's.
    """

    recognise: Callable[[State], str | None]
    convert: Callable[[State], dict[str, Tensor]]


# Recognised before the others: Hugging Face's bare models have an encoder too, and an encoder's
# weights may themselves carry old names, which are converted afterwards.
FIRST = ("huggingface", "simmim")
SOURCES = Registry("checkpoint source")


def source(name: str, pattern: str, reason: str, also: Callable[[State], str | None] | None = None):
    """Registers a function as the conversion of state dicts of which a key matches `pattern`.

    reason: shown to the user, with {key} for the first such key.
    also: another way to recognise them, which returns the reason or None.
    """

    def recognise(state: State) -> str | None:
        found = next((key for key in state if re.search(pattern, key)), None)
        if found is not None:
            return reason.format(key=found)
        return also(state) if also else None

    def add(convert: Callable[[State], dict[str, Tensor]]):
        SOURCES.register(name, Source(recognise, convert))
        return convert

    return add


def is_rebuilt(key: str) -> bool:
    """True for buffers that follow from image and window size alone."""
    return key.rsplit(".", 1)[-1] in REBUILT


def detect(state: State) -> tuple[str, str]:
    """Which implementation's names a state dict uses, and the reason.

    Returns: (format, reason), format one of SOURCES, "reference" (Swin's names) or "unknown".
    """
    for name in sorted(SOURCES, key=lambda name: (name not in FIRST, name)):
        if reason := SOURCES[name].recognise(state):
            return name, reason
    if "patch_embed.proj.weight" in state and any(key.startswith("layers.0.") for key in state):
        return "reference", "patch_embed.*, layers.N.* as released"
    return "unknown", f"no key of a Swin model, e.g. '{next(iter(state), '')}'"


def to_reference(state: State) -> tuple[dict[str, Tensor], list[tuple[str, str]]]:
    """Converts until the names are Swin's.

    Returns: the converted dict and the steps taken, each (format, reason); empty if nothing had to
        change.
    """
    steps = []
    while (found := detect(state))[0] in SOURCES:
        name, reason = found
        if name in [done for done, _ in steps]:
            raise CheckpointError(
                f"cannot make sense of the key names: {reason} even after converting from {name}"
            )
        steps.append(found)
        state = SOURCES[name].convert(state)
    return dict(state), steps


def rename(state: State, *rules: tuple[str, str]) -> dict[str, Tensor]:
    """Applies regular-expression substitutions to every key. Raises CheckpointError if two keys
    become one.
    """
    renamed = {}
    for key, value in state.items():
        new = key
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        if new in renamed:
            raise CheckpointError(f"two keys of the file both mean '{new}', one of them '{key}'")
        renamed[new] = value
    return renamed


@source("simmim", r"^encoder\.", "'{key}' has the prefix encoder.")
def from_simmim(state: State) -> dict[str, Tensor]:
    """A masked-image-modelling or self-supervised file: keeps `encoder.*` without the prefix, drops
    decoder and mask token.
    """
    encoder = {
        key.removeprefix("encoder."): value
        for key, value in state.items()
        if key.startswith("encoder.")
    }
    encoder.pop("mask_token", None)
    return from_rpe_mlp(encoder)


@source("rpe_mlp", r"\.rpe_mlp\.", "'{key}' is an early name of cpb_mlp")
def from_rpe_mlp(state: State) -> dict[str, Tensor]:
    """SwinV2's early name of the continuous position bias: rpe_mlp -> cpb_mlp."""
    return rename(state, (r"\.rpe_mlp\.", ".cpb_mlp."))


def merges_at_the_start(state: State) -> str | None:
    """timm's place of the patch merging, where there is no head to tell."""
    merging = "layers.{}.downsample.reduction.weight"
    if merging.format(1) in state and merging.format(0) not in state:
        return "patch merging stands at the start of stage 1, none in stage 0"
    return None


@source("timm", r"^head\.fc\.", "'{key}' is timm's name of the head", also=merges_at_the_start)
def from_timm(state: State) -> dict[str, Tensor]:
    """timm's Swin and SwinV2: patch merging opens the next stage (layers.1.downsample is Swin's
    layers.0.downsample), the head is head.fc. The order of the merged patches and q_bias, v_bias
    are Swin's.
    """
    moved = rename(
        {key: value for key, value in state.items() if not is_rebuilt(key)},
        (r"^head\.fc\.", "head."),
    )
    return {
        re.sub(
            r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) - 1}.downsample.", key
        ): value
        for key, value in moved.items()
    }


@source(
    "torchvision",
    r"^features\.0\.0\.",
    "'{key}' stands where torchvision keeps the patch embedding",
)
def from_torchvision(state: State) -> dict[str, Tensor]:
    """torchvision's Swin and SwinV2: features.{2s+1}.{b} is block b of stage s, features.{2s+2} the
    merging after it.

    SwinV2 stores one qkv.bias (3C) whose key third its forward sets to zero: it becomes q_bias and
    v_bias. The merged patches stand in Swin's order. The position index is stored flat there and is
    rebuilt here.
    """
    kept = {torchvision_key(key): value for key, value in state.items() if not is_rebuilt(key)}
    for key in [key for key in kept if key.endswith(".attn.qkv.bias")]:
        attn = key.removesuffix("qkv.bias")
        if attn + "logit_scale" in kept:
            kept[attn + "q_bias"], _, kept[attn + "v_bias"] = kept.pop(key).chunk(3)
    return kept


def torchvision_key(key: str) -> str:
    """features.N.* -> the name that Swin gives it; others stay."""
    if not (found := re.match(r"features\.(\d+)\.(.+)", key)):
        return key
    place, rest = int(found[1]), found[2]
    if place == 0:
        return "patch_embed." + re.sub(r"^2\.", "norm.", re.sub(r"^0\.", "proj.", rest))
    if place % 2 == 0:
        return f"layers.{place // 2 - 1}.downsample.{rest}"
    rest = rest.replace(".mlp.0.", ".mlp.fc1.").replace(".mlp.3.", ".mlp.fc2.")
    return f"layers.{place // 2}.blocks.{rest}"


@source(
    "identity",
    r"\.(qk_weight_residual|rp_affine\.|cpw_mlp\.)|(^|\.)pre_norm\.",
    "'{key}' is a name of the original identity-sharpened implementation",
)
def from_identity(state: State) -> dict[str, Tensor]:
    """The original identity-sharpened implementation
    (AllenHaoHuang/improving-redundancy-in-attention).

    Its constant `qk_weight_residual` [I | I | 0] is dropped (the qk_residual modifier is that
    constant), the weight table or cpw_mlp is crpw, pre_norm and pre_mlp are one pre_mlp. The qkv
    weights stay the residual: W, not W + I.
    Raises: CheckpointError if a stored qk_weight_residual is not that constant.
    """
    for key in [key for key in state if key.endswith(".qk_weight_residual")]:
        check_identity(key, state[key])
    return rename(
        {key: value for key, value in state.items() if not key.endswith(".qk_weight_residual")},
        (r"\.rp_affine\.relative_position_weight_table$", ".modifiers.crpw.table"),
        (r"\.rp_affine\.", "."),
        (r"\.attn\.cpw_mlp\.", ".attn.modifiers.crpw.mlp."),
        (r"(^|\.)pre_mlp\.(?!mlp\.|norm\.)", r"\1pre_mlp.mlp."),
        (r"(^|\.)pre_norm\.", r"\1pre_mlp.norm."),
    )


def check_identity(key: str, residual: Tensor) -> None:
    """Raises CheckpointError unless a stored residual is the constant [I; I; 0]."""
    width = min(residual.shape)
    rows = residual if residual.shape[1] == width else residual.mT  # (3C, C); V1 stores (C, 3C)
    eye = torch.eye(width, dtype=rows.dtype)
    constant = torch.cat((eye, eye, torch.zeros_like(eye)))
    if rows.shape != constant.shape or not torch.equal(rows, constant):
        raise CheckpointError(
            f"'{key}' is not the constant [I; I; 0] (shape {tuple(residual.shape)}), so it cannot"
            " become qk_residual"
        )


@source(
    "swiftformer",
    r"^(network\.\d+\.|dist_head\.)",
    "'{key}' is a name of the released SwiftFormer",
)
def from_swiftformer(state: State) -> dict[str, Tensor]:
    """The released SwiftFormer: `network` alternates stages and downsamplings, patch_embed is stem,
    dist_head is head_dist, layer scales are bare parameters.
    """
    renamed = rename(
        state,
        (r"^dist_head\.", "head_dist."),
        (r"^patch_embed\.", "stem."),
        (r"\.Proj\.", ".proj."),
    )
    places = {swiftformer_place(key): value for key, value in renamed.items()}
    return rename(places, (r"(layer_scale(_\d)?)$", r"\1.gamma"))


def swiftformer_place(key: str) -> str:
    """network.N.* -> the block or downsampling of a stage; others stay."""
    if not (found := re.match(r"network\.(\d+)\.(.*)", key)):
        return key
    index = int(found[1])
    part = "downsample" if index % 2 else "blocks"
    return f"stages.{(index + 1) // 2}.{part}.{found[2]}"
