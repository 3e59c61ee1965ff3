"""The rules of fine-tuning: another head, one input channel, other windows and image sizes."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .errors import CheckpointError
from .grids import MIXES, PAIRS, POSITIONS, FileGrids, Grid, model_grids, place_of
from .heads import fit_head
from .report import LoadReport
from .resize import resize_absolute, resize_bias_table, resize_map

# What other people's models call the layer to the classes.
HEAD_NAMES = ("head", "fc")


def fit(
    model: nn.Module,
    state: dict[str, Tensor],
    report: LoadReport,
    head: str,
    resize: str,
    grids: FileGrids,
) -> dict[str, Tensor]:
    """Fits a state dict with Swin's names to a model; what no rule covers stays as it is. Notes go
    to the report.

    head: see `heads.fit_head`.
    resize: 'bicubic', 'geometric' or 'auto', see `load_weights`.
    grids: those of the file.
    """
    wanted = model.state_dict()
    state = fit_heads(model, state, wanted, report, head)
    if resize == "auto":
        resize = "geometric" if "simmim" in report.format else "bicubic"
    fitted = dict(state)
    own = model_grids(model)
    for key in [key for key in state if key in wanted]:
        fitted[key] = fit_tensor(key, state[key], wanted[key], own, grids, resize)
        if fitted[key] is not state[key]:
            report.resized.append(key)
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
    value: Tensor,
    like: Tensor,
    own: Mapping[str, Grid],
    grids: FileGrids,
    method: str,
) -> Tensor:
    """One tensor in the model's shape, and on its grid, where a rule exists, itself where none
    does.

    own, grids: the grids of the model's and the file's places.
    """
    place = place_of(key)
    if place is not None:
        return fit_grid(key, value, like, grids[place], own.get(place), method)
    if value.shape == like.shape:
        return value
    if key == "patch_embed.proj.weight" and like.shape == (value.shape[0], 1, *value.shape[2:]):
        # a grey image repeated over the channels gives the same result
        return value.sum(1, keepdim=True)
    return value


def fit_grid(
    key: str,
    value: Tensor,
    like: Tensor,
    source: Grid | None,
    target: Grid | None,
    method: str,
) -> Tensor:
    """A tensor that lies on the tokens of `source` for those of `target`; what has no rule, or
    whose grid nobody knows, as it is, to be compared.
    """
    if MIXES.match(key):
        return value
    if value.dim() == like.dim() == 4 and value.shape[:2] == like.shape[:2]:
        return resize_map(value, like.shape[2:])  # PiT's positions, (1, C, rows, columns)
    if value.dim() != like.dim() or target is None:
        return value
    if key in POSITIONS:
        return fit_positions(value, like, source, target)
    if PAIRS.match(key):
        return fit_pairs(value, like, source, target)
    return fit_table(key, value, like, source, target, method)


def known_or_square(source: Grid | None, count: int, same: bool, target: Grid) -> Grid | None:
    """The file's grid of `count` tokens: what it says, if that is so many; the model's, where both
    have as many tokens (`same`); else a square, if there is one.
    """
    if source and source[0] * source[1] == count:
        return source
    side = math.isqrt(max(count, 0))
    if same:
        return target
    return (side, side) if 0 < side * side == count else None


def fit_positions(value: Tensor, like: Tensor, source: Grid | None, target: Grid) -> Tensor:
    """An absolute position embedding (1, prefix + positions, C) for another grid; tokens in front,
    as many in both, keep theirs.
    """
    if value.dim() != 3 or value.shape[-1] != like.shape[-1]:
        return value
    prefix = like.shape[1] - target[0] * target[1]
    same = value.shape == like.shape
    source = known_or_square(source, value.shape[1] - prefix, same, target)
    if source in (None, target):
        return value
    fitted = resize_absolute(value[:, prefix:], source, target)
    return torch.cat([value[:, :prefix], fitted], dim=1)


def fit_pairs(value: Tensor, like: Tensor, source: Grid | None, target: Grid) -> Tensor:
    """A number for each pair of tokens (N, N), resized over the first and over the second."""
    if value.dim() != 2 or len(value) != value.shape[1]:
        return value
    source = known_or_square(source, len(value), value.shape == like.shape, target)
    if source in (None, target):
        return value
    for _ in range(2):
        value = resize_absolute(value[None], source, target)[0].T
    return value.contiguous()


def fit_table(
    key: str, value: Tensor, like: Tensor, source: Grid | None, target: Grid, method: str
) -> Tensor:
    """A table over relative offsets (T, heads); rows behind those (of class tokens, in timm's BEiT)
    stay.
    """
    if value.shape[1:] != like.shape[1:]:
        return value
    wide = offsets(target)
    count = len(value) - (len(like) - wide[0] * wide[1])
    known = offsets(source) if source else None
    known = known_or_square(known, count, value.shape == like.shape, wide)
    if known is None:
        raise CheckpointError(
            f"{key}: a position table of {count} rows is not square, and nothing in the file tells"
            " its window"
        )
    if known == wide:
        return value
    return torch.cat([resize_bias_table(value[:count], known, wide, method), value[count:]])


def offsets(grid: Grid) -> Grid:
    """Relative offsets (2 rows - 1, 2 columns - 1) of a grid."""
    return 2 * grid[0] - 1, 2 * grid[1] - 1
