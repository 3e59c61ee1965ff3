"""The MLP with few or many chunks, with the compiled GELU and without, against the plain layers."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.linear import evaluation, precision
from kernels.linear import mlp as fused
from models.layers.mlp import Mlp

with_and_without_the_kernel = pytest.mark.parametrize("kernel", [True, False])


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(fused, "WHOLE_BYTES", 0)
    monkeypatch.setattr(fused, "PLAIN_BYTES", {True: 0, False: 0})
    monkeypatch.setattr(precision, "CHUNK_BYTES", 1)  # the least number of rows, 64


def choose(kernel: bool, dtype: torch.dtype, monkeypatch) -> None:
    if not kernel:
        monkeypatch.setattr(fused, "compiled", lambda dtype: False)
    elif not fused.compiled(dtype):
        pytest.skip("the CPU kernel is not here, or not for this dtype")


def gradients(module, x, weight):
    y = module(x)
    return [
        y.detach(),
        *torch.autograd.grad((y.to(weight.dtype) * weight).sum(), [x, *module.parameters()]),
    ]


def plain(mlp):
    """The same parameters, called as two layers and a GELU."""

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = mlp.fc1, mlp.fc2

        def forward(self, x):
            return F.linear(
                F.gelu(F.linear(x, self.fc1.weight, self.fc1.bias)), self.fc2.weight, self.fc2.bias
            )

    return Plain()


@pytest.mark.parametrize("tokens", [1, 63, 64, 200])
@pytest.mark.parametrize("frozen", [False, True])
def test_values_and_gradients_equal_the_plain_layers(tokens, frozen):
    torch.manual_seed(0)
    mlp = Mlp(6, 20).double()
    x = torch.randn(2, tokens, 6, dtype=torch.float64, requires_grad=not frozen)
    leaves = ([] if frozen else [x]) + list(mlp.parameters())
    y, right = mlp(x), plain(mlp)(x)
    torch.testing.assert_close(y, right)
    weight = torch.randn_like(y)
    found = [torch.autograd.grad((value * weight).sum(), leaves) for value in (y, right)]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), right)
        with evaluation(mlp):
            torch.testing.assert_close(mlp(x), right)


@with_and_without_the_kernel
@pytest.mark.parametrize("tokens", [1, 64, 500])
@pytest.mark.parametrize(
    "autocast, widened",
    [(None, False), (torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, True)],
)
def test_it_errs_no_more_than_the_plain_layers_in_the_same_dtype(
    tokens, autocast, widened, kernel, monkeypatch
):
    choose(kernel, torch.float32 if widened or autocast is None else autocast, monkeypatch)
    monkeypatch.setattr(precision, "WIDENED", frozenset([autocast] if widened else []))
    torch.manual_seed(0)
    mlp, x, weight = (
        Mlp(24, 50),
        torch.randn(2, tokens, 24, requires_grad=True),
        torch.randn(2, tokens, 24),
    )
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        ours, theirs = gradients(mlp, x, weight), gradients(plain(mlp), x, weight)
    exact = gradients(plain(mlp.double()), x.detach().double().requires_grad_(), weight.double())
    for own, other, right in zip(ours, theirs, exact, strict=True):
        assert own.dtype == other.dtype
        own, other = ((value.double() - right).norm() for value in (own, other))
        assert own <= 2 * other + 3e-7 * right.norm()


@with_and_without_the_kernel
def test_only_the_activation_before_the_gelu_is_kept(kernel, monkeypatch):
    choose(kernel, torch.float32, monkeypatch)
    mlp, kept = Mlp(8, 32), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        mlp(torch.randn(500, 8, requires_grad=True))
    assert sum(kept) <= 500 * (8 + 32) + 2 * 8 * 32 + 32


def test_scratch_memory_is_neither_shared_between_threads_nor_left_over_from_a_trace(monkeypatch):
    choose(True, torch.float32, monkeypatch)
    mlp, x = Mlp(8, 32), torch.randn(500, 8, requires_grad=True)
    weight = torch.randn(500, 8)
    right = gradients(mlp, x, weight)
    monkeypatch.setattr(fused, "_thread", threading.local())
    with FakeTensorMode(allow_non_fake_inputs=True):
        mlp(x).sum().backward()
    x.grad = None
    for found, expected in zip(gradients(mlp, x, weight), right, strict=True):
        assert torch.equal(found, expected)
    several, outcomes = 4, {}

    def work(number):
        for _ in range(20):
            outcomes[number] = gradients(mlp, x, weight)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(several)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == several
    for found in outcomes.values():
        assert all(map(torch.equal, found, right))


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
