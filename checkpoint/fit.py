"""The rules of fine-tuning: another head, one input channel, other windows and image sizes."""

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .heads import fit_head
from .report import LoadReport
from .resize import grid_extent, resize_absolute, resize_bias_table, table_extent

TABLE = re.compile(r"^(.*\.attn\.)(relative_position_bias_table|modifiers\.\w+\.table)$")
# What other people's models call the layer to the classes.
HEAD_NAMES = ("head", "fc")
# SwinV2's largest coordinate, log2(9) / 3, where the window is the pretrained one.
UNSHIFTED_REACH = 1.0567


def fit(
    model: nn.Module, state: dict[str, Tensor], report: LoadReport, head: str, resize: str
) -> dict[str, Tensor]:
    """Fits a state dict with Swin's names to a model; what no rule covers stays as it is. Notes go
    to the report.

    head: see `heads.fit_head`.
    resize: 'bicubic', 'geometric' or 'auto', see `load_weights`.
    """
    wanted = model.state_dict()
    state = fit_heads(model, state, wanted, report, head)
    if resize == "auto":
        resize = "geometric" if "simmim" in report.format else "bicubic"
    fitted = dict(state)
    for key in [key for key in state if key in wanted]:
        fitted[key] = fit_tensor(key, state, wanted, model, resize)
        if fitted[key] is not state[key]:
            report.resized.append(key)
    warn_of_transfer(fitted, wanted, report)
    return fitted


def kept_heads(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """The layers to the classes that a file can fill as they are: as many classes in both."""
    wanted = model.state_dict()
    names = [f"{name}.weight" for name in getattr(model, "head_names", HEAD_NAMES)]
    return [
        name.removesuffix(".weight")
        for name in names
        if name in wanted and name in state and len(state[name]) == len(wanted[name])
    ]


def fit_heads(
    model: nn.Module,
    state: dict[str, Tensor],
    wanted: Mapping[str, Tensor],
    report: LoadReport,
    mode: str,
) -> dict[str, Tensor]:
    """Fits every layer to the classes that the model has; those of the file go if it has none."""
    names = list(getattr(model, "head_names", HEAD_NAMES))
    present = [name for name in names if f"{name}.weight" in wanted]
    for layer in present or names:
        classes = len(wanted[f"{layer}.weight"]) if layer in present else 0
        state, note = fit_head(state, classes, mode, layer)
        if not note:
            continue
        report.notes.append(note if layer == "head" else f"{layer}: {note}")
        if "mapped" not in note:
            keys = (f"{layer}.weight", f"{layer}.bias")
            report.fresh += [key for key in keys if key in wanted]
    return state


def fit_tensor(
    key: str,
    state: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    model: nn.Module,
    method: str,
) -> Tensor:
    """One tensor in the model's shape where a rule exists, itself where none does."""
    value, like = state[key], wanted[key]
    if found := TABLE.match(key):
        index = found[1] + "relative_position_index"
        return fit_table(value, like, state.get(index), wanted.get(index), method)
    if value.shape == like.shape:
        return value
    if key in ("absolute_pos_embed", "pos_embed") and are_positions(value, like):
        return fit_positions(value, like, model)
    if key == "patch_embed.proj.weight" and like.shape == (value.shape[0], 1, *value.shape[2:]):
        # a grey image repeated over the channels gives the same result
        return value.sum(1, keepdim=True)
    return value


def are_positions(value: Tensor, like: Tensor) -> bool:
    """Whether both are (1, positions, C) with the same C."""
    return value.dim() == like.dim() == 3 and value.shape[-1] == like.shape[-1]


def fit_positions(value: Tensor, like: Tensor, model: nn.Module) -> Tensor:
    """An absolute position embedding (1, prefix + positions, C) for another grid; tokens in front,
    as many in both, keep theirs.

    Where the file's cannot be, because what remains is no square, it is returned as it is, to be
    reported.
    """
    embed = getattr(model, "patch_embed", None)
    # timm calls it grid_size
    grid = getattr(embed, "patches_resolution", None) or getattr(embed, "grid_size", None)
    prefix = like.shape[1] - grid[0] * grid[1] if grid else 0
    positions = value.shape[1] - prefix
    if prefix and (positions < 1 or math.isqrt(positions) ** 2 != positions):
        return value
    extent = grid_extent(like.shape[1] - prefix, tuple(grid) if grid else None)
    fitted = resize_absolute(value[:, prefix:], grid_extent(positions), extent)
    return torch.cat([value[:, :prefix], fitted], dim=1)


def fit_table(
    value: Tensor, like: Tensor, index: Tensor | None, like_index: Tensor | None, method: str
) -> Tensor:
    """A table over relative offsets (T, heads); the indices tell windows that are not square."""
    if value.shape[1:] != like.shape[1:] or (value.shape == like.shape and index is None):
        return value
    source = table_extent(len(value), index)
    target = table_extent(len(like), like_index)
    return resize_bias_table(value, source, target, method)


def warn_of_transfer(
    state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], report: LoadReport
) -> None:
    """SwinV2 with another window, but coordinates that do not know the window of pre-training."""
    tables = [
        key
        for key in state
        if key.endswith("relative_coords_table")
        and key in wanted
        and state[key].shape != wanted[key].shape
    ]
    stages = {
        int(key.split(".")[1]): (state[key].shape[1] + 1) // 2
        for key in tables
        if wanted[key].abs().max() < UNSHIFTED_REACH
    }
    if stages:
        windows = ", ".join(f"stage {stage}: {window}" for stage, window in sorted(stages.items()))
        report.notes.append(
            f"the file's windows ({windows}) differ from the model's and PRETRAINED_WINDOW_SIZES"
            " does not say so: its position bias will be stretched"
        )
