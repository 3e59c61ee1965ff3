"""The check that stands before the first use on a GPU, here with kernels that are right and
wrong.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.window_attention import OffsetTerms, explain, fused, selfcheck
from kernels.window_attention.eager import window_attention_eager
from kernels.window_attention.reference import window_attention_reference


def test_right_kernels_pass():
    assert selfcheck.find_fault(window_attention_reference, "cpu") is None
    assert selfcheck.find_fault(window_attention_eager, "cpu") is None
    if fused.missing("cpu") is None:
        assert selfcheck.find_fault(fused.window_attention_fused, "cpu") is None


@pytest.mark.parametrize("wrong", ["shift", "scale", "bias", "output"])
def test_a_wrong_kernel_is_named_with_what_is_off(wrong):
    def kernel(qkv, terms, layout, heads):
        if wrong == "scale":
            terms = terms.replace(scale=terms.scale.flip(0))
        if wrong == "bias":
            terms = terms.replace(bias=terms.bias.roll(1, 0))
        if wrong == "shift":
            qkv = qkv.roll(1, 1)
        y = window_attention_reference(qkv, terms, layout, heads)
        return y * 1.05 if wrong == "output" else y

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
        assert selfcheck.find_fault(window_attention_eager, "cpu") is None
