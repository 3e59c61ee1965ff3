"""Adapters of peft."""

import pytest
import torch

from models import SwinTransformer

peft = pytest.importorskip("peft")


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return SwinTransformer(
        img_size=16,
        patch_size=2,
        embed_dim=16,
        depths=[2],
        num_heads=[2],
        window_size=4,
        num_classes=5,
    ).eval()


def images() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_adapters_of_the_head_change_the_output():
    config = peft.LoraConfig(r=2, target_modules=["head"], init_lora_weights=False)
    with torch.no_grad():
        before = network()(images())
        adapted = peft.get_peft_model(network(), config).eval()(images())
    assert (adapted - before).abs().max() > 1e-3
