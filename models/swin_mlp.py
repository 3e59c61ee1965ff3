"""Swin-MLP: Swin's pyramid with a grouped linear map over the tokens of a window in place of
attention.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from kernels.window_attention import window_partition, window_reverse
from kernels.window_attention.layout import Size
from models.base.backbone import BACKBONES
from models.base.pyramid import PyramidOptions, PyramidTransformer, pyramid_options
from models.base.window_block import WindowBlock
from models.layers.mlp import Mlp

__all__ = ["SwinMLP", "SwinMLPBlock", "window_partition", "window_reverse"]


class SwinMLPBlock(WindowBlock):
    """x + spatial(norm1(x)), then x + mlp(norm2(x)); a shift pads with zeros instead of rolling.

    Shapes: (B, L, C) -> (B, L, C). State dict: norm1, spatial_mlp.weight (heads N, N, 1) and .bias
        (heads N,), norm2, mlp.
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
    ):
        super().__init__(dim, input_resolution, num_heads, window_size, shifted, mlp_ratio)
        area = self.window[0] * self.window[1]
        self.norm1 = norm_layer(dim)
        self.spatial_mlp = nn.Conv1d(
            num_heads * area, num_heads * area, kernel_size=1, groups=num_heads
        )
        self.drop_path = drop_path
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)

    def _padding(self, grid: Size) -> list[tuple[int, int]]:
        """Zeros before and after each axis."""
        shift = self.layout(grid, None).shift
        before = [side - move if move else 0 for side, move in zip(self.window, shift, strict=True)]
        return [
            (lead, -(lead + length) % side)
            for lead, length, side in zip(before, grid, self.window, strict=True)
        ]

    def spatial(self, x: Tensor, grid: Size) -> Tensor:
        """(B, L, C) -> (B, L, C): one N x N map per head within each window."""
        (top, bottom), (left, right) = self._padding(grid)
        x = F.pad(x.unflatten(1, grid), (0, 0, left, right, top, bottom))
        padded = x.shape[1:3]
        tokens = (
            window_partition(x, self.window).flatten(1, 2).unflatten(-1, (self.num_heads, -1))
        )  # (B*nW, N, heads, D)
        mixed = self.spatial_mlp(tokens.transpose(1, 2).flatten(1, 2)).unflatten(
            1, (self.num_heads, -1)
        )
        x = window_reverse(
            mixed.transpose(1, 2).flatten(2).unflatten(1, self.window), self.window, *padded
        )
        return x[:, top : top + grid[0], left : left + grid[1]].flatten(1, 2)

    def forward(self, x: Tensor, grid: Size | None = None) -> Tensor:
        """x: (B, L, C) on `grid` (default: the resolution it was built for)."""
        grid = grid or self.input_resolution
        x = x + self.drop_path(self.spatial(self.norm1(x), grid))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def flops(self) -> float:
        """Multiply-accumulates for one image by Swin's count."""
        padding = self._padding(self.input_resolution)
        axes = zip(self.input_resolution, padding, self.window, strict=True)
        rows, columns = ((length + sum(zeros)) // side for length, zeros, side in axes)
        return self.mlp_flops() + rows * columns * self.dim * (self.window[0] * self.window[1]) ** 2


@BACKBONES.register("swin_mlp")
class SwinMLP(PyramidTransformer):
    """The arguments of the Swin repository in its order; `others` are further `PyramidOptions`.
    There is no attention to modify.

    Shapes: (B, in_chans, H, W) -> (B, num_classes).
    """

    section = "SWIN_MLP"

    def __init__(
        self,
        img_size: int | Size = 224,
        patch_size: int | Size = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int | Size = 7,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        norm_layer: type[nn.Module] = nn.LayerNorm,
        ape: bool = False,
        patch_norm: bool = True,
        use_checkpoint: bool = False,
        **others,
    ):
        if others.get("sw_mlp", "off") != "off":
            raise ValueError("swin_mlp: sw_mlp is for swin and swinv2; leave it off")
        super().__init__(
            pyramid_options(
                None,
                0.0,
                others,
                img_size=img_size,
                patch_size=patch_size,
                in_chans=in_chans,
                num_classes=num_classes,
                embed_dim=embed_dim,
                depths=depths,
                num_heads=num_heads,
                window_size=window_size,
                mlp_ratio=mlp_ratio,
                drop_rate=drop_rate,
                drop_path_rate=drop_path_rate,
                norm_layer=norm_layer,
                ape=ape,
                patch_norm=patch_norm,
                use_checkpoint=use_checkpoint,
            )
        )

    def make_block(
        self,
        options: PyramidOptions,
        dim: int,
        resolution: Size,
        stage: int,
        block: int,
        drop_path: nn.Module,
    ) -> SwinMLPBlock:
        """Odd blocks are shifted."""
        return SwinMLPBlock(
            dim,
            resolution,
            options.num_heads[stage],
            options.window_size,
            block % 2 == 1,
            options.mlp_ratio,
            drop=options.drop_rate,
            drop_path=drop_path,
            norm_layer=options.norm_layer,
        )
