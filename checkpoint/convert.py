"""Names of other implementations -> the reference's names. Pure functions from state dict to state
dict; tensors are shared, not copied.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from .errors import CheckpointError

State = Mapping[str, Tensor]
# What a model rebuilds from its geometry; the values in a file are never used (k_bias: timm's
# constant zero).
REBUILT = ("relative_position_index", "relative_coords_table", "attn_mask", "k_bias")


def is_rebuilt(key: str) -> bool:
    """True for buffers that follow from image and window size alone."""
    return key.rsplit(".", 1)[-1] in REBUILT


def detect(state: State) -> tuple[str, str]:
    """Which implementation's names a state dict uses, and the reason.

    Returns: (format, reason), format one of reference, rpe_mlp, simmim, identity, timm,
        torchvision, swiftformer, unknown.
    """
    for name, (test, reason) in TESTS.items():
        found = next((key for key in state if test(key)), None)
        if found is not None:
            return name, reason.format(key=found)
    if (
        "layers.1.downsample.reduction.weight" in state
        and "layers.0.downsample.reduction.weight" not in state
    ):
        return "timm", "patch merging stands at the start of stage 1, none in stage 0"
    if "patch_embed.proj.weight" in state and any(key.startswith("layers.0.") for key in state):
        return "reference", "patch_embed.*, layers.N.* as released"
    return "unknown", f"no key of a Swin model, e.g. '{next(iter(state), '')}'"


TESTS = {  # in this order: an encoder's weights may themselves carry old names
    "simmim": (lambda key: key.startswith("encoder."), "'{key}' has the prefix encoder."),
    "torchvision": (
        lambda key: key.startswith("features.0.0."),
        "'{key}' stands where torchvision keeps the patch embedding",
    ),
    "identity": (
        lambda key: re.search(
            r"\.(qk_weight_residual|rp_affine\.|cpw_mlp\.)|(^|\.)pre_norm\.", key
        ),
        "'{key}' is a name of the original identity-sharpened implementation",
    ),
    "timm": (lambda key: key.startswith("head.fc."), "'{key}' is timm's name of the head"),
    "swiftformer": (
        lambda key: re.match(r"network\.\d+\.|dist_head\.", key),
        "'{key}' is a name of the released SwiftFormer",
    ),
    "rpe_mlp": (lambda key: ".rpe_mlp." in key, "'{key}' is an early name of cpb_mlp"),
}


def to_reference(state: State) -> tuple[dict[str, Tensor], list[tuple[str, str]]]:
    """Applies the converters until the names are the reference's.

    Returns: the converted dict and the steps taken, each (format, reason); empty if nothing had to
        change.
    """
    steps = []
    while (found := detect(state))[0] in CONVERTERS:
        if found[0] in [name for name, _ in steps]:
            raise CheckpointError(
                f"cannot make sense of the key names: {found[1]} even after converting from"
                f" {found[0]}"
            )
        steps.append(found)
        state = CONVERTERS[found[0]](state)
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


def from_rpe_mlp(state: State) -> dict[str, Tensor]:
    """SwinV2's early name of the continuous position bias: rpe_mlp -> cpb_mlp."""
    return rename(state, (r"\.rpe_mlp\.", ".cpb_mlp."))


def from_timm(state: State) -> dict[str, Tensor]:
    """timm's Swin and SwinV2: patch merging opens the next stage (layers.1.downsample is the
    reference's layers.0.downsample), the head is head.fc. The order of the merged patches and
    q_bias, v_bias are the reference's.
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


def from_torchvision(state: State) -> dict[str, Tensor]:
    """torchvision's Swin and SwinV2: features.{2s+1}.{b} is block b of stage s, features.{2s+2} the
    merging after it.

    SwinV2 stores one qkv.bias (3C) whose key third its forward sets to zero: it becomes q_bias and
    v_bias. The merged patches stand in the reference's order. The position index is stored flat
    there and is rebuilt here.
    """
    kept = {torchvision_key(key): value for key, value in state.items() if not is_rebuilt(key)}
    for key in [key for key in kept if key.endswith(".attn.qkv.bias")]:
        attn = key.removesuffix("qkv.bias")
        if attn + "logit_scale" in kept:
            kept[attn + "q_bias"], _, kept[attn + "v_bias"] = kept.pop(key).chunk(3)
    return kept


def torchvision_key(key: str) -> str:
    if not (found := re.match(r"features\.(\d+)\.(.+)", key)):
        return key
    place, rest = int(found[1]), found[2]
    if place == 0:
        return "patch_embed." + re.sub(r"^2\.", "norm.", re.sub(r"^0\.", "proj.", rest))
    if place % 2 == 0:
        return f"layers.{place // 2 - 1}.downsample.{rest}"
    rest = rest.replace(".mlp.0.", ".mlp.fc1.").replace(".mlp.3.", ".mlp.fc2.")
    return f"layers.{place // 2}.blocks.{rest}"


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
    width = min(residual.shape)
    rows = residual if residual.shape[1] == width else residual.mT  # (3C, C); V1 stores (C, 3C)
    eye = torch.eye(width, dtype=rows.dtype)
    if rows.shape != (3 * width, width) or not torch.equal(
        rows, torch.cat((eye, eye, torch.zeros_like(eye)))
    ):
        raise CheckpointError(
            f"'{key}' is not the constant [I; I; 0] (shape {tuple(residual.shape)}), so it cannot"
            " become qk_residual"
        )


def from_swiftformer(state: State) -> dict[str, Tensor]:
    """The released SwiftFormer: `network` alternates stages and downsamplings, patch_embed is stem,
    dist_head is head_dist, layer scales are bare parameters.
    """
    return {
        re.sub(r"(layer_scale(_\d)?)$", r"\1.gamma", swiftformer_place(key)): value
        for key, value in rename(
            state,
            (r"^dist_head\.", "head_dist."),
            (r"^patch_embed\.", "stem."),
            (r"\.Proj\.", ".proj."),
        ).items()
    }


def swiftformer_place(key: str) -> str:
    if not (found := re.match(r"network\.(\d+)\.(.*)", key)):
        return key
    index = int(found[1])
    return f"stages.{(index + 1) // 2}.{'downsample' if index % 2 else 'blocks'}.{found[2]}"


CONVERTERS = {
    "simmim": from_simmim,
    "torchvision": from_torchvision,
    "identity": from_identity,
    "timm": from_timm,
    "swiftformer": from_swiftformer,
    "rpe_mlp": from_rpe_mlp,
}
