"""Derivatives beyond the first backward, of every operation with a backward of its own: they are
those of the plain formula, by every way that PyTorch has to ask for them.
"""

import ast
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from kernels.linear import mlp, precision, products
from kernels.window_attention import (
    Epilogue,
    OffsetTerms,
    fused,
    window_attention,
    window_layout,
)
from models.attention import AttentionSpec, neighbourhood
from models.attention.geometry import Geometry
from models.attention.global_attention import GlobalAttention
from models.attention.modifiers import MODIFIERS
from models.layers.mlp import Mlp
from tests.helpers import ROOT

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
MODULE = Mlp(3, 5)
LAYOUT = window_layout((3, 4), (2, 2), (1, 1))  # shifted and padded


@dataclass(frozen=True)
class Operation:
    """`function` of tensors with these shapes, its plain `formula`, and the nodes it leaves in the
    graph.
    """

    nodes: tuple[str, ...]
    function: Callable[..., Tensor]
    formula: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype = F64
    tolerance: float = 1e-8
    setup: Callable = field(default=lambda monkeypatch: None)

    def __str__(self) -> str:
        return "+".join(self.nodes)

    def draw(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(shape, generator=generator, dtype=F64) for shape in self.shapes]


def attention(backend: str, cosine: bool = False) -> Callable[..., Tensor]:
    def function(qkv, scale, bias, *post):
        terms = OffsetTerms(LAYOUT.window, scale, bias, *post)
        return window_attention(qkv, terms, LAYOUT, 2, cosine, backend=backend)

    return function


def with_ending(backend: str, kind: str) -> Callable[..., Tensor]:
    """Result and log-sum-exp of attention with an epilogue, side by side."""

    def function(qkv, scale, bias, *factors):
        epilogue = Epilogue(*factors) if kind == "affine" else Epilogue(exclusion=factors[0])
        terms = OffsetTerms(LAYOUT.window, scale, bias)
        options = {"backend": backend, "epilogue": epilogue, "return_lse": True}
        return torch.cat(window_attention(qkv, terms, LAYOUT, 2, **options), -1)

    return function


def fused_mlp(x, *parameters):
    names = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    return torch.func.functional_call(MODULE, dict(zip(names, parameters, strict=True)), (x,))


def plain_mlp(x, w1, b1, w2, b2):
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


def small_chunks(monkeypatch):
    monkeypatch.setattr(precision, "CHUNK_BYTES", 1)
    monkeypatch.setattr(mlp, "WHOLE_BYTES", 0)
    monkeypatch.setattr(mlp, "PLAIN_BYTES", {True: 0, False: 0})


def widened(monkeypatch):
    small_chunks(monkeypatch)
    monkeypatch.setattr(precision, "WIDENED", frozenset([BF16]))


def in_bfloat16(function):
    def call(*inputs):
        with torch.autocast("cpu", BF16):
            return function(*inputs)

    return call


def add_input(qkv, x):
    residual = MODIFIERS.create("qk_residual", Geometry(4, 2, (2, 2)))
    return residual.add(x, qkv * 1.0)


def neighbours(q, k, v, row, col):
    return neighbourhood.neighbourhood_attention(q, k, v, row, col, 3)


def neighbours_by_formula(q, k, v, row, col):
    inputs = [x.flatten(0, 1) for x in (q, k, v)] + [row, col]
    return neighbourhood._attend(*inputs, 3, True).unflatten(0, (1, 2))


