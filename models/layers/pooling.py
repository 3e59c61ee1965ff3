"""What PiT is made of besides blocks: an embedding whose patches may overlap, and pooling of tokens
between stages.
"""

import torch
from torch import Tensor, nn

from kernels.window_attention.layout import Size, to_pair


class OverlapEmbed(nn.Module):
    """A convolution of the patch's size, moved by `stride` pixels, without padding.

    Shapes: (B, in_chans, H, W) of `img_size` -> (B, embed_dim, rows, columns). Raises ValueError
        for another image size.
    """

    def __init__(
        self,
        img_size: int | Size,
        patch_size: int | Size,
        stride: int | Size,
        in_chans: int,
        embed_dim: int,
    ):
        super().__init__()
        self.img_size, patch, step = to_pair(img_size), to_pair(patch_size), to_pair(stride)
        if any(side < wide for side, wide in zip(self.img_size, patch, strict=True)):
            raise ValueError(f"image size {self.img_size} is smaller than one patch of {patch}")
        self.patches_resolution = tuple(
            (side - wide) // by + 1
            for side, wide, by in zip(self.img_size, patch, step, strict=True)
        )
        self.num_patches = self.patches_resolution[0] * self.patches_resolution[1]
        self.conv = nn.Conv2d(in_chans, embed_dim, patch, step)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, embed_dim, rows, columns)."""
        if tuple(x.shape[-2:]) != self.img_size:
            raise ValueError(
                f"the images are {x.shape[-2]}x{x.shape[-1]} pixels, the model was built for "
                f"{self.img_size[0]}x{self.img_size[1]}; set DATA.IMG_SIZE"
            )
        return self.conv(x)

    def flops(self) -> int:
        """Multiply-accumulates for one image."""
        return self.num_patches * self.conv.weight.numel()


class TokenPooling(nn.Module):
    """Halves the grid and widens the channels: a depthwise 3 x 3 convolution of stride 2 for the
    patches, a linear layer for class tokens.

    grid: (rows, columns) before. prefix: class tokens. pointwise: a 1 x 1 convolution after the
        depthwise one.
    Shapes: (B, prefix + rows * columns, dim) -> (B, prefix + ceil(rows / 2) * ceil(columns / 2),
        out_dim), out_dim a multiple of dim.
    """

    def __init__(self, dim: int, out_dim: int, grid: Size, prefix: int, pointwise: bool = False):
        super().__init__()
        self.grid, self.prefix = grid, prefix
        self.pooled = tuple((side + 1) // 2 for side in grid)
        self.conv = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, groups=dim)
        self.proj = nn.Conv2d(out_dim, out_dim, 1) if pointwise else nn.Identity()
        self.fc = nn.Linear(dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, prefix + rows * columns, dim) -> (B, prefix + fewer, out_dim)."""
        tokens, patches = x[:, : self.prefix], x[:, self.prefix :]
        patches = self.proj(self.conv(patches.transpose(1, 2).unflatten(2, self.grid)))
        return torch.cat([self.fc(tokens), patches.flatten(2).transpose(1, 2)], dim=1)

    def flops(self) -> int:
        """Multiply-accumulates for one image."""
        pixels = self.pooled[0] * self.pooled[1]
        pointwise = 0 if isinstance(self.proj, nn.Identity) else self.proj.weight.numel()
        return (
            pixels * (self.conv.weight.numel() + pointwise) + self.prefix * self.fc.weight.numel()
        )


class PoolingStage(nn.Module):
    """`pool` (None in the first stage), then `blocks`, over class tokens and patches together."""

    def __init__(self, pool: TokenPooling | None, blocks: list[nn.Module], tokens: int):
        super().__init__()
        self.pool, self.blocks, self.tokens = pool, nn.ModuleList(blocks), tokens

    def flops(self) -> int:
        """Multiply-accumulates for one image."""
        pooling = 0 if self.pool is None else self.pool.flops()
        return pooling + sum(block.flops(self.tokens) for block in self.blocks)
