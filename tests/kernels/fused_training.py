"""Training of a small model whose attention is all fused, in one process or in several."""

import torch

from models.attention import AttentionSpec
from tests.models.builders import randomise, small


def build():
    """A small SwinV2 with shifted windows and scales per offset, all of it fused."""
    spec = AttentionSpec(("qk_residual", "crpw"), backend="fused")
    return randomise(small("swinv2", embed_dim=32, attention=spec), std=0.1)


def train(model, part):
    """Three steps on images part of 4."""
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images[part]), torch.arange(4)[part]).backward()
        optimizer.step()
