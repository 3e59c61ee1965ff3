"""why_not_fused: which attention modules run as the fused kernel, and why the others do not."""

import pytest
import torch

from kernels.window_attention import fused, interface
from models.attention import AttentionSpec
from models.attention.report import describe_attention, why_not_fused
from tests.models.builders import small

WIDE = {"embed_dim": 32}  # head_dim 16


@pytest.fixture
def built(monkeypatch):
    """As on a machine that has the kernel; it is not called here."""
    monkeypatch.setattr(interface, "missing", lambda device: None)


def reasons(**options):
    found = why_not_fused(small("swin", **options))
    assert list(found) == [
        "layers.0.blocks.0.attn",
        "layers.0.blocks.1.attn",
        "layers.1.blocks.0.attn",
    ]
    return set(found.values())


@pytest.mark.parametrize(
    "modifiers",
    [
        (),
        ("qk_residual",),
        ("crpw",),
        ("qk_residual", "crpw"),
        ("gaussian_mixture_mask",),
        ("gaussian_mixture_mask(position=post)",),
    ],
)
def test_plain_attention_and_modified_tables_run_fused(built, modifiers):
    assert reasons(attention=AttentionSpec(modifiers), **WIDE) == {None}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "head_dim 4 is not compiled"),
        ({"attention": AttentionSpec(("talking_heads",)), **WIDE}, "needs the N x N matrix"),
        (
            {
                "attention": AttentionSpec(
                    ("gaussian_mixture_mask(position=post, renormalise=True)",)
                ),
                **WIDE,
            },
            "renormalised",
        ),
        ({"attention": AttentionSpec(backend="eager"), **WIDE}, "set to eager"),
    ],
)
def test_the_reason_is_given_where_it_does_not(built, options, reason):
    assert all(reason in found for found in reasons(**options))


def test_a_kernel_that_is_not_there_is_the_reason(monkeypatch):
    monkeypatch.setattr(interface, "missing", lambda device: "no C++ compiler found")
    assert reasons(**WIDE) == {"no C++ compiler found"}


def test_a_hook_on_the_map_and_the_environment_are_reasons(built, monkeypatch):
    model = small("swinv2", **WIDE)
    model.layers[0].blocks[1].attn.map_tap.register_forward_hook(lambda *_: None)
    assert [name for name, reason in why_not_fused(model).items() if reason] == [
        "layers.0.blocks.1.attn"
    ]
    monkeypatch.setenv("WINDOW_ATTENTION_BACKEND", "reference")
    assert set(why_not_fused(model).values()) == {"the backend is set to reference"}


def test_double_precision_is_not_compiled_and_autocast_to_16_bits_is(built):
    model = small("swin", **WIDE)
    assert all("float64" in reason for reason in why_not_fused(model.double()).values())
    with torch.autocast("cpu", torch.bfloat16):
        assert set(why_not_fused(model.float()).values()) == {None}
    assert fused.DTYPES == (torch.float32, torch.float16, torch.bfloat16)


def test_the_log_line_counts_and_gives_the_reason(built):
    assert (
        describe_attention(small("swin", **WIDE))
        == "attention: 3 of 3 modules run as the fused kernel"
    )
    line = describe_attention(small("swin", attention=AttentionSpec(("talking_heads",)), **WIDE))
    assert (
        line.startswith("attention: 0 of 3 modules run as the fused kernel; 3 not: ")
        and "N x N" in line
    )
    assert describe_attention(small("swin_mlp")) == "attention: the model has none"


def test_the_log_line_and_the_printed_model_name_the_modifiers(built):
    texts = ("qk_residual", "exclusive(a=learned, init=0.5)")
    model = small("swin", attention=AttentionSpec(texts), **WIDE)
    assert describe_attention(model) == (
        "attention: 3 of 3 modules run as the fused kernel"
        "; modifiers: qk_residual, exclusive(a=learned, init=0.5)"
    )
    assert "(exclusive): Exclusive(a=learned, init=0.5)" in str(model)
    assert "(qk_residual): QKResidual()" in str(model)
