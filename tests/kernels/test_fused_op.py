"""The fused operation as PyTorch sees it: schema, tracing, compile, export, autocast, checkpoints,
transforms, whole models.
"""

import copy
import dataclasses

import pytest
import torch
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from kernels.window_attention import (
    OffsetTerms,
    explain,
    fused,
    interface,
    window_attention,
    window_layout,
)
from kernels.window_attention.plain import plain_attention
from kernels.window_attention.testing import EPILOGUES
from models.attention import AttentionSpec
from tests.kernels.grids import GRIDS, offsets
from tests.models.builders import randomise, small

HEADS, DIM = 2, 16
FACTORS = ("alpha", "beta", "exclusion")


@pytest.fixture(autouse=True)
def kernel():
    reason = fused.missing("cpu")
    if reason:
        pytest.skip(f"the CPU kernel is not here: {reason}")


def draw(window, batch=2, grid=(7, 10), scale="table", dtype=torch.float32, post=False):
    """qkv (batch, *grid, 3 * HEADS * DIM) and the tables, all asking for gradients."""
    generator = torch.Generator().manual_seed(1)
    rows = offsets(window)
    tables = {
        "scale": torch.rand(rows if scale == "table" else 1, HEADS, generator=generator) + 0.2,
        "bias": torch.randn(rows, HEADS, generator=generator),
    }
    if post:
        tables["post"] = torch.rand(rows, HEADS, generator=generator) + 0.5
    qkv = torch.randn(batch, *grid, 3 * HEADS * DIM, generator=generator).to(dtype)
    return qkv.requires_grad_(), {name: table.requires_grad_() for name, table in tables.items()}


def attend(layout, cosine=False, dropout=0.0, backend="fused"):
    def function(qkv, scale, bias=None, post=None):
        return window_attention(
            qkv,
            OffsetTerms(layout.window, scale, bias, post),
            layout,
            HEADS,
            cosine,
            dropout,
            backend,
        )

    return function


def with_gradients(y, inputs):
    generator = torch.Generator().manual_seed(3)
    return [
        y,
        *torch.autograd.grad((y.float() * torch.randn(y.shape, generator=generator)).sum(), inputs),
    ]


def identical(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    ("scale", "cosine", "post"),
    [
        ("table", False, False),
        ("table", True, True),
        ("uniform", True, False),
        ("uniform", False, True),
    ],
)
def test_the_result_and_its_gradients_are_the_specification_s(grid, scale, cosine, post):
    layout = window_layout(*grid)
    qkv, tables = draw(layout.window, grid=layout.grid, scale=scale, post=post)
    inputs = [qkv, *tables.values()]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = with_gradients(
        attend(layout, cosine, backend="reference")(
            exact[0], **dict(zip(tables, exact[1:], strict=True))
        ),
        exact,
    )
    for ours, truth in zip(
        with_gradients(attend(layout, cosine)(qkv, **tables), inputs), expected, strict=True
    ):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    "case", ["everything", "one scale, dropout", "no gradient", "affine", "exclusive"]
)
def test_forward_passes_pytorch_s_checks_of_an_operation(case):
    qkv, tables = draw((4, 4), post=True)
    scale, bias, post, seed, dropout = tables["scale"], tables["bias"], tables["post"], None, 0.0
    if case == "one scale, dropout":
        scale, bias, post, seed, dropout = (
            scale.detach()[:1].requires_grad_(),
            None,
            None,
            torch.tensor([5]),
            0.3,
        )
    if case == "no gradient":
        qkv, scale, bias, post = qkv.detach(), scale.detach(), bias.detach(), None
    given = EPILOGUES[case if case in EPILOGUES else ""]
    factors = [torch.rand(HEADS).requires_grad_() if name in given else None for name in FACTORS]
    arguments = (
        qkv,
        scale,
        bias,
        post,
        *factors,
        seed,
        [4, 4],
        [2, 2],
        HEADS,
        case != "one scale, dropout",
        -100.0,
        dropout,
        qkv.requires_grad,
    )
    assert set(opcheck(torch.ops.idsw.window_attention_forward.default, arguments).values()) == {
        "SUCCESS"
    }


