"""What window attention and the products beside it refuse, alike in every backend, and what they
take: odd memory, tensors without values.
"""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.linear import evaluation, run_linear
from kernels.linear.gelu import gelu_backward_into, gelu_into
from kernels.modes import is_fake
from kernels.window_attention import (
    BACKENDS,
    OffsetTerms,
    fused,
    window_attention,
    window_layout,
    window_partition,
    window_reverse,
)
from kernels.window_attention.reference import split_windows
from models.attention import AttentionSpec
from models.layers.mlp import Mlp
from tests.models.builders import ATTENTION_FAMILIES, small

HEADS, WINDOW = 2, (4, 4)
QKV, TABLE = (1, 8, 4, 3 * HEADS * 16), (49, HEADS)
needs_kernel = pytest.mark.skipif(
    fused.missing("cpu") is not None, reason=f"the CPU kernel is not here: {fused.missing('cpu')}"
)


def call(backend, dropout=0.0, **changes):
    given = {
        "qkv": torch.ones(QKV),
        "scale": torch.ones(1, HEADS),
        "bias": torch.ones(TABLE),
        "window": WINDOW,
        "layout": window_layout((8, 4), WINDOW, (2, 0)),
        **changes,
    }
    terms = OffsetTerms(given["window"], given["scale"], given["bias"])
    return window_attention(given["qkv"], terms, given["layout"], HEADS, False, dropout, backend)


REFUSED = {
    "another grid": ({"layout": window_layout((4, 8), WINDOW)}, "layout is that of 4x8 tokens"),
    "a smaller grid": ({"layout": window_layout((7, 4), WINDOW)}, "layout is that of 7x4 tokens"),
    "another window": (
        {"layout": window_layout((8, 4), (2, 8)), "bias": torch.ones(45, HEADS), "window": (8, 2)},
        "bias is that of a window of 8x2 tokens, the layout has windows of 2x8",
    ),
    "integers": ({"qkv": torch.ones(QKV, dtype=torch.int64)}, "qkv is int64"),
    "too few rows": ({"bias": torch.ones(48, HEADS)}, r"bias is \(48, 2\); \(49 or 1, 2\)"),
    "too many rows": ({"scale": torch.ones(81, HEADS)}, r"scale is \(81, 2\)"),
    "other heads": ({"bias": torch.ones(49, 3)}, r"bias is \(49, 3\)"),
    "too small a map": ({"bias": torch.ones(HEADS, 9, 9)}, r"bias is \(2, 9, 9\)"),
    "channels": ({"qkv": torch.ones(1, 8, 4, 97)}, "qkv must be"),
    "no batch": ({"qkv": torch.ones(8, 4, 96)}, "qkv must be"),
    "complex factors": (
        {"scale": torch.ones(1, HEADS, dtype=torch.complex64)},
        "scale is complex64",
    ),
    "a table elsewhere": ({"bias": torch.ones(TABLE, device="meta")}, "bias is on meta"),
    "a layout elsewhere": (
        {"layout": window_layout((8, 4), WINDOW, device=torch.device("meta"))},
        "layout is on meta",
    ),
}


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_answer_is_refused_in_one_line_by_every_backend(case, backend):
    changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as error:
        call(backend, **changes)
    assert "\n" not in str(error.value)


def test_cards_are_told_apart():
    with FakeTensorMode(), pytest.raises(ValueError, match="bias is on cuda:1, qkv on cuda:0"):
        layout = window_layout((8, 4), WINDOW, device=torch.device("cuda:0"))
        qkv, scale = (torch.ones(s, device="cuda:0") for s in (QKV, (1, HEADS)))
        bias = torch.ones(TABLE, device="cuda:1")
        call("auto", qkv=qkv, scale=scale, bias=bias, layout=layout)


