"""The check that stands before the first use on a GPU, here with kernels that are right and
wrong.
"""

import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.window_attention import (
    Epilogue,
    OffsetTerms,
    explain,
    fused,
    selfcheck,
    window_attention,
)

REFERENCE, EAGER = (
    functools.partial(window_attention, backend=backend) for backend in ("reference", "eager")
)


def test_right_kernels_pass():
    assert selfcheck.find_fault(REFERENCE, "cpu") is None
    assert selfcheck.find_fault(EAGER, "cpu") is None
    if fused.missing("cpu") is None:
        assert selfcheck.find_fault(fused.window_attention_fused, "cpu") is None


@pytest.mark.parametrize(
    "wrong",
    [
        *("shift", "scale", "bias", "output"),
        *(pytest.param(w, marks=pytest.mark.slow) for w in ("beta", "exclusion", "log-sum-exp")),
    ],
)
def test_a_wrong_kernel_is_named_with_what_is_off(wrong):
    def kernel(qkv, terms, layout, heads, epilogue=None, return_lse=False):
        if wrong == "beta" and epilogue and epilogue.beta is not None:
            epilogue = Epilogue(epilogue.alpha, epilogue.beta * 1.05)
        if wrong == "exclusion" and epilogue and epilogue.exclusion is not None:
            epilogue = Epilogue(exclusion=epilogue.exclusion * 1.05)
        if wrong == "scale":
            terms = terms.replace(scale=terms.scale.flip(0))
        if wrong == "bias":
            terms = terms.replace(bias=terms.bias.roll(1, 0))
        if wrong == "shift":
            qkv = qkv.roll(1, 1)
        options = {"epilogue": epilogue, "return_lse": return_lse}
        found = REFERENCE(qkv, terms, layout, heads, **options)
        if wrong == "output" and not return_lse:
            return found * 1.05
        if wrong == "log-sum-exp" and return_lse:
            return found[0], found[1] * 1.05
        return found

    assert "off by" in selfcheck.find_fault(kernel, "cpu")


def test_a_card_whose_kernel_fails_its_check_does_without_and_the_others_keep_theirs(
    monkeypatch, capsys
):
    looked_at = []

    def find_fault(kernel, device):
        looked_at.append(device)
        return "output is off by 0.5" if device == "cuda:1" else None

    monkeypatch.setattr(fused, "_answers", {})
    monkeypatch.setattr(fused.loader, "missing", lambda device: None)
    monkeypatch.setattr(fused.selfcheck, "find_fault", find_fault)
    with FakeTensorMode():
        found = [explain(*tensors_on(device)) for device in ("cuda:0", "cuda:1", "cuda:1")]
    assert [backend for backend, _ in found] == ["fused", "sdpa", "sdpa"]
    assert "output is off by 0.5" in found[1][1] and looked_at == ["cuda:0", "cuda:1"]
    assert capsys.readouterr().err.count("PyTorch's own operations are used") == 1


def tensors_on(device):
    scale = torch.ones(1, 2, device=device)
    return torch.empty(1, 4, 4, 3 * 32, device=device), OffsetTerms((4, 4), scale)


def test_the_check_looks_at_values_where_fake_tensors_are_asked_for():
    with FakeTensorMode():
        assert selfcheck.find_fault(EAGER, "cpu") is None
