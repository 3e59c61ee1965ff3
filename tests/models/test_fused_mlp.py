"""The chunked MLP against the plain layers."""

import pytest
import torch
import torch.nn.functional as F

from models.layers import fused_mlp
from models.layers.mlp import Mlp


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(fused_mlp, "WHOLE_BYTES", 0)
    monkeypatch.setattr(fused_mlp, "CHUNK_BYTES", 1)  # the least number of rows, 64


@pytest.mark.parametrize("tokens", [1, 63, 64, 200])
@pytest.mark.parametrize("frozen", [False, True])
def test_values_and_gradients_equal_the_plain_layers(tokens, frozen):
    torch.manual_seed(0)
    mlp = Mlp(6, 20).double()
    x = torch.randn(2, tokens, 6, dtype=torch.float64, requires_grad=not frozen)
    leaves = ([] if frozen else [x]) + list(mlp.parameters())
    y, plain = mlp(x), mlp.fc2(F.gelu(mlp.fc1(x)))
    torch.testing.assert_close(y, plain)
    weight = torch.randn_like(y)
    gradients = [torch.autograd.grad((value * weight).sum(), leaves) for value in (y, plain)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), plain)


def test_only_the_activation_before_the_gelu_is_kept():
    mlp, kept = Mlp(8, 32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        mlp(torch.randn(500, 8, requires_grad=True))
    assert sum(numel for numel in kept) <= 500 * (8 + 32) + 2 * 8 * 32


def test_hooked_layers_are_called_as_modules():
    mlp, seen = Mlp(8, 32), []
    mlp.fc1.register_forward_hook(lambda *_: seen.append(1))
    mlp(torch.randn(100, 8))
    assert seen == [1]


def test_dropout_is_applied_twice_in_training_and_not_at_all_in_evaluation():
    mlp = Mlp(8, 32, drop=0.5)
    x = torch.randn(100, 8)
    assert (mlp(x) == 0).any()
    torch.testing.assert_close(mlp.eval()(x), mlp.fc2(F.gelu(mlp.fc1(x))))
