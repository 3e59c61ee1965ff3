"""Weights are prepared inside `evaluation` alone, and are never older than the parameters."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.optim import optimizer as optimizers

from kernels.linear import prepared
from models import evaluation
from tests.models.builders import WINDOW_FAMILIES, identity_options, randomise, small

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
both_families = pytest.mark.parametrize("family", WINDOW_FAMILIES)
inside_and_outside = pytest.mark.parametrize("inside", [True, False])


def sharpened(family="swinv2"):
    return randomise(small(family, **identity_options(True, True, True))).eval()


def logits(model):
    with torch.no_grad():
        return model(IMAGES)


@pytest.fixture
def preparations(monkeypatch):
    """The widths of the layers that have been prepared for many calls."""
    made, original = [], prepared.PreparedLinear.__init__

    def init(self, weight, *rest, calls="many"):
        made.extend([len(weight)] * (calls == "many"))
        original(self, weight, *rest, calls)

    monkeypatch.setattr(prepared.PreparedLinear, "__init__", init)
    return made


def count_terms(model):
    """Appends to a list whenever the first block works out its terms."""
    attention, calls = model.layers[0].blocks[0].attn, []
    original = attention.base_terms
    attention.base_terms = lambda: calls.append(1) or original()
    return calls


@both_families
def test_weights_and_tables_are_prepared_once_inside_and_never_outside(family, preparations):
    model = sharpened(family)
    terms = count_terms(model)
    plain = [logits(model) for _ in range(2)]
    assert not preparations and len(terms) == 2
    with evaluation(model):
        kept = [logits(model) for _ in range(3)]
        # qkv, proj, fc1, fc2 of three blocks; two layers in each of two pre-MLPs; one reduction
        assert len(preparations) == 3 * 4 + 2 * 2 + 1 and len(terms) == 3
    for found in (*plain[1:], *kept):
        torch.testing.assert_close(found, plain[0], rtol=1e-4, atol=1e-5)
    logits(model)
    assert len(preparations) == 17 and len(terms) == 4


def test_entering_leaving_and_clearing_forget_in_every_context(preparations):
    model = sharpened()
    with evaluation(model) as outer:
        logits(model)
        with pytest.raises(KeyError), evaluation(nn.ModuleList([model])) as inner:
            for expected in (34, 34):
                logits(model)
                assert len(preparations) == expected
            by_data(model)
            inner.clear()
            changed = logits(model)
            assert len(preparations) == 51
            raise KeyError
        assert torch.equal(logits(model), changed) and len(preparations) == 68
    with outer, outer:
        logits(model)
    assert len(preparations) == 85 and outer.cache(model.layers[0].blocks[0].attn) is None
    with pytest.raises(TypeError, match="takes modules"):
        evaluation(print)


def test_only_the_modules_and_the_thread_of_the_context_prepare(preparations):
    model, other = sharpened(), sharpened("swin")
    with evaluation(model, other.layers[1]):
        twin, again = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        thread = threading.Thread(target=logits, args=(model,))
        thread.start()
        thread.join()
        assert torch.equal(logits(twin), logits(again)) and not preparations
        logits(other)
        assert len(preparations) == 4 + 2  # one block and its pre-MLP
        model.double()
        with torch.no_grad():
            model(IMAGES.double())
        assert len(preparations) == 6 + 17


def by_data(model):
    for parameter in model.parameters():
        parameter.data.mul_(1.1)


def by_numpy(model):
    for parameter in model.parameters():
        parameter.detach().numpy()[...] *= 1.1


def in_place(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)


def by_new_data(model):
    """Twice, so that the second may come to lie where the first was."""
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.05
    logits(model)
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.05


def by_loading(model):
    model.load_state_dict(
        {
            name: value * 1.1 if value.is_floating_point() and "mask" not in name else value
            for name, value in model.state_dict().items()
        }
    )


def by_replacing(model):
    attention = model.layers[0].blocks[0].attn
    attention.qkv.weight = nn.Parameter(attention.qkv.weight.detach() * 1.5)


def by_a_step(optimizer):
    def change(model):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer(model.parameters()).step()

    return change


def by_training(model):
    """The gradients are recorded before an evaluation, the step is made after it."""
    model(IMAGES).square().sum().backward()
    logits(model)
    torch.optim.SGD(model.parameters(), lr=0.01, fused=True).step()


SEEN = {
    "in place": in_place,
    "new data": by_new_data,
    "load_state_dict": by_loading,
    "another parameter": by_replacing,
    # PyTorch's version counters do not see the writes of fused optimizers
    "fused AdamW": by_a_step(lambda p: torch.optim.AdamW(p, 0.1, fused=True)),
    "fused SGD": by_a_step(lambda p: torch.optim.SGD(p, 0.1, fused=True)),
    "foreach AdamW": by_a_step(lambda p: torch.optim.AdamW(p, 0.1, foreach=True)),
    "training": by_training,
}


def assert_seen(model, change, inside):
    context = evaluation(model) if inside else evaluation()
    with context:
        before = logits(model)
        change(model)
        after = logits(model)
    assert (after - before).abs().max() > 1e-3
    fresh = logits(copy.deepcopy(model))
    torch.testing.assert_close(after, fresh, rtol=1e-4, atol=1e-5)
    for inference in (torch.no_grad, torch.inference_mode):
        with evaluation(model), inference():
            torch.testing.assert_close(model(IMAGES), fresh, rtol=1e-4, atol=1e-5)


@inside_and_outside
@pytest.mark.parametrize("change", SEEN)
def test_a_changed_weight_is_seen_at_once(change, inside):
    assert_seen(sharpened(), SEEN[change], inside)


@both_families
@pytest.mark.parametrize("change", [by_data, by_numpy])
def test_outside_writes_that_nothing_counts_are_seen(family, change):
    assert_seen(sharpened(family), change, inside=False)


def test_inside_parameters_made_in_inference_mode_are_read_each_time():
    with torch.inference_mode():
        model = sharpened()
        with evaluation(model):
            before = logits(model)
            for parameter in model.parameters():
                parameter.mul_(1.1)
            assert (logits(model) - before).abs().max() > 1e-3


def test_a_modifier_s_own_parameters_are_seen():
    model = sharpened()
    crpw = model.layers[0].blocks[0].attn.modifiers["crpw"]
    with evaluation(model):
        before = logits(model)
        with torch.no_grad():
            crpw.coords.mul_(3)
        assert (logits(model) - before).abs().max() > 1e-4


@both_families
def test_modules_put_in_and_taken_out_are_seen(family):
    model = sharpened(family)
    attention = model.layers[0].blocks[0].attn

    def taken_out():
        del attention.modifiers["qk_residual"]  # which has no parameters

    def put_in():
        layers = attention.cpb_mlp if family == "swinv2" else attention.modifiers["crpw"].mlp
        layers[1] = nn.Tanh().eval()

    with evaluation(model):
        for change in (put_in, taken_out):
            before = logits(model)
            change()
            found, right = logits(model), logits(copy.deepcopy(model))
            assert torch.allclose(found, right, rtol=1e-4, atol=1e-5)
            assert not torch.allclose(found, before, rtol=1e-4, atol=1e-5)


def test_gradients_and_training_mode_inside_are_as_outside(preparations):
    model = sharpened()
    with evaluation(model):
        logits(model)
        model.train()(IMAGES).sum().backward()
    assert all(p.grad is not None for p in model.parameters()) and len(preparations) == 17


def test_only_inside_are_the_optimizers_of_the_process_hooked():
    hooks = optimizers._global_optimizer_post_hooks
    before = len(hooks)
    assert not any(hook.__module__.startswith("kernels") for hook in hooks.values())
    with evaluation(nn.Linear(1, 1)), evaluation(nn.Linear(1, 1)):
        assert len(hooks) == before + 1
    assert len(hooks) == before
