"""Experimental "S.W. MLP": tokens exchange information right before the channel MLP, without
attention.

The seed of this project names a sliding-window MLP and its author removed it as redundant: a
per-token MLP commutes with a shift of the tokens, so it changed nothing. Both forms here are this
project's own reading of the name, not a reproduction.
"""

import torch
from torch import Tensor, nn

from kernels.window_attention.layout import (
    WindowLayout,
    crop_grid,
    pad_grid,
    window_partition,
    window_reverse,
)
from registry import check_choice


class WindowTokenMix(nn.Module):
    """x + a linear map over the tokens of each (shifted) window, one N x N matrix and bias per
    head; zero at the start. Tokens that a shift brought together do not meet.

    Shapes: (B, H, W, C) -> (B, H, W, C); heads N (N + 1) parameters. Tokens outside the image count
        as zeros.
    """

    def __init__(self, area: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.weight = nn.Parameter(torch.zeros(num_heads, area, area))
        self.bias = nn.Parameter(torch.zeros(num_heads, area, 1))

    def forward(self, x: Tensor, layout: WindowLayout) -> Tensor:
        """(B, H, W, C) on the grid of `layout`."""
        tokens = pad_grid(x, layout).roll((-layout.shift[0], -layout.shift[1]), (1, 2))
        tokens = (
            window_partition(tokens, layout.window)
            .flatten(1, 2)
            .unflatten(-1, (self.num_heads, -1))
            .transpose(1, 2)
        )
        mixed = (
            (self._weigh(tokens, layout.mask) + self.bias)
            .transpose(1, 2)
            .flatten(2)
            .unflatten(1, layout.window)
        )
        mixed = window_reverse(mixed, layout.window, *layout.padded).roll(layout.shift, (1, 2))
        return x + crop_grid(mixed, layout)

    def _weigh(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """tokens (B*nW, heads, N, D), mask (nW, N, N) -> (B*nW, heads, N, D)."""
        if mask is None:
            return self.weight @ tokens
        weight = self.weight * (mask == 0)[:, None]  # (nW, heads, N, N)
        by_window = tokens.unflatten(0, (-1, len(mask))).permute(1, 2, 3, 0, 4)
        mixed = weight @ by_window.flatten(3)  # all images of a window side by side
        return mixed.unflatten(3, by_window.shape[3:]).permute(3, 0, 1, 2, 4).flatten(0, 1)

    def flops(self, tokens: int, dim: int) -> int:
        """Multiply-accumulates for `tokens` tokens of `dim` channels."""
        return tokens * self.weight.shape[-1] * dim


class ChannelShift(nn.Module):
    """A fifth of the channels moves one token down, up, right and left each; the last fifth stays.
    No parameters.

    Shapes: (B, H, W, C) -> (B, H, W, C); what leaves the map is lost, what enters is zero.
    """

    def forward(self, x: Tensor, layout: WindowLayout) -> Tensor:
        """(B, H, W, C); `layout` is not used."""
        part = x.shape[-1] // 5
        y = torch.zeros_like(x)
        y[:, 1:, :, :part] = x[:, :-1, :, :part]
        y[:, :-1, :, part : 2 * part] = x[:, 1:, :, part : 2 * part]
        y[:, :, 1:, 2 * part : 3 * part] = x[:, :, :-1, 2 * part : 3 * part]
        y[:, :, :-1, 3 * part : 4 * part] = x[:, :, 1:, 3 * part : 4 * part]
        y[..., 4 * part :] = x[..., 4 * part :]
        return y

    def flops(self, tokens: int, dim: int) -> int:
        """No multiplications."""
        return 0


def make_sw_mlp(kind: str, area: int, num_heads: int) -> nn.Module | None:
    """ "off" -> None, "token_mix" or "shift" -> a module called with (x, layout). Raises ValueError
    for another word.
    """
    if check_choice("sw_mlp", kind, ("off", "token_mix", "shift")) == "off":
        return None
    return ChannelShift() if kind == "shift" else WindowTokenMix(area, num_heads)
