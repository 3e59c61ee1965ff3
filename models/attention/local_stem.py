"""The attention stem of stand-alone self-attention: attention within small blocks of the image,
with values that depend on the place.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AttentionStem(nn.Module):
    """Every pixel attends to the pixels of its block; then a batch norm and max pooling over each
    block.

        y_i = sum_j softmax_j(q_i · k_j) v_j
        v_j = sum_m p_m(j) W_m x_j,   p(j) = softmax_m((row_j + col_j) · nu_m)

    A value matrix mixed by the place lets the stem tell edges apart as a convolution does. p is
    shared by the heads; logits have no position term and no scale.

    Args:
        in_chans, dim: channels of the image and of the result.
        num_heads: heads.
        block: side of the blocks in pixels.
        mixtures: value matrices m. 1 is plain attention. The paper does not state m; 4 is this
            project's choice, as is the width dim / num_heads of row, col and nu.
    Shapes: (B, in_chans, H, W) -> (B, dim, H / block, W / block).
    Raises: ValueError where dim does not divide by num_heads, or the image by `block`.
    Source: Stand-Alone Self-Attention in Vision Models, arXiv:1906.05909, section 3.2.
    """

    def __init__(
        self,
        in_chans: int = 3,
        dim: int = 64,
        num_heads: int = 4,
        *,
        block: int = 4,
        mixtures: int = 4,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(
                f"attention stem: {dim} channels cannot be split into {num_heads} heads; choose a"
                " num_heads that divides them"
            )
        if mixtures < 1:
            raise ValueError(f"attention stem: mixtures is {mixtures}; it must be at least 1")
        self.num_heads = num_heads
        self.block = block
        self.query = nn.Linear(in_chans, dim, bias=False)
        self.key = nn.Linear(in_chans, dim, bias=False)
        self.value = nn.Parameter(
            torch.empty(mixtures, dim, in_chans).uniform_(-1, 1) * in_chans**-0.5
        )  # as nn.Linear's
        width = dim // num_heads
        self.row, self.col, self.nu = (
            nn.Parameter(torch.randn(length, width) * width**-0.5) if mixtures > 1 else None
            for length in (block, block, mixtures)
        )
        self.norm = nn.BatchNorm2d(dim)
        self.pool = nn.MaxPool2d(block)

    def value_weights(self) -> Tensor:
        """The value matrix at each place of a block, (block², dim, in_chans)."""
        if self.nu is None:
            return self.value.expand(self.block**2, -1, -1)
        places = (self.row[:, None] + self.col).flatten(0, 1)  # (block², width)
        return torch.einsum("pm,moi->poi", (places @ self.nu.T).softmax(-1), self.value)

    def attend(self, x: Tensor) -> Tensor:
        """The attention alone: (B, in_chans, H, W) -> (B, dim, H, W)."""
        side, height, width = self.block, *x.shape[-2:]
        if height % side or width % side:
            raise ValueError(
                f"attention stem: the images are {height}x{width} pixels; both sides must be"
                f" multiples of {side}"
            )
        x = (
            x.unflatten(3, (-1, side))
            .unflatten(2, (-1, side))
            .permute(0, 2, 4, 3, 5, 1)
            .flatten(3, 4)
        )  # (B, h, w, block², in_chans)
        v = torch.einsum("...pi,poi->...po", x, self.value_weights().to(x.dtype))
        q, k, v = (
            y.unflatten(-1, (self.num_heads, -1)).transpose(-2, -3)
            for y in (self.query(x), self.key(x), v)
        )
        q, k, v = (y.flatten(0, 2) for y in (q, k, v))  # (B h w, heads, block², D)
        y = F.scaled_dot_product_attention(q, k, v.to(q.dtype), scale=1.0)
        y = (
            y.transpose(1, 2)
            .flatten(2)
            .unflatten(1, (side, side))
            .unflatten(0, (-1, height // side, width // side))
        )
        return y.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def flops(self, pixels: int) -> int:
        """Multiply-accumulates for `pixels` pixels of the image: projections (each pixel has one
        value matrix) and both products.
        """
        weights = self.query.weight.numel() + self.key.weight.numel() + self.value[0].numel()
        return pixels * (weights + 2 * self.block**2 * self.value.shape[1])

    def no_weight_decay(self) -> set[str]:
        """The position embeddings."""
        return set() if self.nu is None else {"row", "col"}

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, dim, H / block, W / block)."""
        return self.pool(self.norm(self.attend(x)))
