"""Blocks of mobile backbones that work on maps (B, C, H, W) with batch norms: depthwise encoder,
MLP of 1 x 1 convolutions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .drop_path import stochastic_depth


class LayerScale2d(nn.Module):
    """x * gamma, one factor a channel.

    Shapes: (B, C, H, W) -> (B, C, H, W); gamma (C, 1, 1).
    """

    def __init__(self, dim: int, start: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim, 1, 1), float(start)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x * self.gamma


class ConvNorm(nn.Module):
    """A 3 x 3 convolution of stride 2 and a batch norm: (B, C, H, W) -> (B, out_dim, ceil(H / 2),
    ceil(W / 2)).
    """

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out_dim, ceil(H / 2), ceil(W / 2))."""
        return self.norm(self.proj(x))

    def flops(self, pixels: int) -> int:
        """Multiply-accumulates for `pixels` pixels of the result."""
        return pixels * self.proj.weight.numel()


class ConvEncoder(nn.Module):
    """x + gamma * pwconv2(gelu(pwconv1(norm(dwconv(x))))): a 3 x 3 depthwise convolution, then a
    channel MLP.

    hidden: the width between the 1 x 1 convolutions. gamma starts at 1; layer_scale False leaves it
        out.
    Shapes: (B, C, H, W) -> (B, C, H, W).
    """

    def __init__(self, dim: int, hidden: int, drop_path: float = 0.0, layer_scale: bool = True):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm = nn.BatchNorm2d(dim)
        self.pwconv1, self.pwconv2 = nn.Conv2d(dim, hidden, 1), nn.Conv2d(hidden, dim, 1)
        self.layer_scale = LayerScale2d(dim, 1.0) if layer_scale else nn.Identity()
        self.drop_path = stochastic_depth(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        y = self.pwconv2(F.gelu(self.pwconv1(self.norm(self.dwconv(x)))))
        return x + self.drop_path(self.layer_scale(y))

    def flops(self, pixels: int) -> int:
        """Multiply-accumulates of the convolutions for `pixels` pixels."""
        return pixels * sum(
            layer.weight.numel() for layer in (self.dwconv, self.pwconv1, self.pwconv2)
        )


class ConvMlp(nn.Module):
    """drop(fc2(drop(gelu(fc1(norm1(x)))))) with 1 x 1 convolutions and a batch norm: (B, C, H, W)
    -> (B, C, H, W).
    """

    def __init__(self, dim: int, hidden: int, drop: float = 0.0):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(dim)
        self.fc1, self.fc2 = nn.Conv2d(dim, hidden, 1), nn.Conv2d(hidden, dim, 1)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(self.norm1(x))))))

    def flops(self, pixels: int) -> int:
        """Multiply-accumulates of the convolutions for `pixels` pixels."""
        return pixels * (self.fc1.weight.numel() + self.fc2.weight.numel())
