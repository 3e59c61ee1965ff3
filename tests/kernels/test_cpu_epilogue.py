"""The epilogues and the gradient of the log-sum-exp in the CPU kernel of every instruction set, by
the accuracy rule of testing_accuracy.problems.
"""

import itertools

import pytest
import torch

from kernels.window_attention.testing import Case, Drawn
from kernels.window_attention.testing_accuracy import problems
from kernels.window_attention.testing_call import Call
from tests.kernels.cpu_kernels import INSTRUCTIONS, available, cpu_kernel

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = [F32, F16, BF16]
ENDINGS = [
    {"epilogue": "affine", "lse": True},
    {"epilogue": "exclusive", "lse": True},
    {"epilogue": "exclusive", "tiny_values": True},
    {"lse": True},
]
SMALL = Case(windows=(1, 2), missing=(0, 2), shift=(3, 3), head_dim=16)
SHAPES = [  # one to four vectors in a row of logits, and more; factors; odd head dimensions
    Case(shift=(3, 3), scale="table"),
    Case(missing=(2, 1), shift=(3, 2), scale="table", cosine=True),
    Case(post=True, dropout=0.2, batch=2),
    Case((5, 5), post=True, bias=False, heads=3, head_dim=24, missing=(2, 1)),
    Case((12, 12), (1, 2), shift=(6, 4), cosine=True, dropout=0.1),
    Case((1, 4), shift=(0, 1)),
    Case((4, 4), head_dim=8, scale="table", post=True),
    Case((5, 9), head_dim=64, missing=(1, 1)),
    Case((24, 24), (1, 1), heads=1),
]


def cases(shapes) -> list[Case]:
    """Every shape with every ending, in every dtype."""
    product = itertools.product(shapes, DTYPES, ENDINGS)
    return [shape.but(dtype=dtype, **ending) for shape, dtype, ending in product]


FACTORS_AFTER = [SHAPES[6].but(dtype=F32, **ending) for ending in ENDINGS[:2]]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether they are equal bit for bit, NaN at padding included."""
    return torch.equal(a.nan_to_num(7), b.nan_to_num(7))


@pytest.mark.parametrize("case", [*cases([SMALL]), *FACTORS_AFTER], ids=str)
def test_an_ending_errs_no_more_than_pytorch_in_the_same_dtype(case):
    drawn = Drawn(case)
    assert not problems(cpu_kernel().run(drawn), drawn)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(SHAPES), ids=str)
def test_an_ending_errs_no_more_than_pytorch_in_every_shape(case):
    drawn = Drawn(case)
    assert not problems(cpu_kernel().run(drawn), drawn)


@pytest.mark.slow
@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("case", cases([SMALL, SHAPES[3], SHAPES[6]]), ids=str)
def test_an_ending_errs_no_more_than_pytorch_with_every_instruction_set(instructions, case):
    drawn = Drawn(case)
    assert not problems(available(instructions).run(drawn), drawn)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epilogue", ["affine", "exclusive"])
def test_neutral_factors_leave_every_bit(epilogue, dtype):
    plain = Drawn(SMALL.but(dtype=dtype, lse=True))
    ended = Drawn(SMALL.but(dtype=dtype, lse=True, epilogue=epilogue))
    ended.grad_lse = plain.grad_lse  # drawn after the factors
    for name, value in {"alpha": 0.0, "beta": 1.0, "exclusion": 0.0}.items():
        if getattr(ended, name) is not None:
            getattr(ended, name).fill_(value)
    before, after = cpu_kernel().run(plain), cpu_kernel().run(ended)
    assert all(same(before[name], after[name]) for name in before)


def test_gradients_of_factors_that_nobody_asked_for_change_nothing():
    drawn = Drawn(SMALL.but(epilogue="affine"))
    everything = cpu_kernel().run(drawn)
    for name in ("alpha", "beta"):
        some = cpu_kernel().run(drawn, ("qkv", name))
        assert set(some) == {"out", "qkv", name, "lse"}
        assert all(
            torch.equal(some[key].nan_to_num(), everything[key].nan_to_num()) for key in some
        )


@pytest.mark.parametrize("epilogue", ["affine", "exclusive"])
def test_an_epilogue_gives_the_same_bits_for_any_number_of_threads(epilogue):
    drawn = Drawn(SMALL.but(batch=5, epilogue=epilogue, lse=True))
    results = []
    for threads in (1, 3):
        call = Call(drawn)
        call.args.threads = threads
        cpu_kernel().launch("forward", call)
        cpu_kernel().launch("backward", call)
        results.append(call.results())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_factors_that_do_not_go_together_are_refused_with_a_reason():
    kernel, affine = cpu_kernel(), SMALL.but(epilogue="affine")
    assert "come together" in kernel.why_not(affine, beta=None)
    assert "not both" in kernel.why_not(affine, exclusion=1)
