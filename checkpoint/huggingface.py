"""Names of Hugging Face's transformers -> Swin's and ViT's."""

import re

import torch
from torch import Tensor

from .convert import State, is_rebuilt, rename, source

ATTENTION = re.compile(
    r"^(.*?\.)attention\.(?:self\.|attention\.)?(query|key|value)\.(weight|bias)$"
)
NEW_NAMES = re.compile(r"\.attention\.([qkv])_proj\.")  # since version 5
LONG_NAMES = {"q": "query", "k": "key", "v": "value"}


@source(
    "huggingface",
    r"^(swin|swinv2|vit|deit)?(^|\.)embeddings\.patch_embeddings\.projection\.",
    "'{key}' is a name of Hugging Face's transformers",
)
def from_huggingface(state: State) -> dict[str, Tensor]:
    """Hugging Face's Swin, Swinv2, ViT and DeiT for image classification: separate projections of
    query, key and value become one, the classifier is the head.

    The merged patches, the position index and the scale of the cosines are Swin's. The mask token,
    which classification does not use, is left out.
    """
    position = "pos_embed" if any("cls_token" in key for key in state) else "absolute_pos_embed"
    kept = {
        key: value
        for key, value in state.items()
        if not is_rebuilt(key) and not key.endswith("embeddings.mask_token")
    }
    return rename(
        join_projections(kept),
        (r"^(swin|swinv2|vit|deit)\.", ""),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^embeddings\.norm\.", "patch_embed.norm."),
        (r"^embeddings\.position_embeddings$", position),
        (r"^embeddings\.cls_token$", "cls_token"),
        (r"^embeddings\.distillation_token$", "dist_token"),
        (r"^encoder\.layers\.(?=\d+\.(blocks|downsample)\.)", "layers."),
        (r"^(encoder\.layer|encoder\.layers|layers)\.(?=\d+\.(?!blocks|downsample))", "blocks."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
        (r"\.attention\.(self\.)?(relative_position_bias\.)?", ".attn."),
        (r"\.continuous_position_bias_mlp\.", ".cpb_mlp."),
        (r"^layernorm\.", "norm."),
        (r"^(cls_)?classifier\.", "head."),
        (r"^distillation_classifier\.", "head_dist."),
    )


def join_projections(state: State) -> dict[str, Tensor]:
    """Query, key and value of each attention as one qkv; SwinV2's biases, which the key has not,
    as q_bias and v_bias. A set that is not complete stays as it is.
    """
    parts: dict[str, dict[str, tuple[str, Tensor]]] = {}
    joined = dict(state)
    for key, value in state.items():
        long = NEW_NAMES.sub(lambda match: f".attention.{LONG_NAMES[match[1]]}.", key)
        if found := ATTENTION.match(long):
            parts.setdefault(found[1], {})[f"{found[2]}.{found[3]}"] = (key, value)
    for block, found in parts.items():
        for kind in ("weight", "bias"):
            names = [f"{name}.{kind}" for name in LONG_NAMES.values()]
            if all(name in found for name in names):
                joined[f"{block}attn.qkv.{kind}"] = torch.cat([found[name][1] for name in names])
            elif kind == "bias" and names[0] in found and names[2] in found:
                joined[f"{block}attn.q_bias"] = found[names[0]][1]
                joined[f"{block}attn.v_bias"] = found[names[2]][1]
            else:
                continue
            for name in names:
                joined.pop(found[name][0] if name in found else "", None)
    return joined
