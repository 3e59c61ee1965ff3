"""The beginning of T2T-ViT: overlapping patches of pixels, then of tokens, with attention between,
and frozen positions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.window_attention.layout import Size, to_pair
from models.attention import AttentionSpec, Geometry
from models.attention.skip_attention import SkipAttention

from .mlp import Mlp

KERNEL, STRIDE, PADDING = 3, 2, 1  # of every soft split


class NarrowingBlock(nn.Module):
    """x <- attn(norm1(x)), which changes the width and brings its own skip; then x + mlp(norm2(x)).

    Shapes: (B, N, dim) -> (B, N, out_dim).
    """

    def __init__(
        self, dim: int, attn: SkipAttention, out_dim: int, norm_eps: float, drop: float = 0.0
    ):
        super().__init__()
        self.dim, self.out_dim = dim, out_dim
        self.norm1, self.attn = nn.LayerNorm(dim, norm_eps), attn
        self.norm2, self.mlp = nn.LayerNorm(out_dim, norm_eps), Mlp(out_dim, out_dim, drop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, dim) -> (B, N, out_dim)."""
        x = self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def flops(self, tokens: int) -> int:
        """Multiply-accumulates for one image; norms count once per number."""
        return self.attn.flops(tokens) + tokens * (2 * self.out_dim**2 + self.dim + self.out_dim)


def halved(grid: Size) -> Size:
    """The grid after a soft split."""
    return tuple((side + 2 * PADDING - KERNEL) // STRIDE + 1 for side in grid)


def soft_split(x: Tensor) -> Tensor:
    """Each 3 x 3 neighbourhood at every second place, (B, C, H, W) -> (B, ceil(H/2) * ceil(W/2), 9
    C); channel outermost.
    """
    return F.unfold(x, KERNEL, padding=PADDING, stride=STRIDE).transpose(1, 2)


class TokensToToken(nn.Module):
    """A soft split of the pixels; then, `count` times, a token transformer of one head and a soft
    split of its tokens; a projection.

    Args:
        count: token transformers; the grid is 2^-(count + 1) of the image. token_dim: their
            channels. input_scale: their logits are scaled by (input channels)^-0.5 instead of
                token_dim^-0.5. unused_norm: hold a LayerNorm `norm` that nothing uses and nothing
                trains.
        attention: modifies the token transformers.
    Shapes: (B, in_chans, H, W) of `img_size` -> (B, rows * columns, embed_dim). Raises ValueError
        for another image size.
    Source: Tokens-to-Token ViT, arXiv:2101.11986, section 3.1, with the splits of small images.
    """

    def __init__(
        self,
        img_size: int | Size,
        in_chans: int,
        embed_dim: int,
        token_dim: int,
        count: int,
        attention: AttentionSpec,
        qkv_bias: bool = False,
        input_scale: bool = False,
        unused_norm: bool = False,
        norm_eps: float = 1e-5,
        drop: float = 0.0,
    ):
        super().__init__()
        self.img_size, self.count = to_pair(img_size), count
        self.grids = [halved(self.img_size)]
        for number in range(1, count + 1):
            grid, dim = self.grids[-1], 9 * (in_chans if number == 1 else token_dim)
            geometry = Geometry(dim, 1, grid, head_dim=token_dim)
            attn = SkipAttention(
                geometry, attention, qkv_bias, dim**-0.5 if input_scale else None, drop
            )
            self.add_module(
                f"attention{number}", NarrowingBlock(dim, attn, token_dim, norm_eps, drop)
            )
            self.grids.append(halved(grid))
        self.patches_resolution = self.grids[-1]
        self.num_patches = self.patches_resolution[0] * self.patches_resolution[1]
        width = 9 * (token_dim if count else in_chans)
        if unused_norm:
            self.norm = nn.LayerNorm(width, norm_eps).requires_grad_(False)
        self.project = nn.Linear(width, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, rows * columns, embed_dim)."""
        if tuple(x.shape[-2:]) != self.img_size:
            raise ValueError(
                f"the images are {x.shape[-2]}x{x.shape[-1]} pixels, the model was built for "
                f"{self.img_size[0]}x{self.img_size[1]}; set DATA.IMG_SIZE"
            )
        x = soft_split(x)
        for number, grid in enumerate(self.grids[:-1], 1):
            x = self.get_submodule(f"attention{number}")(x)
            x = soft_split(x.transpose(1, 2).unflatten(2, grid))
        return self.project(x)

    def flops(self) -> int:
        """Multiply-accumulates for one image."""
        blocks = (self.get_submodule(f"attention{number}") for number in range(1, self.count + 1))
        macs = sum(
            block.flops(grid[0] * grid[1])
            for block, grid in zip(blocks, self.grids[:-1], strict=True)
        )
        return macs + self.num_patches * self.project.weight.numel()


def sinusoid(count: int, dim: int) -> Tensor:
    """(1, count, dim): sin(position / 10000^(2 (c // 2) / dim)) for even channels c, cos for odd
    ones.

    Source: Attention Is All You Need, arXiv:1706.03762, section 3.5. Worked out in float64.
    """
    channel = torch.arange(dim, dtype=torch.float64)
    angle = torch.arange(count, dtype=torch.float64)[:, None] / 10000 ** (2 * (channel // 2) / dim)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos())[None].float()
