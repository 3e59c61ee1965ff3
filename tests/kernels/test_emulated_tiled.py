"""The tiled CUDA kernels (windows of up to 576 tokens, and float32), run on the CPU by the
emulator, against float64.
"""

import random

import pytest
import torch

from kernels.window_attention.testing import TILED_CASES, Case, Drawn, draw_case
from kernels.window_attention.testing_accuracy import problems
from kernels.window_attention.testing_call import Kernel
from tests.kernels.emulated import build, counters, load
from tests.kernels.tiled_kernels import SOURCES

# bytes of shared memory a block may have: sm_80, sm_86 (sm_89 and sm_120 as well), sm_90
SM_80, SM_86, SM_90 = 166912, 101376, 232448
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(scope="module")
def library():
    return load(build(SOURCES))


def run(library, drawn, schedule=0, multiprocessors=2, shared_bytes=SM_90, **options):
    library.wa_emu_set_seed(schedule)
    library.wa_emu_set_multiprocessors(multiprocessors)
    library.wa_emu_set_shared_bytes(shared_bytes)
    return Kernel(library, "wa_emu").run(drawn, **options)


@pytest.mark.parametrize("case", TILED_CASES, ids=str)
def test_emulated_kernel_errs_no_more_than_pytorch_in_the_same_dtype(library, case):
    drawn = Drawn(case)
    assert problems(run(library, drawn), drawn) == []


@pytest.mark.parametrize("shared_bytes", [SM_86, SM_80, SM_90])
@pytest.mark.parametrize(
    "case",
    [
        Case((24, 24), (1, 1), heads=1, head_dim=64, scale="table", dtype=F16),
        Case(
            (24, 24),
            (1, 1),
            heads=1,
            missing=(3, 2),
            shift=(12, 12),
            post=True,
            cosine=True,
            head_dim=16,
        ),
    ],
    ids=str,
)
def test_keys_are_streamed_where_shared_memory_is_short(library, case, shared_bytes):
    drawn = Drawn(case)
    assert problems(run(library, drawn, shared_bytes=shared_bytes), drawn) == []


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_blocks_may_share_a_window_or_each_take_several(library, dtype):
    drawn = Drawn(
        Case((10, 10), (3, 2), batch=2, shift=(5, 5), scale="table", post=True, dtype=dtype)
    )
    for multiprocessors in (1, 3, 132):
        assert problems(run(library, drawn, multiprocessors=multiprocessors), drawn) == [], (
            multiprocessors
        )


@pytest.mark.parametrize(
    "case",
    [
        Case((9, 9), (3, 2), scale="table", shift=(4, 4)),
        Case((8, 8), (3, 2), dtype=F32, cosine=True),
    ],
    ids=str,
)
def test_results_do_not_depend_on_the_order_in_which_threads_run(library, case):
    drawn = Drawn(case)
    first, *others = (run(library, drawn, schedule) for schedule in range(4))
    for other in others:
        assert all(
            torch.equal(first[name].nan_to_num(7), other[name].nan_to_num(7)) for name in first
        )


def test_gradients_that_nobody_asks_for_are_not_needed(library):
    drawn = Drawn(Case((9, 9), scale="table", post=True))
    whole = run(library, drawn)
    for asked in (("qkv",), ("qkv", "post"), ("qkv", "bias"), ("qkv", "scale")):
        part = run(library, drawn, gradients=asked)
        assert set(part) == {"out", "lse", *asked}
        assert (
            torch.equal(part["out"], whole["out"]) and problems(part, drawn) == []
        )  # sums may be taken in another order


def test_tables_too_large_for_shared_memory_together_are_summed_one_after_another(library):
    drawn = Drawn(Case((24, 24), (1, 1), heads=1, scale="table", post=True, head_dim=64, dtype=F16))
    counters(library)
    together = run(library, drawn, shared_bytes=SM_90)
    few = counters(library)["launches"]
    apart = run(library, drawn, shared_bytes=SM_86)
    assert counters(library)["launches"] > few
    assert problems(together, drawn) == problems(apart, drawn) == []


@pytest.mark.parametrize(
    ("change", "fields", "words"),
    [
        ({"head_dim": 48}, {}, "head dimensions"),
        ({"window": (25, 24)}, {}, "1 to 576 tokens"),
        ({}, {"shift": (12, 0)}, "less than the window"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused_in_words(library, change, fields, words):
    case = Case((12, 12), (1, 1), heads=1).but(**change)
    assert words in Kernel(library, "wa_emu").why_not(case, **fields)


def test_matrix_reads_from_shared_memory_meet_no_bank_twice(library):
    for head_dim in (16, 32, 64):
        counters(library)
        run(library, Drawn(Case((12, 12), (1, 1), heads=1, head_dim=head_dim)))
        counted = counters(library)
        assert counted["wavefronts"] == 4 * counted["ldmatrix"]  # four 8 x 8 matrices each


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_random_shapes_terms_devices_and_schedules(library, seed):
    source = random.Random(seed)
    for _ in range(10):
        drawn = Drawn(draw_case(source))
        setting = {
            "schedule": source.randrange(1000),
            "multiprocessors": source.choice([1, 2, 5, 132]),
            "shared_bytes": source.choice([SM_80, SM_86, SM_90]),
        }
        assert problems(run(library, drawn, **setting), drawn) == [], (str(drawn.case), setting)
