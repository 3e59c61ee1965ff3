"""What the blocks of Swin, SwinV2 and Swin-MLP share: which window and shift a block ends up with,
and its layout on a grid.
"""

import torch
from torch import Tensor, nn

from kernels.window_attention.layout import Size, WindowLayout, to_pair, window_layout
from models.attention.geometry import Geometry
from models.layers.init import own_random_numbers
from models.layers.mlp import Mlp
from models.layers.sw_mlp import make_sw_mlp

from .attention_block import BranchEditor


def clamp_window(resolution: Size, window_size: int | Size, shifted: bool) -> tuple[Size, Size]:
    """(window, shift) of a block on a map of `resolution` tokens: a shift is half the window.

    A window given as one number is cut to the shorter side of the map, and then nothing is shifted,
    as in Swin; one given as (rows, columns) is cut side by side.
    """
    if isinstance(window_size, int):
        if min(resolution) <= window_size:
            return to_pair(min(resolution)), (0, 0)
        shift = window_size // 2 if shifted else 0
        return to_pair(window_size), to_pair(shift)
    window = tuple(
        min(side, length) for side, length in zip(to_pair(window_size), resolution, strict=True)
    )
    shift = tuple(
        side // 2 if shifted and length > side else 0
        for side, length in zip(window, resolution, strict=True)
    )
    return window, shift


def one_number(pair: Size) -> int | Size:
    """(a, a) -> a; other pairs stay."""
    return pair[0] if pair[0] == pair[1] else pair


class WindowBlock(nn.Module):
    """Base of a block that works within windows of a map.

    Attributes window_size and shift_size are what the block ended up with, an int where both sides
    agree.
    """

    def __init__(
        self,
        dim: int,
        input_resolution: Size,
        num_heads: int,
        window_size: int | Size,
        shifted: bool,
        mlp_ratio: float,
    ):
        super().__init__()
        if min(to_pair(window_size)) < 1:
            raise ValueError(f"window_size is {window_size}; both sides must be at least 1")
        self.dim = dim
        self.input_resolution = input_resolution
        self.num_heads = num_heads
        self.mlp_ratio = mlp_ratio
        self.shifted = shifted
        self.window, self.shift = clamp_window(input_resolution, window_size, shifted)
        self.window_size = one_number(self.window)
        self.shift_size = one_number(self.shift)

    def layout(self, grid: Size, device: torch.device | None) -> WindowLayout:
        """How a map of `grid` tokens is cut; on other grids than the one it was built for, axes of
        several windows are shifted.
        """
        shift = self.shift
        if grid != self.input_resolution:
            shift = tuple(
                side // 2 if self.shifted and length > side else 0
                for side, length in zip(self.window, grid, strict=True)
            )
        return window_layout(grid, self.window, shift, device=device)

    def windows(self) -> float:
        """Windows of the map it was built for."""
        return self.layout(self.input_resolution, None).num_windows

    def mlp_flops(self) -> float:
        """Multiply-accumulates of the MLP and the two norms by Swin's count."""
        tokens = self.input_resolution[0] * self.input_resolution[1]
        return 2 * tokens * self.dim + 2 * tokens * self.dim * self.dim * self.mlp_ratio

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.input_resolution}, window={self.window_size}, shift={self.shift_size}"


class AttentionBlock(WindowBlock, BranchEditor):
    """Base of the Swin and SwinV2 blocks: registers the mask, and builds norms, attention, MLP and
    S.W. MLP in the released order.

    number: its place in the stage, from 0; the first block of a stage may hand the values of its
        attention down to the others. None: it hands nothing down.
    """

    def __init__(
        self,
        dim: int,
        input_resolution: Size,
        num_heads: int,
        window_size: int | Size,
        shifted: bool,
        mlp_ratio: float,
        drop: float,
        drop_path: nn.Module,
        norm_layer: type[nn.Module],
        sw_mlp: str,
        number: int | None = None,
    ):
        super().__init__(dim, input_resolution, num_heads, window_size, shifted, mlp_ratio)
        self.number = number
        mask = None
        if any(self.shift):
            mask = self.layout(input_resolution, None).mask
            mask = mask.to(torch.get_default_device(), copy=True)
        self.register_buffer("attn_mask", mask)
        self.norm1 = norm_layer(dim)
        self.attn = self.make_attention()
        self.note_edits()
        self.drop_path = drop_path
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)
        with own_random_numbers("sw_mlp"):
            self.sw_mlp = make_sw_mlp(sw_mlp, self.window[0] * self.window[1], num_heads)

    def make_attention(self) -> nn.Module:
        """The attention module of this kind of block."""
        raise NotImplementedError

    def mix(self, x: Tensor, grid: Size) -> Tensor:
        """The MLP branch, (B, L, C) -> (B, L, C)."""
        if self.sw_mlp is not None:
            x = self.sw_mlp(x.unflatten(1, grid), self.layout(grid, x.device)).flatten(1, 2)
        return self.mlp(x)

    def attend(
        self, x: Tensor, grid: Size, first_v: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The attention branch, (B, L, C) -> (B, L, C), and the values that the block hands down,
        (B, rows, columns, C), if it does.
        """
        layout = self.layout(grid, x.device)
        y, handed = self.attended(x.unflatten(1, grid), layout, first_v=first_v)
        return y.flatten(1, 2), handed

    def flops(self) -> float:
        """Multiply-accumulates for one image by Swin's count (softmax, bias and position
        MLPs are not counted).
        """
        tokens = self.input_resolution[0] * self.input_resolution[1]
        extra = 0 if self.sw_mlp is None else self.sw_mlp.flops(tokens, self.dim)
        return (
            self.mlp_flops() + self.attn.map_flops(self.layout(self.input_resolution, None)) + extra
        )


def block_geometry(block: WindowBlock, pretrained_window: Size = (0, 0)) -> Geometry:
    """Where the tokens of a block's attention sit."""
    place = getattr(block, "number", None)
    return Geometry(block.dim, block.num_heads, block.window, pretrained_window, block=place)


__all__ = ["AttentionBlock", "WindowBlock", "block_geometry", "clamp_window", "one_number"]
