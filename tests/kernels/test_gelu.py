"""The compiled GELU, forward and backward, against PyTorch's and float64: every instruction set,
dtype and shape; as PyTorch sees it.
"""

import ctypes
import math

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from kernels.library import loader
from kernels.linear.gelu import compiled, gelu_backward_into, gelu_into
from tests.kernels.cpu_kernels import INSTRUCTIONS, available

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Dtypes of what is kept and of the activation.
PAIRS = [(F32, F32), (BF16, F32), (F16, F32), (BF16, BF16), (F16, F16)]
SHAPES = [(1, 1), (3, 5), (70, 16), (129, 50), (200, 384)]
CODES = {F32: 0, F16: 1, BF16: 2}


class Args(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("before", "bias", "kept", "act", "grad", "grad_bias", "partial")
        ),
        *((name, ctypes.c_int64) for name in ("rows", "width")),
        *((name, ctypes.c_int32) for name in ("kept_dtype", "act_dtype", "threads")),
    ]


def call(library, backward: int, threads: int = 2, **tensors) -> None:
    """wa_cpu_gelu of a library without PyTorch's binding."""
    act, kept = tensors["act"], tensors["before"] if backward else tensors["kept"]
    args = Args(
        *(
            None if tensors.get(name) is None else tensors[name].data_ptr()
            for name, _ in Args._fields_[:7]
        ),
        *act.shape,
        CODES[act.dtype if kept is None else kept.dtype],
        CODES[act.dtype],
        threads,
    )
    assert library.wa_cpu_gelu(ctypes.byref(args), backward) == 0


def margins(shape, dtype):
    """NaN within an area of 3s, and that area."""
    area = torch.full((shape[0] * shape[1] + 128,), 3.0, dtype=dtype)
    inner = area[64:-64].view(shape)
    return inner.fill_(float("nan")), area


def untouched(area) -> bool:
    return bool((area[:64] == 3).all() and (area[-64:] == 3).all())


def draw(shape, act_dtype, biased=True):
    generator = torch.Generator().manual_seed(2)
    before = (3 * torch.randn(shape, generator=generator)).to(act_dtype)
    return (
        before,
        torch.randn(shape[1], generator=generator) if biased else None,
        torch.randn(shape, generator=generator).to(act_dtype),
    )


def exact(kept, bias, grad):
    """In float64: y, and the gradients of x and of the bias."""
    x = kept.double() + (0 if bias is None else bias.double())
    phi = torch.special.erfc(-x / math.sqrt(2)) / 2  # float64's GELU and ndtr have lost it at -8
    gradient = grad.double() * (phi + x * (-x * x / 2).exp() / math.sqrt(2 * math.pi))
    return x * phi, gradient, gradient.sum(0)


def pytorch(kept, bias, grad, dtype):
    """As above by PyTorch's operations in `dtype`, which add the bias before."""
    x = (kept.to(dtype) + (0 if bias is None else bias)).to(dtype)
    gradient = torch.ops.aten.gelu_backward(grad, x)
    return F.gelu(x), gradient, gradient.sum(0)


