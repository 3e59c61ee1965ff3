"""ResNet's bottleneck, whose spatial layer is a convolution or local attention."""

import torch.nn.functional as F
from torch import Tensor, nn

from models.attention.local import LocalAttention

from .drop_path import stochastic_depth

EXPANSION = 4  # channels of a block per channel of its spatial layer


class Bottleneck(nn.Module):
    """relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1 x))))))) + shortcut(x)): 1 x 1, spatial, 1 x 1.

    Args:
        dim: channels of x. width: channels of the spatial layer; the result has 4 width. stride: of
            the spatial layer (ResNet v1.5).
        attention: options of LocalAttention, which then is the spatial layer conv2; None is a 3 x 3
            convolution.
    Shapes: (B, dim, H, W) -> (B, 4 width, ceil(H / stride), ceil(W / stride)). State-dict keys are
        torchvision's.
    Source: Deep Residual Learning, arXiv:1512.03385.
    """

    def __init__(
        self,
        dim: int,
        width: int,
        stride: int = 1,
        attention: dict | None = None,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.width, self.stride, out_dim = width, stride, EXPANSION * width
        self.conv1, self.bn1 = nn.Conv2d(dim, width, 1, bias=False), nn.BatchNorm2d(width)
        if attention is None:
            self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        else:
            self.conv2 = LocalAttention(width, stride=stride, **attention)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, out_dim, 1, bias=False), nn.BatchNorm2d(out_dim)
        self.downsample = None
        if stride > 1 or dim != out_dim:
            self.downsample = nn.Sequential(
                nn.Conv2d(dim, out_dim, 1, stride, bias=False), nn.BatchNorm2d(out_dim)
            )
        self.drop_path = stochastic_depth(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim, H, W) -> (B, 4 width, ceil(H / stride), ceil(W / stride))."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.drop_path(self.bn3(self.conv3(y)))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))

    def flops(self, before: int, after: int) -> int:
        """Multiply-accumulates for a map of `before` pixels that becomes one of `after`; attention
        works at the input's resolution.
        """
        macs = before * self.conv1.weight.numel() + after * self.conv3.weight.numel()
        macs += (
            self.conv2.flops(before)
            if isinstance(self.conv2, LocalAttention)
            else after * self.conv2.weight.numel()
        )
        return macs + (0 if self.downsample is None else after * self.downsample[0].weight.numel())