@pytest.mark.parametrize(
    ("epilogue", "needed"),
    [
        ("affine", (True, True, True, True, True, False)),
        ("exclusive", (False, True, False, False, False, True)),
        ("exclusive", (False,) * 6),
        ("", (True, True, True, False, False, False)),
    ],
)
def test_backward_passes_pytorch_s_checks_of_an_operation(epilogue, needed):
    qkv, tables = draw((4, 4), post=True)
    tensors = [t.detach() for t in (qkv, *tables.values())]
    given = EPILOGUES[epilogue]
    factors = [torch.rand(HEADS) if name in given else None for name in FACTORS]
    out, lse, along = torch.ops.idsw.window_attention_forward(
        *tensors, *factors, None, [4, 4], [2, 2], HEADS, True, -100.0, 0.0, True
    )
    assert (along.numel() > 0) == (epilogue == "exclusive")
    arguments = (
        out,
        lse if epilogue else None,
        tensors[0],
        out if epilogue == "exclusive" else None,
        lse,
        along if epilogue == "exclusive" else None,
        *tensors[1:],
        *factors,
        None,
        [4, 4],
        [2, 2],
        HEADS,
        True,
        -100.0,
        0.0,
        *needed,
    )
    assert set(opcheck(torch.ops.idsw.window_attention_backward.default, arguments).values()) == {
        "SUCCESS"
    }
    grads = torch.ops.idsw.window_attention_backward(*arguments)
    assert [grad.numel() > 0 for grad in grads] == [True, *needed]


def test_a_compiled_graph_holds_one_operation_and_gives_the_same_bits():
    layout = window_layout((7, 10), (4, 4), (2, 2))
    qkv, tables = draw(layout.window, post=True)
    function = attend(layout, cosine=True, backend="auto")
    names = []

    def keep(module, _):
        names.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return module.forward

    torch.compile(function, fullgraph=True, backend=keep)(qkv, **tables)
    assert sum("window_attention_forward" in name for name in names) == 1
    assert not any("softmax" in name or "matmul" in name for name in names)
    compiled = torch.compile(function, fullgraph=True)
    inputs = [qkv, *tables.values()]
    assert identical(
        with_gradients(compiled(qkv, **tables), inputs),
        with_gradients(function(qkv, **tables), inputs),
    )


def test_a_compiled_call_drops_entries_anew_each_time():
    layout = window_layout((8, 8), (4, 4))
    qkv, tables = draw(layout.window, grid=(8, 8))
    compiled = torch.compile(attend(layout, dropout=0.5), fullgraph=True, backend="aot_eager")
    assert not torch.equal(compiled(qkv, **tables), compiled(qkv, **tables))


