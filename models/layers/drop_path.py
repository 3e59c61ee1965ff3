"""Stochastic depth: the rate of each block, and the layer."""

import torch
from timm.layers import DropPath
from torch import nn

from kernels.modes import real_tensors
from registry import check_choice

PROFILES = ("linear", "constant")


def drop_path_rates(rate: float, depth: int, profile: str = "linear") -> list[float]:
    """Stochastic depth of each of `depth` blocks: rising linearly from 0 to `rate`, or `rate`
    throughout.
    """
    if check_choice("drop path profile", profile, PROFILES) == "constant":
        return [rate] * depth
    with real_tensors():
        return torch.linspace(0, rate, depth, device="cpu").tolist()


def stochastic_depth(rate: float) -> nn.Module:
    """Drops the branch of an image with probability `rate` while training; at 0 nothing."""
    return DropPath(rate) if rate else nn.Identity()