def errs_no_more(found, theirs, right) -> bool:
    """At most twice PyTorch's error, in the norm and in the worst element."""
    rounding = torch.finfo(theirs.dtype).eps
    own, other = (found.double() - right).abs(), (theirs.double() - right).abs()
    return bool(
        own.norm() <= 2 * other.norm() + rounding * right.norm()
        and own.max() <= 2 * other.max() + rounding * right.abs().max()
    )


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kept_dtype, act_dtype", PAIRS, ids=str)
def test_every_instruction_set_errs_no_more_than_pytorch(
    kept_dtype, act_dtype, shape, biased, instructions
):
    library = available(instructions).library
    before, bias, grad = draw(shape, act_dtype, biased)
    act, act_area = margins(shape, act_dtype)
    kept, kept_area = margins(shape, kept_dtype)
    call(library, 0, before=before, bias=bias, kept=kept, act=act)
    assert torch.equal(kept, before.to(kept_dtype))
    assert errs_no_more(
        act, pytorch(before, bias, grad, act_dtype)[0], exact(before, bias, grad)[0]
    )

    again, again_area = margins(shape, act_dtype)
    gradient, gradient_area = margins(shape, act_dtype)
    gradient.copy_(grad)
    db, db_area = margins((1, shape[1]), F32)
    call(
        library,
        1,
        before=kept,
        bias=bias,
        act=again,
        grad=gradient,
        grad_bias=db,
        partial=torch.full((64, shape[1]), float("nan")),
    )
    for own, other, truth in zip(
        (again, gradient, db[0]),
        pytorch(kept, bias, grad, act_dtype),
        exact(kept, bias, grad),
        strict=True,
    ):
        assert errs_no_more(own, other, truth)
    assert all(map(untouched, (act_area, kept_area, again_area, gradient_area, db_area)))


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_subnormal_float16_is_read_where_the_process_flushes_subnormals(instructions):
    """main.py sets that on CPUs; such numbers are normal in float32."""
    library = available(instructions).library
    x = (torch.arange(1, 1024) * 2.0**-24).half()[None].repeat(2, 1)
    x[1].neg_()
    kept, act = torch.empty_like(x), torch.empty(x.shape)
    torch.set_flush_denormal(True)
    call(library, 0, threads=1, before=x.float(), kept=kept, act=act)
    again, sums = torch.empty_like(act), torch.empty(1, 1023)
    partial = torch.empty(64, 1023)
    call(
        library,
        1,
        threads=1,
        before=kept,
        act=again,
        grad=torch.ones_like(act),
        grad_bias=sums,
        partial=partial,
    )
    assert torch.equal(kept, x)
    for own in (act, again):
        torch.testing.assert_close(own.double(), exact(x, None, x)[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_tails_and_numbers_that_are_none_come_out_as_in_pytorch(instructions):
    library = available(instructions).library
    infinite, none = float("inf"), float("nan")
    # fmt: off
    x = torch.tensor([
        0.0, -0.0, 1e-30, -1e-30, 1e-40, 5.0, -5.0, 9.0, -9.0, 11.7, -11.7, 11.8, -11.8, 14.0,
        -14.0, 30.0, -30.0, 1e4, -1e4, 1e30, -1e30, 3e38, -3e38, infinite, none,
    ])[None]
    # fmt: on
    act, again, grad = torch.empty_like(x), torch.empty_like(x), torch.ones_like(x)
    sums = torch.empty(1, x.shape[1])
    call(library, 0, before=x, kept=None, act=act)
    call(
        library,
        1,
        before=x,
        act=again,
        grad=grad,
        grad_bias=sums,
        partial=torch.empty(1, x.shape[1]),
    )
    right, slope, _ = exact(x, None, torch.ones_like(x))
    assert act[0, -1].isnan() and again[0, -1].isnan() and grad[0, -1].isnan()
    for own in (act, again):
        torch.testing.assert_close(own[0, :-1].double(), right[0, :-1], rtol=2e-5, atol=1e-29)
    torch.testing.assert_close(
        grad[0, :-2].double(), slope[0, :-2], rtol=2e-5, atol=1e-29
    )  # there is no slope at infinity


def test_far_left_the_value_keeps_its_relative_precision():
    """Φ(x) itself is formed there, not 1 - Φ(-x), which PyTorch's float32 has lost at -5."""
    if not compiled(F32):
        pytest.skip(f"the CPU kernel is not here: {loader.missing('cpu')}")
    x = torch.linspace(-9, -3, 5000)[None]
    right = exact(x, None, x)[0]
    own, theirs = (
        ((y.double() - right) / right).abs().max()
        for y in (gelu_into(torch.empty_like(x), x), F.gelu(x))
    )
    assert own < 2e-5 < theirs


@pytest.fixture
def kernel():
    if not compiled(F32):
        pytest.skip(f"the CPU kernel is not here: {loader.missing('cpu')}")


@pytest.mark.parametrize("kept_dtype, act_dtype", PAIRS, ids=str)
def test_the_same_bits_with_any_number_of_threads_and_in_place(kept_dtype, act_dtype, kernel):
    before, bias, grad = draw((700, 200), act_dtype)
    outcomes, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            kept, act = before.to(kept_dtype), before.clone()
            gelu_into(act, act, bias)
            gradient = grad.clone()
            again = torch.empty_like(act)
            outcomes.append((act, again, gradient, gelu_backward_into(again, gradient, kept, bias)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(outcomes[0][0], gelu_into(torch.empty_like(before), before, bias))
    for other in outcomes[1:]:
        assert all(map(torch.equal, outcomes[0], other))


def test_what_does_not_fit_is_an_error(kernel):
    x, bias = torch.randn(4, 6), torch.randn(6)
    for act, before, given, kept in [
        (torch.empty(4, 5), x, bias, None),
        (torch.empty(4, 6, dtype=BF16), x, bias, None),
        (torch.empty(6, 4).t(), x, bias, None),
        (torch.empty(4, 6), x.double(), bias, None),
        (torch.empty(4, 6), x, bias[:5], None),
        (torch.empty(4, 6), x, bias.double(), None),
        (torch.empty(4, 6), x, bias, torch.empty(4, 6, dtype=torch.float64)),
        (torch.empty(4, 6), x, bias, torch.empty(3, 6)),
        (torch.empty(4, 6, dtype=BF16), x.bfloat16(), bias, torch.empty(4, 6)),
        (torch.empty(4, 6), x[0], bias, None),
    ]:
        with pytest.raises(RuntimeError, match="gelu"):
            gelu_into(act, before, given, kept)
    with pytest.raises(RuntimeError, match="gelu"):
        gelu_backward_into(torch.empty(4, 6), torch.empty(4, 5), x, bias)
    assert (
        gelu_backward_into(torch.empty(0, 6), torch.empty(0, 6), torch.empty(0, 6), bias)
        .eq(0)
        .all()
    )


@pytest.mark.filterwarnings("ignore")
def test_pytorch_finds_the_schemas_and_the_shapes_for_tracing_right(kernel):
    before, bias, grad = draw((20, 12), F32)
    tests = ("test_schema", "test_faketensor")
    opcheck(
        torch.ops.idsw.gelu_forward,
        (before, bias, before.bfloat16(), torch.empty_like(before)),
        test_utils=tests,
    )
    opcheck(
        torch.ops.idsw.gelu_forward,
        (before, None, None, torch.empty_like(before)),
        test_utils=tests,
    )
    opcheck(
        torch.ops.idsw.gelu_backward,
        (before, bias, torch.empty_like(before), grad),
        test_utils=tests,
    )