def test_an_exported_program_holds_the_operation_and_takes_any_batch():
    layout = window_layout((7, 10), (4, 4), (2, 2))
    qkv, tables = draw(layout.window)

    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tables = torch.nn.ParameterDict(tables)

        def forward(self, qkv):
            return attend(layout, backend="auto")(qkv, **dict(self.tables.items()))

    module = Attention()
    program = torch.export.export(
        module,
        (qkv.detach(),),
        dynamic_shapes={"qkv": {0: torch.export.Dim("batch", min=1, max=64)}},
    )
    assert any("window_attention_forward" in str(node.target) for node in program.graph.nodes)
    more = torch.randn(5, *qkv.shape[1:])
    assert torch.equal(program.module()(more), module(more))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_takes_qkv_to_its_dtype_and_leaves_the_tables(dtype):
    layout = window_layout((8, 8), (4, 4), (2, 2))
    qkv, tables = draw(layout.window, grid=(8, 8))
    function, inputs = attend(layout), [qkv, *tables.values()]
    with torch.autocast("cpu", dtype=dtype):
        assert explain(qkv, OffsetTerms(layout.window, **tables))[0] == "fused"
        y = function(qkv, **tables)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(qkv, **tables)
    assert y.dtype == dtype
    ours = with_gradients(y, inputs)
    assert [grad.dtype for grad in ours[1:]] == [torch.float32] * 3
    assert identical(ours, with_gradients(compiled, inputs))
    assert identical(ours, with_gradients(function(qkv.to(dtype), **tables), inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cosine", [False, True])
def test_16_bits_err_no_more_than_twice_pytorch_in_the_same_dtype(dtype, cosine):
    layout = window_layout((14, 14), (7, 7), (3, 3))
    qkv, tables = draw(layout.window, grid=(14, 14), dtype=dtype)
    inputs = [qkv, *tables.values()]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    truths = with_gradients(attend(layout, cosine, backend="reference")(*exact), exact)
    plain = with_gradients(attend(layout, cosine, backend="reference")(qkv, **tables), inputs)
    for ours, theirs, truth in zip(
        with_gradients(attend(layout, cosine)(qkv, **tables), inputs), plain, truths, strict=True
    ):
        for norm in (2, float("inf")):
            error = [
                torch.linalg.vector_norm(t.double() - truth, norm)
                / torch.linalg.vector_norm(truth, norm)
                for t in (ours, theirs)
            ]
            assert error[0] <= 2 * error[1] + torch.finfo(dtype).eps


def test_tables_in_16_bits_and_one_mixture_for_all_heads_are_taken():
    layout = window_layout((8, 8), (4, 4), (2, 2))
    qkv, tables = draw(layout.window, grid=(8, 8))
    scale = tables["scale"].detach()[:, :1].clone().requires_grad_()  # (T, 1)
    low = tables["bias"].detach().bfloat16().requires_grad_()
    terms = OffsetTerms(layout.window, tables["scale"], low, scale)
    y = window_attention(qkv, terms, layout, HEADS, backend="fused")
    expected = window_attention(
        qkv,
        OffsetTerms(layout.window, tables["scale"], low.float(), scale),
        layout,
        HEADS,
        backend="reference",
    )
    torch.testing.assert_close(y, expected)
    for ours, truth in zip(
        with_gradients(y, [scale, low]), with_gradients(expected, [scale, low]), strict=True
    ):
        assert ours.shape == truth.shape and ours.dtype == truth.dtype
        torch.testing.assert_close(
            ours, truth, rtol=1e-2 if ours.dtype == torch.bfloat16 else 1e-4, atol=1e-4
        )


@pytest.mark.parametrize("reentrant", [True, False])
def test_an_activation_checkpoint_drops_the_same_entries_again(reentrant):
    layout = window_layout((8, 8), (4, 4), (2, 2))
    qkv, tables = draw(layout.window, grid=(8, 8))
    function = attend(layout, dropout=0.4)
    results = []
    for wrap in (
        lambda q, *rest: function(q, *rest),
        lambda q, *rest: checkpoint(function, q, *rest, use_reentrant=reentrant),
    ):
        torch.manual_seed(7)
        leaves = [t.detach().clone().requires_grad_() for t in (qkv, *tables.values())]
        y = wrap(*leaves)
        y.square().sum().backward()
        results.append([y, *(leaf.grad for leaf in leaves)])
    assert identical(*results)


def test_the_seed_decides_what_is_dropped_and_the_mean_is_kept():
    layout = window_layout((8, 8), (8, 8))
    qkv, tables = draw(layout.window, grid=(8, 8), batch=32)
    qkv = qkv.detach().clone()
    qkv[..., 2 * HEADS * DIM :] = 1  # v of ones shows the sums of the rows
    function = attend(layout, dropout=0.25)
    torch.manual_seed(0)
    first, second = function(qkv, **tables), function(qkv, **tables)
    torch.manual_seed(0)
    assert torch.equal(first, function(qkv, **tables)) and not torch.equal(first, second)
    assert abs(first.mean() - 1) < 0.01
    assert 0.05 < first.std() < 1


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_of_torch_func_give_the_gradient_of_each_sample():
    layout = window_layout((7, 10), (4, 4), (2, 2))
    qkv, tables = draw(layout.window, batch=3)
    scale, bias = (tables[name].detach() for name in ("scale", "bias"))

    def loss(scale, sample):
        return attend(layout)(sample[None], scale, bias).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(scale, qkv.detach())
    for sample, ours in zip(qkv.detach(), each, strict=True):
        leaf = scale.clone().requires_grad_()
        alone = torch.autograd.grad(loss(leaf, sample), leaf)[0]
        torch.testing.assert_close(ours, alone, rtol=1e-4, atol=1e-4)


def test_only_the_gradients_that_are_asked_for_are_computed(monkeypatch):
    layout = window_layout((8, 8), (4, 4))
    qkv, tables = draw(layout.window, grid=(8, 8))
    y = attend(layout)(qkv, tables["scale"].detach(), tables["bias"])
    asked = []
    call = torch.ops.idsw.window_attention_backward

    def spy(*arguments):
        asked.append(arguments[-6:])
        return call(*arguments)

    monkeypatch.setattr(torch.ops.idsw, "window_attention_backward", spy)
    y.sum().backward()
    assert asked == [(False, True, False, False, False, False)]


def test_a_gradient_of_the_gradient_has_the_same_entries_dropped():
    layout = window_layout((3, 4), (2, 2), (1, 1))
    qkv, tables = draw(layout.window, grid=(3, 4))
    inputs = [qkv, *tables.values()]
    seed = torch.tensor([2**62 + 5])
    arguments = (None, None, None, None, seed, [2, 2], [1, 1], HEADS, True, -100.0, 0.4)
    y = torch.ops.idsw.window_attention_forward(*inputs, *arguments, True)[0]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    outcomes = []
    for result, leaves in ((y, inputs), (plain_attention(*exact, *arguments)[0], exact)):
        first = torch.autograd.grad(result.sin().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        outcomes.append([result, *first, *second])
    for ours, right in zip(*outcomes, strict=True):
        torch.testing.assert_close(
            ours.double(), right, rtol=1e-4, atol=1e-4 * right.abs().max().item()
        )


def test_an_empty_batch_gives_empty_results_and_zero_gradients():
    layout = window_layout((8, 8), (4, 4))
    qkv, tables = draw(layout.window, grid=(8, 8), batch=0)
    grads = with_gradients(attend(layout)(qkv, **tables), [qkv, *tables.values()])
    assert grads[0].shape == (0, 8, 8, HEADS * DIM)
    assert all(not grad.any() for grad in grads)


def test_strided_inputs_and_any_mask_value_are_right():
    layout = window_layout((8, 8), (4, 4), (1, 3), mask_value=-3.0)
    qkv, tables = draw(layout.window, grid=(8, 8))
    strided = qkv.detach().transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    expected = attend(layout, backend="reference")(qkv, **tables)
    torch.testing.assert_close(attend(layout)(strided, **tables), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": torch.ones(5, HEADS)}, r"scale must be \(49 or 1, 2\)"),
        ({"bias": torch.ones(49, 3)}, r"bias must be \(49, 2\)"),
        ({"bias": torch.ones(49, HEADS).double()}, "bias must be float32"),
        ({"qkv": torch.ones(1, 8, 8, 97)}, r"qkv must be \(B, H, W, 3 \* heads \* head_dim\)"),
        ({"qkv": torch.ones(1, 8, 8, 96).double()}, "float32, float16 or bfloat16"),
        ({"qkv": torch.ones(1, 8, 8, 60)}, "head dimension"),
        ({"shift": [4, 0]}, "0 <= shift < window"),
        ({"window": [4]}, "pairs"),
        ({"alpha": torch.ones(HEADS)}, "alpha and beta of an affine epilogue come together"),
        ({"exclusion": torch.ones(3)}, r"exclusion must be \(2,\), a number for each head"),
        ({"exclusion": torch.ones(HEADS).double()}, "exclusion must be .* in float32"),
        ({"dropout": 0.5}, "needs a seed"),
        ({"dropout": 1.0}, r"not in \[0, 1\)"),
    ],
)
def test_what_the_operation_cannot_take_is_said_in_one_line(change, message):
    arguments = {
        "qkv": torch.ones(1, 8, 8, 96),
        "scale": torch.ones(1, HEADS),
        "bias": None,
        "post": None,
        "alpha": None,
        "beta": None,
        "exclusion": None,
        "seed": None,
        "window": [4, 4],
        "shift": [0, 0],
        "num_heads": HEADS,
        "cosine": False,
        "mask_value": -100.0,
        "dropout": 0.0,
        "need_lse": False,
        **change,
    }
    with pytest.raises(RuntimeError, match=message) as error:
        torch.ops.idsw.window_attention_forward(*arguments.values())
    assert "window_attention: " in str(error.value)


@pytest.mark.parametrize(
    ("terms", "dim", "message"),
    [
        ({"renormalise": True, "post": torch.ones(49, HEADS)}, 16, "renormalised"),
        ({"prefix": 1}, 16, "class tokens"),
        ({"bias": torch.ones(HEADS, 16, 16)}, 16, "bias is not given per offset"),
        ({}, 20, "head_dim 20 is not compiled"),
        ({"window": (1, 33)}, 16, "at most 32 along a side"),
    ],
)
def test_a_forced_backend_that_does_not_apply_is_an_error_and_auto_takes_another(
    terms, dim, message
):
    window = terms.get("window", (4, 4))
    qkv = torch.randn(1, *window, 3 * HEADS * dim)
    terms = OffsetTerms(**{"window": window, "scale": torch.ones(1, HEADS), **terms})
    with pytest.raises(ValueError, match=f"fused backend does not apply: .*{message}"):
        window_attention(qkv, terms, window_layout(window, window), HEADS, backend="fused")
    backend, reason = explain(qkv, terms)
    assert backend != "fused" and message in reason


@pytest.mark.parametrize(
    ("window", "dim"),
    [((1, 1), 16), ((24, 24), 32), ((3, 32), 64), ((32, 1), 8), ((2, 2), 48), ((4, 4), 256)],
)
def test_the_kernel_takes_all_that_explain_promises(window, dim):
    qkv = torch.randn(1, *window, 3 * dim)
    terms = OffsetTerms(window, torch.full((offsets(window), 1), dim**-0.5))
    assert explain(qkv, terms)[0] == "fused"
    layout = window_layout(window, window)
    torch.testing.assert_close(
        window_attention(qkv, terms, layout, 1),
        window_attention(qkv, terms, layout, 1, backend="reference"),
    )


MODIFIERS = [
    (),
    ("qk_residual",),
    ("qk_residual", "crpw"),
    ("gaussian_mixture_mask(init=identity)",),
    ("gaussian_mixture_mask(position=post, init=identity)",),
    ("crpw", "gaussian_mixture_mask(init=identity, share_heads=True)"),
]


@pytest.mark.parametrize("modifiers", MODIFIERS, ids=str)
@pytest.mark.parametrize("family", ["swin", "swinv2"])
def test_a_model_and_all_its_gradients_are_those_of_the_reference_in_double_precision(
    family, modifiers
):
    torch.manual_seed(0)
    images = torch.randn(2, 3, 36, 32)  # 18 x 16 tokens, padded to whole windows
    spec = AttentionSpec(modifiers, backend="fused")
    model = randomise(small(family, img_size=(36, 32), embed_dim=32, attention=spec), std=0.1)
    exact = copy.deepcopy(model).double()
    for module in exact.modules():
        if hasattr(module, "spec"):
            module.spec = dataclasses.replace(spec, backend="reference")
    logits, truth = model(images), exact(images.double())
    torch.testing.assert_close(logits.double(), truth, rtol=1e-4, atol=1e-5)
    logits.square().sum().backward()
    truth.square().sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), exact.parameters(), strict=True):
        scale = theirs.grad.abs().max().clamp(min=1)
        torch.testing.assert_close(
            ours.grad.double() / scale,
            theirs.grad / scale,
            rtol=1e-4,
            atol=1e-5,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("family", ["swin", "swinv2"])
def test_a_compiled_model_has_the_gradients_of_the_eager_one(family):
    torch.compiler.reset()
    model = randomise(
        small(family, embed_dim=32, attention=AttentionSpec(("qk_residual", "crpw"))), std=0.1
    )
    images = torch.randn(2, 3, 16, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    grads = []
    for function in (compiled, model):
        model.zero_grad()
        y = function(images)
        y.square().sum().backward()
        grads.append([y, *(p.grad.clone() for p in model.parameters())])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_auto_takes_the_kernel_and_the_reason_says_so(monkeypatch):
    layout = window_layout((8, 8), (4, 4))
    qkv, tables = draw(layout.window, grid=(8, 8))
    terms = OffsetTerms(layout.window, **tables)
    assert explain(qkv, terms)[0] == explain(qkv, terms, dropout=0.1)[0] == "fused"
    assert torch.equal(window_attention(qkv, terms, layout, HEADS), attend(layout)(qkv, **tables))
    monkeypatch.setattr(interface, "missing", lambda device: "it is not built")
    assert explain(qkv, terms) == (
        "eager",
        "not fused (it is not built); SDPA has no scale per offset",
    )
    monkeypatch.setattr(interface, "missing", lambda device: None)
    monkeypatch.setenv("WINDOW_ATTENTION_BACKEND", "reference")
    assert not torch.equal(
        window_attention(qkv, terms, layout, HEADS), attend(layout)(qkv, **tables)
    )
