"""Gradient clipping: what it measures, what it leaves, what it changes."""

import pytest
import torch
from torch import nn

from engine.clip import clip_gradients
from utils import RunError


@pytest.fixture
def parameters():
    generator = torch.Generator().manual_seed(0)
    found = [
        nn.Parameter(torch.randn(shape, generator=generator))
        for shape in ((4, 3), (5,), (2, 2, 3, 3))
    ]
    for p in found:
        p.grad = 3 * torch.randn(p.shape, generator=generator)
    return [*found, nn.Parameter(torch.zeros(2))]  # the last has no gradient


def grads(parameters):
    return [p.grad.clone() for p in parameters if p.grad is not None]


def total(gradients):
    return torch.cat([g.flatten() for g in gradients]).norm()


@pytest.mark.parametrize("mode", ["norm", "value", "agc"])
@pytest.mark.parametrize("value", [None, 0, 0.0])
def test_zero_and_none_only_measure(parameters, mode, value):
    before = grads(parameters)
    torch.testing.assert_close(clip_gradients(parameters, value, mode), total(before))
    assert all(torch.equal(a, b) for a, b in zip(before, grads(parameters), strict=True))


@pytest.mark.parametrize("mode, value", [("norm", 2.0), ("value", 0.5), ("agc", 0.01)])
def test_every_mode_returns_the_norm_before_clipping(parameters, mode, value):
    before = total(grads(parameters))
    torch.testing.assert_close(clip_gradients(iter(parameters), value, mode), before)
    assert total(grads(parameters)) < before


def test_norm_scales_all_gradients_alike_to_the_bound(parameters):
    before = grads(parameters)
    clip_gradients(parameters, 2.0)
    torch.testing.assert_close(total(grads(parameters)), torch.tensor(2.0), rtol=1e-5, atol=0)
    for old, new in zip(before, grads(parameters), strict=True):
        torch.testing.assert_close(new, old * 2.0 / total(before), rtol=1e-5, atol=0)


def test_norm_is_pytorchs_clip_grad_norm(parameters):
    before = grads(parameters)
    clip_gradients(parameters, 2.0)
    ours = grads(parameters)
    for p, gradient in zip(parameters, before, strict=False):
        p.grad = gradient
    nn.utils.clip_grad_norm_(parameters, 2.0)
    assert all(torch.equal(a, b) for a, b in zip(ours, grads(parameters), strict=True))


def test_a_bound_that_is_not_reached_changes_nothing(parameters):
    before = grads(parameters)
    clip_gradients(parameters, 1e6)
    assert all(torch.equal(a, b) for a, b in zip(before, grads(parameters), strict=True))


def test_value_bounds_every_entry(parameters):
    before = grads(parameters)
    clip_gradients(parameters, 0.5, "value")
    assert all(
        torch.equal(new, old.clamp(-0.5, 0.5))
        for old, new in zip(before, grads(parameters), strict=True)
    )


def test_agc_bounds_each_row_by_its_weights_and_spares_the_exempt(parameters):
    before = grads(parameters)
    clip_gradients(parameters, 0.01, "agc", exempt=parameters[1:2])
    rows, weight = parameters[0].grad.norm(dim=1), parameters[0].detach().norm(dim=1)
    torch.testing.assert_close(rows, 0.01 * weight, rtol=1e-5, atol=0)
    assert torch.equal(parameters[1].grad, before[1])


def test_no_gradients_have_norm_zero():
    assert clip_gradients([nn.Parameter(torch.zeros(2))], 1.0) == 0


def test_an_infinite_gradient_shows_in_the_norm(parameters):
    parameters[0].grad[0, 0] = torch.inf
    assert torch.isinf(clip_gradients(parameters, 1.0))


@pytest.mark.parametrize(
    "value, mode, words",
    [(1.0, "max", "TRAIN.CLIP_MODE 'max'"), (-1.0, "norm", "TRAIN.CLIP_GRAD -1.0")],
)
def test_unknown_modes_and_negative_bounds_are_refused(parameters, value, mode, words):
    with pytest.raises(RunError, match=words):
        clip_gradients(parameters, value, mode)