QKV, TABLE = (2, 3, 4, 48), (9, 2)
MLP = ((70, 3), (5, 3), (5,), (3, 5), (3,))
LINEAR = ((70, 4), (3, 4), (3,))
OPERATIONS = [
    *(
        Operation(
            ("GeneratedBackwardFor_idsw_window_attention_forward_defaultBackward",),
            attention("fused", cosine),
            attention("reference", cosine),
            (QKV, scale, TABLE, *post),
            F32,
            2e-4,
        )
        for cosine, scale, post in ((False, TABLE, [TABLE]), (True, (1, 2), []))
    ),
    *(
        Operation(
            ("GeneratedBackwardFor_idsw_window_attention_forward_defaultBackward",),
            with_ending("fused", kind),
            with_ending("reference", kind),
            (QKV, (1, 2), TABLE, *((2,) for _ in range(factors))),
            F32,
            2e-4,
        )
        for kind, factors in (("affine", 2), ("exclusive", 1))
    ),
    *(
        Operation(
            ("_AttentionBackward", "_EdgeBackward"),
            attention("eager", cosine),
            attention("reference", cosine),
            (QKV, scale, TABLE),
        )
        for cosine, scale in ((False, TABLE), (True, (1, 2)))
    ),
    Operation(("_MlpBackward",), fused_mlp, plain_mlp, MLP, setup=small_chunks),
    Operation(("_MlpBackward",), fused_mlp, plain_mlp, MLP, F32, 2e-4, small_chunks),
    Operation(("_MlpBackward",), in_bfloat16(fused_mlp), plain_mlp, MLP, F32, 0.1, widened),
    Operation(("_NarrowBackward",), products.linear, F.linear, LINEAR, F32, 2e-4, small_chunks),
    Operation(
        ("_WidenedBackward",), in_bfloat16(products.linear), F.linear, LINEAR, F32, 0.1, widened
    ),
    Operation(("_AddInPlaceBackward",), add_input, add_input, ((2, 12), (2, 4))),
    Operation(
        ("_ChunkedBackward",),
        neighbours,
        neighbours_by_formula,
        ((1, 2, 4, 5, 3),) * 3 + ((2, 3, 2),) * 2,
    ),
]
FIRST = {str(operation): number for number, operation in reversed([*enumerate(OPERATIONS)])}
every_operation = pytest.mark.parametrize(
    "operation",
    [
        operation
        if FIRST[str(operation)] == number
        else pytest.param(operation, marks=pytest.mark.slow)
        for number, operation in enumerate(OPERATIONS)
    ],
    ids=str,
)


@pytest.fixture(autouse=True)
def _kernel(request, monkeypatch):
    operation = (
        request.node.callspec.params.get("operation") if hasattr(request.node, "callspec") else None
    )
    if operation is None:
        return
    if "idsw" in str(operation) and fused.missing("cpu"):
        pytest.skip(f"the CPU kernel is not here: {fused.missing('cpu')}")
    operation.setup(monkeypatch)


def nodes_of(y: Tensor) -> set[str]:
    seen, new = set(), [y.grad_fn]
    while new:
        node = new.pop()
        if node is not None and node not in seen:
            seen.add(node)
            new += [parent for parent, _ in node.next_functions]
    return {node.name() for node in seen}


def loss(y: Tensor) -> Tensor:
    return (y.double().sin() * torch.arange(1, 1 + y.numel()).view_as(y) / y.numel()).sum()


def agree(operation: Operation, found, expected) -> None:
    for number, (ours, right) in enumerate(zip(found, expected, strict=True)):
        assert ours is not None, number
        scale = right.double().abs().max().clamp(min=1e-3)
        error = ((ours.double() - right.double()).abs().max() / scale).item()
        assert error <= operation.tolerance, (number, error)


def test_every_function_with_a_backward_of_its_own_is_among_the_operations():
    folders = ("kernels", "models", "engine", "data", "checkpoint")
    texts = [path.read_text() for folder in folders for path in (ROOT / folder).rglob("*.py")]
    defined = {
        f"{node.name}Backward"
        for text in texts
        if "Function" in text
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ClassDef)
        and any("Function" in ast.unparse(base) for base in node.bases)
    }
    assert defined == {
        name for operation in OPERATIONS for name in operation.nodes if "Generated" not in name
    }


