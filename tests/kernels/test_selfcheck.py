"""The check that stands before the first use on a GPU, here with kernels that are right and
wrong.
"""

import pytest

from kernels.window_attention import fused, selfcheck
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


def test_a_kernel_that_fails_its_check_is_not_taken_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(fused, "_missing", {})
    monkeypatch.setattr(fused.loader, "missing", lambda device: None)
    monkeypatch.setattr(
        fused.selfcheck, "find_fault", lambda kernel, device: "output is off by 0.5"
    )
    assert "output is off by 0.5" in fused.missing("cuda")
    assert "PyTorch's own operations are used" in capsys.readouterr().err