def test_a_dense_scale_goes_with_a_table_of_biases():
    dense = torch.full((HEADS, 16, 16), 0.5)
    bias, qkv = torch.randn(TABLE), torch.randn(QKV)
    right = call("reference", qkv=qkv, bias=bias, scale=torch.full((1, HEADS), 0.5))
    for backend in ("reference", "eager"):
        found = call(backend, qkv=qkv, bias=bias, scale=dense)
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


def test_the_open_path_asks_for_the_same_grid_and_rows():
    with pytest.raises(ValueError, match="layout is that of 4x8 tokens"):
        split_windows(torch.ones(QKV), window_layout((4, 8), WINDOW), HEADS)
    for rows in (48, 50):
        with pytest.raises(ValueError, match=f"a table of {rows} rows"):
            OffsetTerms(WINDOW, torch.ones(rows, HEADS)).dense("scale")


@pytest.mark.parametrize("given", [((8, 8), (4, 4), (4, 0)), ((8, 8), (0, 4), (0, 0))])
def test_a_layout_that_cannot_be_is_refused(given):
    with pytest.raises(ValueError, match="0 <= shift < window"):
        window_layout(*given)


def test_a_grid_of_no_whole_windows_is_neither_cut_nor_put_together():
    with pytest.raises(ValueError, match="grid of 7x8 tokens cannot be cut into windows of 4x4"):
        window_partition(torch.ones(1, 7, 8, 2), 4)
    with pytest.raises(ValueError, match="cannot be cut"):
        window_reverse(torch.ones(49, 4, 4, 2), 4, 7, 7)  # whose number would fit 16 images


@needs_kernel
@pytest.mark.parametrize(
    ("number", "value", "message"),
    [
        (0, torch.ones(1, 4, 8, HEADS * 16), "grad_out must be like the output"),
        (0, torch.ones(1, 8, 4, HEADS * 16, dtype=torch.bfloat16), "grad_out must be like"),
        (1, torch.ones(3), "grad_lse is not like lse"),
        (3, torch.ones(1, 8, 8, HEADS * 16), "out must be like the output"),
        (4, torch.ones(3), "lse is not what the forward returns"),
        (5, torch.ones(3), "along is not what the forward returns"),
        (5, None, "the exclusive epilogue needs out and along"),
        (6, torch.ones(7, HEADS), "scale must be"),
        (11, torch.ones(HEADS, 1), r"exclusion must be \(2,\)"),
        (9, torch.ones(HEADS), "alpha and beta of an affine epilogue come together"),
    ],
)
def test_the_backward_operation_checks_what_it_is_given(number, value, message):
    out, rows = torch.ones(1, 8, 4, HEADS * 16), torch.ones(1, 2, HEADS, 16)
    arguments = [out, rows, torch.ones(QKV), out, rows, rows, torch.ones(1, HEADS), None, None]
    arguments += [None, None, torch.ones(HEADS), None, [4, 4], [0, 0], HEADS, False, -100.0, 0.0]
    arguments += [False] * 6
    torch.ops.idsw.window_attention_backward(*arguments)
    arguments[number] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.idsw.window_attention_backward(*arguments)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_that_starts_between_two_vectors_is_copied_first(dtype):
    def outcome(offset):
        whole = torch.randn(torch.Size(QKV).numel() + 1, generator=torch.Generator().manual_seed(0))
        memory = torch.cat([whole[:offset], whole[1:]]).to(dtype).requires_grad_()
        qkv = memory[offset:].view(QKV)
        with torch.profiler.profile() as profile:
            y = call("fused", qkv=qkv)
            y.square().sum().backward()
        copies = sum(event.name == "aten::clone" for event in profile.events())
        return y, memory.grad[offset:], copies

    (*odd, copied), (*even, uncopied) = outcome(1), outcome(0)
    assert all(map(torch.equal, odd, even))
    assert copied == uncopied + 2  # once in the forward, once in the backward


