"""Image to tokens, and four tokens to one."""

import torch
from torch import Tensor, nn

from kernels.linear import run_linear
from kernels.window_attention.layout import Size, to_pair


class PatchEmbed(nn.Module):
    """A convolution whose kernel and stride are the patch, then flattened, then a norm if there is
    a `norm_layer`.

    Shapes: (B, in_chans, H, W) -> (B, L, embed_dim), L = (H // patch) * (W // patch); a remainder
    of pixels is left out, as the convolution does. `dynamic` accepts other image sizes than
    `img_size`, else they raise ValueError.
    """

    def __init__(
        self,
        img_size: int | Size,
        patch_size: int | Size,
        in_chans: int,
        embed_dim: int,
        norm_layer: type[nn.Module] | None,
        dynamic: bool = False,
    ):
        super().__init__()
        self.img_size = to_pair(img_size)
        self.patch_size = to_pair(patch_size)
        self.dynamic = dynamic
        self.patches_resolution = self.grid(self.img_size)
        if min(self.patches_resolution) < 1:
            raise ValueError(
                f"image size {self.img_size} is smaller than one patch of {self.patch_size}"
            )
        self.num_patches = self.patches_resolution[0] * self.patches_resolution[1]
        self.in_chans = in_chans
        self.embed_dim = embed_dim
        self.proj = nn.Conv2d(
            in_chans, embed_dim, kernel_size=self.patch_size, stride=self.patch_size
        )
        self.norm = norm_layer(embed_dim) if norm_layer else None

    def grid(self, img_size: Size) -> Size:
        """Patches (rows, columns) of an image of this size in pixels."""
        return img_size[0] // self.patch_size[0], img_size[1] // self.patch_size[1]

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, L, embed_dim)."""
        size = tuple(x.shape[-2:])
        if size != self.img_size and not self.dynamic:
            raise ValueError(
                f"the images are {size[0]}x{size[1]} pixels, the model was built for"
                f" {self.img_size[0]}x{self.img_size[1]}; set DATA.IMG_SIZE, or"
                " MODEL.DYNAMIC_IMG_SIZE True (dynamic_img_size=True) for any size"
            )
        if min(self.grid(size)) < 1:
            raise ValueError(
                f"the images are {size[0]}x{size[1]} pixels, smaller than one patch of"
                f" {self.patch_size}"
            )
        x = self.proj(x).flatten(2).transpose(1, 2)
        return x if self.norm is None else self.norm(x)

    def flops(self) -> int:
        """Multiply-accumulates for one image of `img_size`, the norm counted once per element."""
        macs = (
            self.num_patches
            * self.embed_dim
            * self.in_chans
            * self.patch_size[0]
            * self.patch_size[1]
        )
        return macs if self.norm is None else macs + self.num_patches * self.embed_dim


class PatchMerging(nn.Module):
    """Joins each 2 x 2 block of tokens: concatenation to 4C, a norm and a projection to 2C.

    norm_first: LayerNorm(4C) before the projection (Swin), else LayerNorm(2C) after it (SwinV2). An
        odd side is padded by zeros.
    Shapes: (B, H*W, C) -> (B, ceil(H/2) * ceil(W/2), 2C). The blocks' tokens are joined column by
        column, as in the released weights.
    """

    def __init__(
        self,
        input_resolution: Size,
        dim: int,
        norm_first: bool,
        norm_layer: type[nn.Module] = nn.LayerNorm,
    ):
        super().__init__()
        self.input_resolution = input_resolution
        self.dim = dim
        self.norm_first = norm_first
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = norm_layer(4 * dim if norm_first else 2 * dim)

    def forward(self, x: Tensor, grid: Size | None = None) -> Tensor:
        """x: (B, H*W, C) on `grid` (default: the resolution it was built for)."""
        height, width = grid or self.input_resolution
        x = x.unflatten(1, (height, width))
        if height % 2 or width % 2:
            x = nn.functional.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (B, H/2, 2, W/2, 2, C)
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3).flatten(1, 2)
        if self.norm_first:
            return run_linear(self.reduction, self.norm(x))
        return self.norm(run_linear(self.reduction, x))

    @staticmethod
    def merged(grid: Size) -> Size:
        """The grid after merging."""
        return -(-grid[0] // 2), -(-grid[1] // 2)

    def flops(self) -> int:
        """Multiply-accumulates by Swin's count, which differs between the two placements
        of the norm.
        """
        height, width = self.input_resolution
        macs = (height // 2) * (width // 2) * 4 * self.dim * 2 * self.dim
        return macs + (
            height * width * self.dim if self.norm_first else height * width * self.dim // 2
        )


def resize_positions(positions: Tensor, old: Size, new: Size) -> Tensor:
    """Bicubic resize of position embeddings: (1, old rows * old columns, C) -> (1, new rows * new
    columns, C).
    """
    if old == new:
        return positions
    grid = positions.unflatten(1, old).permute(0, 3, 1, 2)
    return (
        torch.nn.functional.interpolate(grid, size=new, mode="bicubic").flatten(2).transpose(1, 2)
    )
