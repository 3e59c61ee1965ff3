"""Where the tokens of an image sit when it is cut into windows: partition, cyclic shift, padding,
mask, relative index.

Shapes: B images of H x W tokens, nW windows of N = Mh * Mw tokens, C channels. Windows are numbered
    row by row within an image.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]
MAX_CACHED_BATCHES = 6  # training, evaluation and their last batches, forward and back


def cache_tensors(function: Callable) -> Callable:
    """lru_cache for functions that make small constant tensors; under torch.compile the compiler
    traces the function itself, and what is made in a dispatch mode (fake tensors) stays in it.
    """

    @functools.lru_cache(maxsize=256)
    def cached(*args, **kwargs):
        # Training must be able to use what evaluation leaves here.
        with torch.inference_mode(False):
            return function(*args, **kwargs)

    @functools.wraps(function)
    def call(*args, **kwargs):
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return function(*args, **kwargs)
        return cached(*args, **kwargs)

    return call


def to_pair(size: int | tuple[int, int] | list[int]) -> Size:
    """An int is both sides of a square; a pair is (rows, columns)."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def window_partition(x: Tensor, window_size: int | Size) -> Tensor:
    """(B, H, W, C) -> (B*nW, Mh, Mw, C). Raises: ValueError where H and W are no multiples of the
    window.
    """
    rows, columns = to_pair(window_size)
    batch, height, width, channels = x.shape
    _check_whole(height, width, rows, columns)
    x = x.view(batch, height // rows, rows, width // columns, columns, channels)
    return x.transpose(2, 3).reshape(-1, rows, columns, channels)


def window_reverse(windows: Tensor, window_size: int | Size, height: int, width: int) -> Tensor:
    """(B*nW, Mh, Mw, C) -> (B, H, W, C): undoes `window_partition`, with the same error."""
    rows, columns = to_pair(window_size)
    _check_whole(height, width, rows, columns)
    x = windows.view(-1, height // rows, width // columns, rows, columns, windows.shape[-1])
    return x.transpose(2, 3).reshape(-1, height, width, windows.shape[-1])


def _check_whole(height: int, width: int, rows: int, columns: int) -> None:
    if height % rows or width % columns:
        raise ValueError(
            f"a grid of {height}x{width} tokens cannot be cut into windows of {rows}x{columns}; pad"
            " it to whole windows first"
        )


def relative_position_index(window_size: int | Size, device: torch.device | None = None) -> Tensor:
    """(N, N) int64: row of the offset table for query i and key j, (yi - yj + Mh - 1) * (2 Mw - 1)
    + xi - xj + Mw - 1.
    """
    rows, columns = to_pair(window_size)
    y = torch.arange(rows, device=device).repeat_interleave(columns)
    x = torch.arange(columns, device=device).repeat(rows)
    return (y[:, None] - y + rows - 1) * (2 * columns - 1) + (x[:, None] - x + columns - 1)


def _regions(padded: int, window: int, shift: int) -> Tensor:
    """(padded,) region of each coordinate after the roll: the last window of a shifted axis holds
    two that were not neighbours.
    """
    region = torch.zeros(padded, dtype=torch.long, device="cpu")
    if shift:
        region[padded - window :] = 1
        region[padded - shift :] = 2
    return region


def _padding(length: int, padded: int, shift: int) -> Tensor:
    """(padded,) bool: which coordinates are padding after the roll."""
    return (torch.arange(padded, device="cpu") >= length).roll(-shift)


def _pair_mask(
    grid: Size, padded: Size, window: Size, shift: Size, mask_value: float
) -> Tensor | None:
    """(nW, N, N) float32: 0 or `mask_value` between regions of the shifted map, -inf between an
    image token and padding.
    """
    if shift == (0, 0) and grid == padded:
        return None
    by_axis = [_regions(*axis) for axis in zip(padded, window, shift, strict=True)]
    region = (by_axis[0][:, None] * 3 + by_axis[1])[None, :, :, None]
    region = window_partition(region, window).flatten(1)
    apart = region[:, :, None] != region[:, None, :]
    mask = torch.zeros(apart.shape, device="cpu").masked_fill(apart, mask_value)
    if grid != padded:
        rows, columns = (_padding(*axis) for axis in zip(grid, padded, shift, strict=True))
        outside = window_partition((rows[:, None] | columns)[None, :, :, None], window).flatten(1)
        mask = mask.masked_fill(outside[:, :, None] != outside[:, None, :], float("-inf"))
    return mask


@dataclass(frozen=True, eq=False)
class WindowLayout:
    """How one grid is cut into windows; made by `window_layout`, which caches it.

    grid, padded: tokens (rows, columns) before and after padding.
    tokens: (nW*N,) the padded grid's token behind each window position.
    mask: (nW, N, N) float32 or None.
    mask_value: its entries between tokens that the roll brought together.
    """

    grid: Size
    padded: Size
    window: Size
    shift: Size
    tokens: Tensor
    mask: Tensor | None
    mask_value: float = -100.0
    rows: dict = field(default_factory=dict, repr=False)

    @property
    def num_windows(self) -> int:
        """Windows per image, nW."""
        return self.tokens.numel() // (self.window[0] * self.window[1])

    @property
    def area(self) -> int:
        """Tokens per window, N."""
        return self.window[0] * self.window[1]

    def forbidding(self) -> "WindowLayout":
        """The same with a mask of -inf between tokens that the roll brought together."""
        if self.shift == (0, 0):
            return self
        return window_layout(self.grid, self.window, self.shift, -math.inf, self.tokens.device)

    def head_rows(self, batch: int, parts: int, heads: int) -> tuple[Tensor, Tensor]:
        """Row numbers that turn a token-major matrix into a head-major one, and back; cached for
        the last batch sizes.

        The matrix (B*H*W*parts*heads, D) of a padded grid becomes (parts, B, nW, heads, N, D). One
        gather does the cyclic shift, the partition and the split into heads. Returns (there, back),
        int32 or int64, each as long as the matrix.
        """
        key = (batch, parts, heads)
        if key not in self.rows:
            while len(self.rows) >= MAX_CACHED_BATCHES:
                del self.rows[next(iter(self.rows))]
            self.rows[key] = self._make_head_rows(*key)
        return self.rows[key]

    def _make_head_rows(self, batch: int, parts: int, heads: int) -> tuple[Tensor, Tensor]:
        device = self.tokens.device
        tokens = self.tokens.view(self.num_windows, 1, self.area)
        image = torch.arange(batch, device=device).view(batch, 1, 1, 1) * self.tokens.numel()
        part = torch.arange(parts, device=device).view(parts, 1, 1, 1, 1)
        head = torch.arange(heads, device=device).view(heads, 1)
        there = (((image + tokens) * parts + part) * heads + head).flatten()
        back = torch.empty_like(there)
        back[there] = torch.arange(there.numel(), device=device)
        narrow = torch.int32 if there.numel() < 2**31 else torch.int64
        return there.to(narrow), back.to(narrow)


@cache_tensors
def window_layout(
    grid: Size,
    window: Size,
    shift: Size = (0, 0),
    mask_value: float = -100.0,
    device: torch.device | None = None,
) -> WindowLayout:
    """The layout of a grid that is padded to whole windows (at its end) and rolled up and left by
    `shift` tokens.

    Pairs that the roll brought together are masked by `mask_value` (Swin uses -100, not -inf);
    padding and image tokens never see each other. It is worked out on the CPU, whatever the default
    device, and then moved to `device`.
    Raises: ValueError for sides below 1, for a shift that is not in 0 .. side - 1, and for a mask
        value that is no number.
    """
    if math.isnan(mask_value):
        raise ValueError("window_layout: mask_value is nan; a number or -inf is needed")
    for side, window_side, by in zip(grid, window, shift, strict=True):
        if side < 1 or window_side < 1 or not 0 <= by < window_side:
            raise ValueError(
                f"window_layout: grid {tuple(grid)}, window {tuple(window)}, shift {tuple(shift)};"
                " sides are at least 1 and 0 <= shift < window"
            )
    padded = tuple(-(-length // side) * side for length, side in zip(grid, window, strict=True))
    tokens = (
        torch.arange(padded[0] * padded[1], device="cpu")
        .view(1, *padded, 1)
        .roll((-shift[0], -shift[1]), (1, 2))
    )
    mask = _pair_mask(grid, padded, window, shift, mask_value)
    return WindowLayout(
        grid,
        padded,
        window,
        shift,
        window_partition(tokens, window).flatten().to(device),
        None if mask is None else mask.to(device),
        mask_value,
    )


def pad_grid(x: Tensor, layout: WindowLayout) -> Tensor:
    """(B, H, W, C) -> (B, padded H, padded W, C), zeros at the end of each axis."""
    rows, columns = (
        after - before for after, before in zip(layout.padded, layout.grid, strict=True)
    )
    return F.pad(x, (0, 0, 0, columns, 0, rows)) if rows or columns else x


def crop_grid(x: Tensor, layout: WindowLayout) -> Tensor:
    """Undoes `pad_grid`."""
    return x if layout.grid == layout.padded else x[:, : layout.grid[0], : layout.grid[1]]
