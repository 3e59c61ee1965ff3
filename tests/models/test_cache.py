"""What evaluation keeps between forwards is never older than the parameters."""

import copy

import pytest
import torch
from torch import nn

from models import SwinTransformerV2

OPTIMIZERS = {
    "fused AdamW": lambda p: torch.optim.AdamW(
        p, 0.01, fused=True
    ),  # PyTorch's version counters do not see its writes
    "fused SGD": lambda p: torch.optim.SGD(p, 0.01, fused=True),
    "foreach AdamW": lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
    "plain SGD": lambda p: torch.optim.SGD(p, 0.01),
}


def small_model():
    torch.manual_seed(0)
    return SwinTransformerV2(
        16,
        4,
        embed_dim=32,
        depths=(2,),
        num_heads=(4,),
        window_size=4,
        num_classes=3,
        drop_path_rate=0.0,
    )


@torch.no_grad()
def logits(model, images):
    return model.eval()(images)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_evaluation_after_a_step_sees_the_new_parameters(name):
    model, images = small_model(), torch.randn(2, 3, 16, 16)
    optimizer = OPTIMIZERS[name](model.parameters())
    before = logits(model, images)
    for _ in range(2):
        model.train()(images).square().sum().backward()
        optimizer.step()
        after = logits(model, images)
        assert torch.equal(after, logits(copy.deepcopy(model), images))  # a copy keeps nothing
        assert not torch.equal(after, before)
        before = after


def test_a_step_without_a_forward_of_this_module_is_seen_too():
    model, images = small_model(), torch.randn(2, 3, 16, 16)
    before = logits(model, images)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.AdamW(model.parameters(), 0.01, fused=True).step()
    after = logits(model, images)
    assert torch.equal(after, logits(copy.deepcopy(model), images)) and not torch.equal(
        after, before
    )


def test_writes_in_place_and_new_data_are_seen():
    layer_in = torch.randn(2, 3, 16, 16)
    model = small_model()
    before = logits(model, layer_in)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            with torch.no_grad():
                module.weight.mul_(1.5)
    scaled = logits(model, layer_in)
    assert torch.equal(scaled, logits(copy.deepcopy(model), layer_in)) and not torch.equal(
        scaled, before
    )
    model.load_state_dict(small_model().state_dict())
    assert torch.equal(logits(model, layer_in), before)
