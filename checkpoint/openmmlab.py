"""Names of OpenMMLab's mmpretrain (once mmcls) -> Swin's."""

import re

from torch import Tensor

from .convert import State, is_rebuilt, rename, source

FINAL_NORM = re.compile(r"^norm(\d+)\.(weight|bias)$")


@source(
    "openmmlab",
    r"^(backbone\.)?stages\.\d+\.blocks\.\d+\.attn\.w_msa\.",
    "'{key}' is a name of OpenMMLab's Swin",
)
def from_openmmlab(state: State) -> dict[str, Tensor]:
    """mmpretrain's Swin and SwinV2: stages are layers, w_msa is attn, ffn is mlp, the norm of the
    last stage is norm.

    Its patch merging gathers with nn.Unfold: channels come pixel by pixel within a channel, row by
    row, where Swin's come channel by channel within a pixel, column by column.
    """
    kept = {
        re.sub(r"^backbone\.", "", key): value
        for key, value in state.items()
        if not is_rebuilt(key)
    }
    norms = [int(found[1]) for key in kept if (found := FINAL_NORM.match(key))]
    renamed = rename(
        kept,
        (rf"^norm{max(norms, default=0)}\.", "norm."),
        (r"^patch_embed\.projection\.", "patch_embed.proj."),
        (r"^pos_embed$", "absolute_pos_embed"),
        (r"^stages\.(\d+)\.", r"layers.\1."),
        (r"\.attn\.w_msa\.", ".attn."),
        (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
        (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
        (r"^head\.fc\.", "head."),
    )
    widths = {
        key.rpartition(".downsample.")[0]: value.shape[-1]
        for key, value in renamed.items()
        if key.endswith(".downsample.reduction.weight")
    }
    return {
        key: swin_order(value)
        if ".downsample." in key
        and value.shape[-1] == widths.get(key.rpartition(".downsample.")[0])
        else value
        for key, value in renamed.items()
    }


def swin_order(value: Tensor) -> Tensor:
    """(..., 4C), index c * 4 + 2 * row + column -> index (2 * column + row) * C + c."""
    if value.shape[-1] % 4:
        return value
    pixels = value.unflatten(-1, (-1, 2, 2))  # (..., C, row, column)
    return pixels.movedim(-3, -1).transpose(-3, -2).flatten(-3)
