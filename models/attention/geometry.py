"""Where the tokens of an attention module sit: channels, heads, window, and the coordinates of its
offsets.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.window_attention.layout import Size, to_pair


@dataclass(frozen=True)
class Geometry:
    """What a modifier may need to know of the module it modifies.

    dim: channels C.
    num_heads: heads H.
    window: tokens (rows, columns) that attend to each other.
    pretrained_window: the window whose offsets span [-1, 1] in log-spaced coordinates; (0, 0) is
        the window itself.
    prefix: leading tokens that have no place on the grid (class tokens). For attention over a whole
        image the window is its grid.
    head_dim: channels of a head; 0 is dim / num_heads.
    block: its place, from 0, in a chain of blocks that hand the values of the first one down; None
        where blocks hand nothing down.
    """

    dim: int
    num_heads: int
    window: Size
    pretrained_window: Size = (0, 0)
    prefix: int = 0
    head_dim: int = 0
    block: int | None = None

    @property
    def head_channels(self) -> int:
        """Channels of a head, D."""
        return self.head_dim or self.dim // self.num_heads

    @property
    def inner(self) -> int:
        """Channels of q, of k and of v: heads * D, which is C unless `head_dim` says otherwise."""
        return self.num_heads * self.head_channels

    @property
    def num_offsets(self) -> int:
        """T = (2 Mh - 1)(2 Mw - 1), rows of an offset table."""
        return (2 * self.window[0] - 1) * (2 * self.window[1] - 1)

    def own_offset(self) -> Tensor:
        """(T, 1) bool: True in the row of an offset table where a token meets itself, its middle
        row.
        """
        return (torch.arange(self.num_offsets) == self.num_offsets // 2)[:, None]

    def log_coords(self) -> Tensor:
        """(T, 2) float32: log-spaced (row, column) offset behind each row of an offset table."""
        return relative_coords_table(self.window, self.pretrained_window).flatten(0, 2)


def relative_coords_table(
    window_size: int | Size, pretrained_window_size: int | Size = 0
) -> Tensor:
    """(1, 2 Mh - 1, 2 Mw - 1, 2) float32: sign(c) log2(1 + |8 c / (W - 1)|) / 3 of the offset c in
    rows and in columns.

    W is the pretrained window where it is above 0, else the window. A side of one token has the
    single offset 0.
    Source: Swin Transformer V2, arXiv:2111.09883, eq. 4; the factor 8 and the division by log2(8)
        are the released code's.
    """
    axes = []
    for side, pretrained in zip(to_pair(window_size), to_pair(pretrained_window_size), strict=True):
        offsets = (
            torch.arange(1 - side, side, dtype=torch.float32) / max((pretrained or side) - 1, 1) * 8
        )
        axes.append(torch.sign(offsets) * torch.log2(offsets.abs() + 1) / math.log2(8))
    return torch.stack(torch.meshgrid(axes, indexing="ij"), -1)[None]