@every_operation
def test_second_derivatives_reach_what_the_inputs_were_computed_from(operation):
    def outcome(function, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in operation.draw()]
        factors = [torch.ones((), dtype=dtype, requires_grad=True) for _ in leaves]
        inputs = [x * factor for x, factor in zip(leaves, factors, strict=True)]
        y = function(*inputs)
        assert function is operation.formula or nodes_of(y) >= set(operation.nodes)
        first = torch.autograd.grad(loss(y), inputs, create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        second = torch.autograd.grad(penalty, [*factors, *leaves], allow_unused=True)
        return [
            y,
            *first,
            *(0 * f if g is None else g for g, f in zip(second, [*factors, *leaves], strict=True)),
        ]

    agree(operation, outcome(operation.function, operation.dtype), outcome(operation.formula, F64))


@every_operation
def test_an_input_computed_from_another_gets_its_own_part_alone(operation):
    def outcome(function, dtype):
        leaves = [x.to(dtype) for x in operation.draw()]
        factor = torch.ones((), dtype=dtype, requires_grad=True)
        first = leaves[0] * factor
        others = [x + first.mean() for x in leaves[1:]]
        gradients = torch.autograd.grad(loss(function(first, *others)), factor, create_graph=True)
        return [*gradients, *torch.autograd.grad(gradients, factor)]

    agree(operation, outcome(operation.function, operation.dtype), outcome(operation.formula, F64))


@every_operation
@pytest.mark.parametrize("recorded", ["no_grad", "nothing asks", "asked"])
def test_forward_mode_gives_the_tangent(operation, recorded):
    def outcome(function, dtype):
        inputs = [x.to(dtype) for x in operation.draw()]
        with torch.set_grad_enabled(recorded != "no_grad"), forward_ad.dual_level():
            duals = [
                forward_ad.make_dual(x.requires_grad_(recorded == "asked"), x.detach().cos())
                for x in inputs
            ]
            y = forward_ad.unpack_dual(function(*duals))
            return [y.primal.detach(), y.tangent.detach()]

    agree(operation, outcome(operation.function, operation.dtype), outcome(operation.formula, F64))


@every_operation
def test_transforms_of_torch_func_compose(operation):
    def outcome(function, dtype):
        first, *others = [x.to(dtype) for x in operation.draw()]

        def scalar(*inputs):
            return loss(function(*inputs))

        def penalty(x):
            return torch.func.grad(scalar)(x, *others).square().sum()

        product = torch.func.jvp(
            torch.func.grad(lambda x: scalar(x, *others)), (first,), (first.cos(),)
        )
        stacked = torch.stack([first, first.cos()])
        each = torch.func.vmap(torch.func.grad(scalar), (0, *(None for _ in others)))
        return [torch.func.grad(penalty)(first), *product, each(stacked, *others)]

    agree(operation, outcome(operation.function, operation.dtype), outcome(operation.formula, F64))


@every_operation
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_many_gradients_at_once_are_those_one_by_one_or_refused(operation):
    inputs = [x.to(operation.dtype).requires_grad_() for x in operation.draw()]
    y = operation.function(*inputs)
    several = torch.stack([torch.ones_like(y), y.detach().cos()])
    each = [torch.autograd.grad(y, inputs, grad, retain_graph=True) for grad in several]
    try:
        found = torch.autograd.grad(y, inputs, several, is_grads_batched=True)
    except RuntimeError as error:  # PyTorch's own operations lack rules for some
        assert "atching rule not implemented" in str(error)
    else:
        agree(operation, found, [torch.stack(pair) for pair in zip(*each, strict=True)])


def test_sdpa_has_the_tangent_of_the_formula_and_second_derivatives_by_torch_func():
    inputs = OPERATIONS[1].draw()  # with one scale a head

    def outcome(backend):
        function = attention(backend, cosine=True)
        y, tangent = torch.func.jvp(function, tuple(inputs), tuple(x.cos() for x in inputs))

        def penalty(bias):
            of_bias = torch.func.grad(lambda b: loss(function(*inputs[:2], b)))
            return of_bias(bias).square().sum()

        return [y, tangent, torch.func.grad(penalty)(inputs[2])]

    for ours, right in zip(outcome("sdpa"), outcome("reference"), strict=True):
        torch.testing.assert_close(ours, right)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_many_gradients_at_once_pass_the_qk_residual():
    module = GlobalAttention(Geometry(8, 2, (2, 2)), AttentionSpec(("qk_residual",)))
    x = torch.randn(2, 4, 8, requires_grad=True)
    y = module(x)
    several = torch.stack([torch.ones_like(y), y.detach().cos()])
    each = [torch.autograd.grad(y, x, grad, retain_graph=True)[0] for grad in several]
    (found,) = torch.autograd.grad(y, x, several, is_grads_batched=True)
    torch.testing.assert_close(found, torch.stack(each))
