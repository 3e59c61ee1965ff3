"""Register tokens: files differ in whether a position embedding covers them."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .grids import Grid


def match_registers(
    state: dict[str, Tensor],
    wanted: Mapping[str, Tensor],
    target: Grid | None,
    source: Grid | None,
) -> tuple[dict[str, Tensor], str | None]:
    """A file with registers for a model with registers whose positions are those of class token and
    patches, as this project's: timm's ViTs give positions to the patches alone, or to all tokens.

    The function stays the same: a register's position is added to the register, and a class token
    without one gets zeros. What is none of these forms stays as it is, to be compared.

    Args:
        wanted: the model's state dict.
        target, source: grids of the patches, in the model and in the file (None: not known; then as
            many patches as in the model, or a square of them).
    Returns: the state dict, and a note for the report if it changed.
    """
    tensors = [where.get(key) for where in (state, wanted) for key in ("reg_token", "pos_embed")]
    if target is None or any(tensor is None or tensor.dim() != 3 for tensor in tensors):
        return state, None
    registers, positions, _, like = tensors
    classes = int("cls_token" in wanted)
    if like.shape[1] != classes + _area(target) or classes != ("cls_token" in state):
        return state, None
    everything = classes + registers.shape[1]
    lead = _lead(positions.shape[1], (classes, 0, everything), target, source)
    if lead in (None, classes):
        return state, None
    if lead == 0:
        positions = torch.cat([torch.zeros_like(positions[:, :classes]), positions], 1)
        note = "the file's class token has no position: zeros"
    else:
        own = positions[:, classes:everything]
        if own.shape != registers.shape:
            return state, None
        registers = registers + own
        positions = torch.cat([positions[:, :classes], positions[:, everything:]], 1)
        note = "the positions of the file's registers were added to reg_token"
    return {**state, "reg_token": registers, "pos_embed": positions}, note


def _area(grid: Grid) -> int:
    return grid[0] * grid[1]


def _lead(rows: int, leads: tuple[int, ...], target: Grid, source: Grid | None) -> int | None:
    """How many of `rows` positions stand in front of those of the patches; None if unclear."""
    counts = {lead: rows - lead for lead in leads}
    if source is not None:
        fits = [lead for lead in counts if counts[lead] == _area(source)]
    else:
        same = [lead for lead in counts if counts[lead] == _area(target)]
        fits = same or [lead for lead, count in counts.items() if _is_square(count)]
    return fits[0] if fits and (len(fits) == 1 or fits[0] == leads[0]) else None


def _is_square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count
