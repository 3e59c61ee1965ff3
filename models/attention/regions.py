"""Regions of shifted and padded windows. What the mask of attention keeps apart must not meet in
another way either, such as a convolution over the map.
"""

from collections.abc import Callable
from itertools import groupby

import torch
from torch import Tensor

from kernels.window_attention import WindowLayout
from kernels.window_attention.layout import cache_tensors


def region_means(v: Tensor, layout: WindowLayout) -> Tensor:
    """The mean of each region: (B, H, W, C) -> (B, R, S, C), float32 or wider, for R regions along
    the rows of the grid and S along its columns.
    """
    wide = torch.promote_types(v.dtype, torch.float32)
    axes = zip(layout.grid, layout.window, layout.shift, strict=True)
    for dim, axis in enumerate(axes, 1):
        regions = axis_regions(*axis)
        parts = v.split([size * count for size, count in regions], dim)
        means = [
            part.unflatten(dim, (count, size)).mean(dim + 1, dtype=wide)
            for part, (size, count) in zip(parts, regions, strict=True)
        ]
        v = means[0] if len(means) == 1 else torch.cat(means, dim)
    return v


def spread_regions(means: Tensor, layout: WindowLayout) -> Tensor:
    """To each token what its region has: (B, R, S, C) -> (B, H, W, C), a view where one region is
    the grid. Of `region_means(v)` it makes U v: the mean of what each token sees, itself included.
    """
    axes = [*zip(layout.grid, layout.window, layout.shift, strict=True)]
    for dim in (2, 1):  # the rows last: they copy most
        regions = axis_regions(*axes[dim - 1])
        parts = means.split([count for _, count in regions], dim)
        tokens = [_repeat(part, dim, size) for part, (size, _) in zip(parts, regions, strict=True)]
        means = tokens[0] if len(tokens) == 1 else torch.cat(tokens, dim)
    return means


def _repeat(part: Tensor, dim: int, times: int) -> Tensor:
    """Each entry along `dim` `times` times in a row."""
    shape = list(part.shape)
    shape.insert(dim + 1, times)
    return part.unsqueeze(dim + 1).expand(shape).flatten(dim, dim + 1)


def axis_regions(length: int, window: int, shift: int) -> list[tuple[int, int]]:
    """(size, how many) of the regions along an axis of `length` tokens, in order: the `shift`
    tokens that the roll takes from the front, whole windows, and a rest.
    """
    front = min(shift, length)
    whole, rest = divmod(length - front, window)
    return [
        (size, count) for size, count in ((front, 1), (window, whole), (rest, 1)) if size and count
    ]


def zero_masked(maps: Tensor, mask: Tensor | None) -> Tensor:
    """Sets the pairs that the mask forbids to zero: maps (B*nW, H, N, N), mask (nW, N, N)."""
    if mask is None:
        return maps
    return (maps.unflatten(0, (-1, len(mask))) * (mask == 0)[:, None]).flatten(0, 1)


def by_region(maps: Tensor, layout: WindowLayout | None, mix: Callable[[Tensor], Tensor]) -> Tensor:
    """`mix`, which mixes neighbouring pairs of a map, within the pairs of each region by itself: to
    its pairs all others are zeros, as beyond the edge of the map.

    Windows are taken together by the regions they have, so that `mix` runs once for windows of one
    region, which most are, and at most four times for the last window of a shifted map.
    Shapes: maps (B*nW, G, N, N) -> the same.
    """
    if layout is None or layout.mask is None:
        return mix(maps)
    rows, columns = (
        axis_kinds(*axis) for axis in zip(layout.grid, layout.window, layout.shift, strict=True)
    )
    down, across = ([count for count, _ in kinds] for kinds in (rows, columns))
    strips = []
    for (_, row), strip in zip(
        rows, maps.unflatten(0, (-1, sum(down), sum(across))).split(down, 1), strict=True
    ):
        parts = zip(columns, strip.split(across, 2), strict=True)
        strips.append(
            torch.cat([_mix_apart(part, row, column, mix) for (_, column), part in parts], 2)
        )
    return torch.cat(strips, 1).flatten(0, 2)


def axis_kinds(length: int, window: int, shift: int) -> list[tuple[int, tuple[int, ...]]]:
    """The windows along an axis of `length` tokens, in order, as (how many in a row, region of each
    token): regions are numbered from 0 within a window, and padding is one of them.
    """
    padded = -(-length // window) * window
    kinds = []
    for first in range(0, padded, window):
        places = [(place + shift) % padded for place in range(first, first + window)]
        # after the roll: padding, what the roll brought from the front, and all else
        marks = [(place >= length, place < shift) for place in places]
        order = list(dict.fromkeys(marks))
        kinds.append(tuple(order.index(mark) for mark in marks))
    return [(len(list(alike)), kind) for kind, alike in groupby(kinds)]


def _mix_apart(
    part: Tensor, rows: tuple[int, ...], columns: tuple[int, ...], mix: Callable[[Tensor], Tensor]
) -> Tensor:
    """part (B, down, across, G, N, N), windows whose rows and columns have these regions."""
    shape = part.shape[:3]
    maps = part.flatten(0, 2)
    count = (1 + max(rows)) * (1 + max(columns))
    if count == 1:
        return mix(maps).unflatten(0, shape)
    apart = _pairs_apart(rows, columns, part.device)
    mixed = sum(mix(maps.masked_fill(pairs, 0)).masked_fill(pairs, 0) for pairs in apart)
    return mixed.unflatten(0, shape)


@cache_tensors
def _pairs_apart(rows: tuple[int, ...], columns: tuple[int, ...], device: torch.device) -> Tensor:
    """(regions, N, N) bool: the pairs that do not lie in each region, on the CPU first."""
    row, column = (torch.tensor(axis, device="cpu") for axis in (rows, columns))
    region = (row[:, None] * (1 + max(columns)) + column).flatten()
    within = region == torch.arange((1 + max(rows)) * (1 + max(columns)), device="cpu")[:, None]
    return ~(within[:, :, None] & within[:, None, :]).to(device)