@pytest.mark.parametrize("recorded", [True, False])
def test_integers_are_no_input_of_a_linear_layer(recorded):
    module = Mlp(4, 8)
    with evaluation(module), torch.set_grad_enabled(recorded):
        for run in (module, lambda x: run_linear(module.fc1, x)):
            with pytest.raises(TypeError, match="got int64"):
                run(torch.ones(3, 4, dtype=torch.int64))


def test_a_linear_layer_says_how_many_channels_it_takes():
    module = Mlp(4, 8)
    with evaluation(module), torch.no_grad():
        for run in (module, lambda x: run_linear(module.fc1, x)):
            with pytest.raises(ValueError, match=r"of 4 channels got \(3, 6\)"):
                run(torch.ones(3, 6))
    for x in (torch.ones(3000, 6), torch.ones(3000, 6, requires_grad=True)):
        with pytest.raises(RuntimeError, match="3000x6"):  # PyTorch's own words
            run_linear(nn.Linear(4, 4000), x)


@needs_kernel
def test_the_gelu_refuses_to_lose_a_gradient():
    rows, act = torch.ones(3, 8, requires_grad=True), torch.empty(3, 8)
    for run in (lambda: gelu_into(act, rows), lambda: gelu_backward_into(act, act, rows)):
        with pytest.raises(ValueError, match="no gradient"):
            run()


@pytest.mark.parametrize("backend", [*BACKENDS, "auto", "open"])
def test_padding_is_no_number_of_cosine_attention_in_float16(backend):
    layout = window_layout((7, 10), WINDOW, (2, 2))
    qkv = torch.randn(1, 7, 10, 96, generator=torch.Generator().manual_seed(0)).half()
    terms = OffsetTerms(WINDOW, torch.full((1, HEADS), 8.0))
    right = window_attention(qkv.double(), terms, layout, HEADS, True, 0.0, "reference")
    if backend == "open":
        model = small("swinv2", img_size=(14, 20), attention=AttentionSpec(("talking_heads",)))
        assert model.half()(torch.ones(1, 3, 14, 20).half()).isfinite().all()
        return
    if backend == "fused" and fused.missing("cpu"):
        pytest.skip(f"the CPU kernel is not here: {fused.missing('cpu')}")
    y = window_attention(qkv, terms, layout, HEADS, True, 0.0, backend)
    torch.testing.assert_close(y.double(), right, rtol=1e-2, atol=1e-2)


DRY_RUNS = [
    (place, family, backend)
    for place in ("meta", "fake")
    for family in ATTENTION_FAMILIES
    for backend in (("auto", "fused") if "swin" in family else ("auto",))
    if (place, family) != ("fake", "timm")  # timm draws weights by their values
]


@pytest.mark.parametrize(
    ("place", "family", "backend"),
    [
        run if run[1:] == ("swin", "fused") else pytest.param(*run, marks=pytest.mark.slow)
        for run in DRY_RUNS
    ],
)
def test_a_model_runs_forwards_and_backwards_without_memory(place, family, backend):
    modifiers = ("qk_residual",) if family != "t2t" else ()
    embed_dim = {"embed_dim": 32} if "swin" in family else {}

    def build():
        spec = AttentionSpec(modifiers, backend=backend)
        return small(family, attention=spec, **embed_dim)

    def run(model, device):
        images = torch.zeros(2, 3, 16, 16, device=device)
        y = model(images)
        y.square().sum().backward()
        with torch.no_grad():
            assert model.eval()(images).shape == y.shape
        return y.shape, [None if p.grad is None else p.grad.shape for p in model.parameters()]

    if place == "meta":
        with torch.device("meta"):
            model = build()
        found = run(model, "meta")
    else:
        with FakeTensorMode():
            found = run(build(), "cpu")
    assert found == run(build(), "cpu")


def test_what_is_made_for_fake_tensors_stays_with_them():
    with FakeTensorMode():
        assert is_fake(window_layout((23, 19), (5, 3), (2, 1)).tokens)
    assert not is_fake(window_layout((23, 19), (5, 3), (2, 1)).tokens)
