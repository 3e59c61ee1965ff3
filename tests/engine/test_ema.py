"""The average of the parameters against its recurrence."""

import copy

import pytest
import torch
from torch import nn

from engine.ema import ParameterEma
from utils import RunError


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("index", torch.arange(4))

    def forward(self, x):
        return self.norm(self.linear(x))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


def disturb(model, generator):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator))
        model.norm.running_mean.add_(1.0)
        model.norm.num_batches_tracked.add_(1)
        model.index.add_(7)


def test_parameters_follow_the_recurrence_and_buffers_are_copied(model):
    ema, generator = ParameterEma(model, decay=0.9), torch.Generator().manual_seed(1)
    expected = [p.detach().double() for p in model.parameters()]
    for _ in range(20):
        disturb(model, generator)
        ema.update(model)
        expected = [
            0.9 * mean + 0.1 * p.detach().double()
            for mean, p in zip(expected, model.parameters(), strict=True)
        ]
    for mean, p in zip(expected, ema.module.parameters(), strict=True):
        torch.testing.assert_close(p.double(), mean, rtol=1e-5, atol=1e-6)
    assert all(
        torch.equal(a, b) for a, b in zip(ema.module.buffers(), model.buffers(), strict=True)
    )
    assert ema.module.index.dtype == torch.int64


def test_state_dict_has_the_models_names_and_continues_bit_for_bit(model, tmp_path):
    ema, generator = ParameterEma(model, 0.9), torch.Generator().manual_seed(1)
    disturb(model, generator)
    ema.update(model)
    assert list(ema.state_dict()) == list(model.state_dict())
    torch.save(ema.state_dict(), tmp_path / "ema.pth")
    resumed = ParameterEma(copy.deepcopy(model), 0.9)
    resumed.load_state_dict(torch.load(tmp_path / "ema.pth", weights_only=True))
    disturb(model, generator)
    for average in (ema, resumed):
        average.update(model)
    assert all(
        torch.equal(a, b)
        for a, b in zip(ema.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


def test_the_model_and_the_random_state_are_untouched(model):
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    ema = ParameterEma(model, 0.5)
    ema.update(model)
    assert all(
        torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True)
    )
    assert torch.equal(random, torch.get_rng_state())
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def test_the_average_is_in_eval_mode_without_gradients(model):
    ema = ParameterEma(model, 0.5)
    assert not ema.module.training and not any(p.requires_grad for p in ema.module.parameters())


def test_an_update_is_seen_by_caches_keyed_on_tensor_versions(model):
    ema = ParameterEma(model, 0.5)
    before = [p._version for p in ema.module.parameters()]
    ema.update(model)
    assert all(
        p._version > version for p, version in zip(ema.module.parameters(), before, strict=True)
    )


def test_a_compiled_model_is_averaged_under_its_plain_names(model):
    ema = ParameterEma(torch.compile(model), 0.5)
    ema.update(torch.compile(model))
    assert list(ema.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_outside_its_range_is_refused(model, decay):
    with pytest.raises(RunError, match="MODEL.EMA.DECAY"):
        ParameterEma(model, decay)
