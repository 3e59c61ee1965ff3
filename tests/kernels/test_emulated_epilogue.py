"""The epilogue of the CUDA kernels and the gradient of their log-sum-exp, run by the emulator,
against float64.
"""

import random

import pytest
import torch

from kernels.window_attention.testing import Case, Drawn, by_part, draw_case
from kernels.window_attention.testing_accuracy import exact_lse, problems
from kernels.window_attention.testing_call import Call, Kernel
from kernels.window_attention.testing_epilogue import (
    LONE,
    SMALL_BASES,
    TILED_BASES,
    neutral,
    with_epilogue,
    with_gradient_of_lse,
)
from tests.kernels.emulated import build, few_by_default, load
from tests.kernels.tiled_kernels import SOURCES

F32 = torch.float32
CASES = [
    *SMALL_BASES,
    *TILED_BASES,
]  # those of up to 64 tokens in 16 bits have kernels of their own
FEW = [SMALL_BASES[4], TILED_BASES[6]]


@pytest.fixture(scope="module")
def library():
    return load(build(SOURCES))


def run(library, drawn, schedule=0, multiprocessors=2, shared_bytes=232448, **options):
    library.wa_emu_set_seed(schedule)
    library.wa_emu_set_multiprocessors(multiprocessors)
    library.wa_emu_set_shared_bytes(shared_bytes)
    return Kernel(library, "wa_emu").run(drawn, **options)


@pytest.mark.parametrize("case", few_by_default(with_gradient_of_lse(CASES)))
def test_gradient_of_the_log_sum_exp_reaches_the_logits(library, case):
    drawn = Drawn(case)
    assert problems(run(library, drawn), drawn) == []


@pytest.mark.parametrize("case", few_by_default(with_epilogue(CASES)))
def test_epilogue_errs_no_more_than_pytorch_in_the_same_dtype(library, case):
    drawn = Drawn(case)
    assert problems(run(library, drawn), drawn) == []


@pytest.mark.parametrize("kind", ["affine", "exclusive"])
@pytest.mark.parametrize(
    "case", [pytest.param(c, id=str(c), marks=[] if c in FEW else pytest.mark.slow) for c in CASES]
)
def test_a_neutral_epilogue_gives_the_bits_of_none(library, case, kind):
    plain, with_neutral = (run(library, drawn) for drawn in neutral(case, kind))
    for name, value in plain.items():
        found = with_neutral[name]
        if name in ("out", "lse") or case in SMALL_BASES:
            assert torch.equal(found.nan_to_num(7), value.nan_to_num(7)), name
        else:  # sums over queries may be taken in another order
            error, size = (found - value).abs().max().item(), value.abs().max().item()
            assert error <= 32 * torch.finfo(value.dtype).eps * size, name


@pytest.mark.parametrize("case", FEW, ids=str)
def test_own_value_alone_passes_through_and_no_gradient_reaches_q_and_k(library, case):
    drawn = Drawn(case.but(epilogue="affine"))
    drawn.alpha, drawn.beta = torch.ones(case.heads), torch.zeros(case.heads)
    found = by_part(run(library, drawn), case)
    assert torch.equal(found["out"], drawn.qkv.chunk(3, -1)[2])
    assert torch.equal(found["v"].flatten(-2), drawn.grad_out)
    assert not found["q"].any() and not found["k"].any() and not found["bias"].any()
    assert problems(run(library, drawn), drawn) == []  # the gradient of beta is not 0


@pytest.mark.parametrize("case", [*FEW, *LONE], ids=str)
def test_what_is_left_of_the_exclusive_result_is_orthogonal_to_the_value(library, case):
    drawn = Drawn(case.but(epilogue="exclusive", dtype=F32))
    drawn.exclusion = torch.ones(case.heads)
    found = run(library, drawn)
    v = drawn.qkv.chunk(3, -1)[2].unflatten(-1, (case.heads, -1))
    out = found["out"].unflatten(-1, (case.heads, -1))
    assert (out * v).sum(-1).abs().max() < 1e-4
    if case in LONE:  # the corner, which sees itself alone
        at = 0 if case.shift[0] else -1
        assert out[:, at, at].abs().max() < 1e-5


@pytest.mark.parametrize("case", FEW, ids=str)
def test_ratio_is_kept_for_tokens_and_not_written_at_padding(library, case):
    drawn = Drawn(case.but(epilogue="exclusive"))
    call = Call(drawn, gradients=())
    Kernel(library, "wa_emu").launch("forward", call)
    call.check_margins()
    padding = exact_lse(drawn).isnan()
    along = call.buffers["along"].tensor
    assert along[padding].isnan().all() and along[~padding].isfinite().all()
    inference = Call(drawn, gradients=(), lse=False)
    Kernel(library, "wa_emu").launch("forward", inference)
    assert torch.equal(inference.results()["out"], call.results()["out"])


@pytest.mark.parametrize("case", FEW, ids=str)
@pytest.mark.parametrize("kind", ["affine", "exclusive"])
def test_epilogue_gives_the_same_bits_under_every_schedule(library, case, kind):
    drawn = Drawn(case.but(epilogue=kind, lse=True))
    first, *others = (run(library, drawn, schedule) for schedule in range(3))
    for other in others:
        assert all(
            torch.equal(first[name].nan_to_num(7), other[name].nan_to_num(7)) for name in first
        )


@pytest.mark.parametrize(
    ("kind", "asked"),
    [("affine", ()), ("affine", ("alpha",)), ("affine", ("beta",)), ("exclusive", ())],
)
def test_gradients_of_the_epilogue_that_nobody_asks_for_are_not_needed(library, kind, asked):
    drawn = Drawn(TILED_BASES[6].but(windows=(1, 1), epilogue=kind))
    part = run(library, drawn, gradients=(*asked, "qkv"))
    assert set(part) == {"out", "lse", *asked, "qkv"} and problems(part, drawn) == []


def test_half_an_epilogue_is_refused_in_words(library):
    kernel = Kernel(library, "wa_emu")
    words = "alpha and beta, or exclusion"
    assert words in kernel.why_not(Case(epilogue="affine"), beta=None)
    assert words in kernel.why_not(Case(epilogue="exclusive"), beta=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_random_shapes_with_an_epilogue_under_random_devices_and_schedules(library, seed):
    source = random.Random(1000 + seed)
    for _ in range(10):
        case = draw_case(source).but(
            epilogue=source.choice(["affine", "exclusive"]),
            lse=source.random() < 0.5,
            tiny_values=source.random() < 0.3,
        )
        drawn = Drawn(case)
        setting = {
            "schedule": source.randrange(1000),
            "multiprocessors": source.choice([1, 2, 5, 132]),
            "shared_bytes": source.choice([101376, 166912, 232448]),
        }
        assert problems(run(library, drawn, **setting), drawn) == [], (str(case), setting)
