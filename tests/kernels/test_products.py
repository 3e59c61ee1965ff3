"""x Wᵀ + b by every way there is: in float32 for 16-bit results, with the weight prepared, in
chunks.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from kernels.linear import evaluation, precision, prepared, products, run_linear
from kernels.linear import mlp as fused
from models.layers.mlp import Mlp


class Linear(torch.nn.Module):
    """A linear layer as the models run it."""

    def __init__(self, *sizes, **options):
        super().__init__()
        self.layer = torch.nn.Linear(*sizes, **options)

    def forward(self, x):
        return run_linear(self.layer, x)


BF16, F16 = torch.bfloat16, torch.float16
both_ways = pytest.mark.parametrize("widened", [True, False])


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(precision, "CHUNK_BYTES", 1)  # the least number of rows, 64
    monkeypatch.setattr(fused, "WHOLE_BYTES", 0)
    monkeypatch.setattr(fused, "PLAIN_BYTES", {True: 0, False: 0})


def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


def outcome(module, x, dtype, weight):
    """Result and gradients of x and the parameters, under autocast to `dtype`."""
    leaves = [x, *module.parameters()]
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        y = module(x)
    return [y, *torch.autograd.grad((y.to(weight.dtype) * weight).sum(), leaves)]


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(
    "make", [lambda: Linear(24, 40), lambda: Linear(24, 40, bias=False), lambda: Mlp(24, 48)]
)
@pytest.mark.parametrize("tokens", [3, 500])
def test_a_16_bit_product_in_float32_errs_no_more_than_pytorch_s_own_in_values_and_gradients(
    dtype, make, tokens, monkeypatch
):
    torch.manual_seed(0)
    module, x = make(), torch.randn(2, tokens, 24, requires_grad=True)
    monkeypatch.setattr(precision, "WIDENED", frozenset([dtype]))
    with torch.autocast("cpu", dtype):
        weight = torch.randn(module(x).shape)
    ours = outcome(module, x, dtype, weight)
    monkeypatch.setattr(precision, "WIDENED", frozenset())
    monkeypatch.setattr(fused, "PLAIN_BYTES", {True: 1 << 40, False: 1 << 40})  # the plain layers
    native = outcome(module, x, dtype, weight)
    exact = outcome(module.double(), x.detach().double().requires_grad_(), None, weight.double())
    for own, theirs, right in zip(ours, native, exact, strict=True):
        assert own.dtype == theirs.dtype
        assert error(own, right) <= 1.1 * error(theirs, right) + 1e-6
    assert ours[0].dtype == dtype


def test_a_widened_product_keeps_its_input_in_16_bits_for_the_backward(monkeypatch):
    monkeypatch.setattr(precision, "WIDENED", frozenset([BF16]))
    layer, mlp, kept = Linear(16, 16), Mlp(16, 64), []
    x = torch.randn(300, 16, dtype=BF16, requires_grad=True)
    with (
        torch.autocast("cpu", BF16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        layer(x)
        mlp(x)
    assert all(tensor.dtype == BF16 for tensor in kept if len(tensor) == 300)
    assert sum(tensor.numel() for tensor in kept if len(tensor) == 300) == 300 * (16 + 16 + 64)


@both_ways
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float64])
@pytest.mark.parametrize(
    "shape", [(1, 24), (7, 24), (2, 5, 5, 24), (3, 200, 24), (0, 24), (2, 0, 24)]
)
def test_in_evaluation_a_layer_and_an_mlp_give_what_they_give_in_training(
    dtype, shape, widened, monkeypatch
):
    monkeypatch.setattr(precision, "WIDENED", frozenset([BF16]) if widened else frozenset())
    torch.manual_seed(1)
    for module in (Linear(24, 40), Linear(24, 40, bias=False), Mlp(24, 96)):
        x = torch.randn(shape)
        if dtype == torch.float64:
            module, x = module.double(), x.double()
        with torch.autocast("cpu", BF16, enabled=dtype == BF16):
            recorded = module(x).detach()
            for inference in (torch.no_grad, torch.inference_mode):
                with evaluation(module), inference():
                    kept = module(x)
                    assert kept.dtype == dtype and kept.shape == recorded.shape
                    tolerance = {torch.float32: 1e-5, BF16: 2e-2, torch.float64: 1e-12}[dtype]
                    torch.testing.assert_close(kept, recorded, rtol=tolerance, atol=tolerance)
                    torch.testing.assert_close(
                        module(x.mT.contiguous().mT), kept, rtol=tolerance, atol=tolerance
                    )


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
def test_the_weight_is_laid_out_once_with_the_gelu_in_the_product(monkeypatch):
    calls = []
    mlp, x = Mlp(24, 96), torch.randn(64, 24)
    original = torch.ops.mkldnn._reorder_linear_weight
    monkeypatch.setattr(
        prepared,
        "_MKLDNN",
        type(
            "",
            (),
            {
                "_reorder_linear_weight": staticmethod(
                    lambda w: calls.append("laid out") or original(w)
                ),
                "_linear_pointwise": staticmethod(
                    lambda *a: calls.append(a[3]) or torch.ops.mkldnn._linear_pointwise(*a)
                ),
                "_is_mkldnn_bf16_supported": staticmethod(lambda: False),
            },
        ),
    )
    monkeypatch.setattr(fused, "WHOLE_BYTES", 1 << 40)
    with evaluation(mlp), torch.no_grad():
        mlp(x), mlp(x)
    assert calls == ["laid out", "laid out", "gelu", "none", "gelu", "none"]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("frozen", [(), ("x",), ("weight",), ("bias",), ("x", "weight")], ids=str)
def test_a_narrow_float32_product_in_training_gives_pytorch_s_values_and_two_derivatives(
    frozen,
):
    torch.manual_seed(0)
    tensors = {"x": torch.randn(3, 50, 24), "weight": torch.randn(40, 24), "bias": torch.randn(40)}
    leaves = [tensor.requires_grad_() for name, tensor in tensors.items() if name not in frozen]
    mix = torch.randn(3, 50, 40)
    outcomes = []
    for product in (products.linear, F.linear):
        y = product(*tensors.values())
        first = torch.autograd.grad((y.sin() * mix).sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        outcomes.append([y, *first, *second])
    product = products.linear(*tensors.values())
    assert product.grad_fn.next_functions[0][0].name() == "_NarrowBackward"  # behind a view
    (product.add_(1) * mix).sum().backward()  # a product may be changed in place
    assert all(
        error(tensors[name].grad, plain.double()) < 1e-6
        for name, plain in zip(
            [name for name in tensors if name not in frozen],
            torch.autograd.grad((F.linear(*tensors.values()) * mix).sum(), leaves),
            strict=True,
        )
    )
    for ours, theirs in zip(*outcomes, strict=True):
        assert error(ours, theirs.double()) < 1e-6


def test_only_float32_products_with_few_columns_in_and_a_bias_are_narrow():
    def graph(layer, x, **kind):
        with torch.autocast("cpu", BF16, enabled="autocast" in kind):
            grad_fn = layer(x.requires_grad_()).grad_fn
            return grad_fn.name() + "".join(str(f and f.name()) for f, _ in grad_fn.next_functions)

    assert all(
        "Narrow" not in name
        for name in (
            graph(Linear(products.NARROW + 8, 8), torch.randn(4, products.NARROW + 8)),
            graph(Linear(8, 8, bias=False), torch.randn(4, 8)),
            graph(Linear(8, 8).double(), torch.randn(4, 8).double()),
            graph(Linear(8, 8), torch.randn(4, 8), autocast=True),
        )
    )
    layer, x = Linear(8, 32), torch.randn(10, 8, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 10 * 8 * 32


def test_a_flop_counter_and_torch_func_see_ordinary_products_in_evaluation():
    mlp, x = Mlp(8, 32), torch.randn(10, 8)
    with evaluation(mlp), torch.no_grad():
        mlp(x)
        counter = FlopCounterMode(display=False)
        with counter:
            mlp(x)
        by_image = torch.func.vmap(mlp)(x.view(5, 2, 8))
        torch.testing.assert_close(by_image.view(10, 8), mlp(x), rtol=1e-5, atol=1e-5)
        twin = {name: value * 2 for name, value in mlp.state_dict().items()}
        doubled = torch.func.functional_call(mlp, twin, x)
    assert counter.get_total_flops() == 2 * 2 * 10 * 8 * 32
    plain = F.linear(
        F.gelu(F.linear(x, twin["fc1.weight"], twin["fc1.bias"])),
        twin["fc2.weight"],
        twin["fc2.bias"],
    )
    torch.testing.assert_close(doubled, plain, rtol=1e-5, atol=1e-5)


@both_ways
def test_a_compiled_layer_gives_the_eager_result_and_gradients(widened, monkeypatch):
    monkeypatch.setattr(precision, "WIDENED", frozenset([BF16]) if widened else frozenset())
    layer = Mlp(16, 32)
    x = torch.randn(100, 16, requires_grad=True)
    weight = torch.randn(100, 16)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for own, theirs in zip(
        outcome(compiled, x, BF16, weight), outcome(layer, x, BF16, weight), strict=True
    ):
        torch.testing.assert_close(own, theirs, rtol=2e-2, atol=2e-2 * theirs.abs().max().item())


def test_what_is_not_computed_in_its_own_dtype_is_said(monkeypatch):
    monkeypatch.setattr(precision, "WIDENED", frozenset([BF16]))
    assert "no bfloat16 arithmetic" in precision.describe_products(BF16, "cpu")
    assert (
        precision.describe_products(BF16, "cuda") is None
        and precision.describe_products(torch.float32, "cpu") is None
    )


@both_ways
def test_results_may_be_changed_in_place(widened, monkeypatch):
    monkeypatch.setattr(precision, "WIDENED", frozenset([BF16]) if widened else frozenset())
    for layer in (Linear(16, 16), Mlp(16, 32)):
        x = torch.randn(2, 50, 16, requires_grad=True)
        with torch.autocast("cpu", BF16):
            plain, changed = layer(x), layer(x)
        torch.testing.assert_close(
            torch.autograd.grad(changed.mul_(2).sum(), x)[0],
            2 * torch.autograd.grad(plain.sum(), x)[0],
        )


@both_ways
def test_frozen_parts_ask_for_nothing(widened, monkeypatch):
    monkeypatch.setattr(precision, "WIDENED", frozenset([BF16]) if widened else frozenset())
    layer, x = Linear(16, 8), torch.randn(100, 16, requires_grad=True)
    layer.requires_grad_(False)
    with torch.autocast("cpu", BF16):
        layer(x).sum().backward()
    assert x.grad is not None and layer.layer.weight.grad is None
    layer.layer.weight.requires_grad_(True)
    with torch.autocast("cpu", BF16):
        layer(x.detach()).sum().backward()
    torch.testing.assert_close(
        layer.layer.weight.grad, x.detach().sum(0).expand(8, 16), rtol=2e-2, atol=0.1
    )
