"""The tiled CUDA kernels (windows of up to 576 tokens, and float32), run on the CPU by the
emulator, against float64.
"""

import random

import pytest
import torch

from tests.kernels.cases import Case, Drawn
from tests.kernels.emulated import CSRC, build, counters, load
from tests.kernels.replay import Kernel, problems

# csrc/cuda/launch.cu and all it calls
SOURCES = [*sorted(f"cuda/{path.name}" for path in CSRC.glob("cuda/*.cu")), "emulator/emulator.cpp"]
# bytes of shared memory a block may have: sm_80, sm_86 (sm_89 and sm_120 as well), sm_90
SM_80, SM_86, SM_90 = 166912, 101376, 232448
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

CASES = [
    Case((8, 12), heads=3, weight="table"),
    Case((12, 12), (1, 2), missing=(0, 5), shift=(6, 6), weight="table", dtype=F16),
    Case((12, 12), (2, 1), shift=(6, 0), cosine=True, batch=2),
    Case((9, 11), missing=(3, 4), shift=(4, 5), weight="table", post=True, dropout=0.2),
    Case((9, 11), (1, 1), missing=(2, 0), bias=False, dtype=F16, zero_rows=True, cosine=True),
    Case((16, 16), (1, 1), heads=1, weight="table", head_dim=64, dtype=F16),
    Case((16, 16), (1, 2), heads=1, shift=(8, 8), head_dim=16, scale=3.0),
    Case((5, 24), (1, 1), heads=2, post=True, cosine=True, head_dim=64),
    Case((24, 24), (1, 1), heads=1, weight="table"),
    Case((7, 7), missing=(0, 2), shift=(3, 3), weight="table", dtype=F32),
    Case((8, 8), cosine=True, shift=(4, 4), dropout=0.1, dtype=F32, head_dim=16),
    Case((12, 12), (1, 1), weight="table", post=True, dtype=F32, ties=True),
    Case((16, 16), (1, 1), heads=1, dtype=F32, head_dim=64),
    Case((1, 70), (2, 1), heads=1, weight="table", dtype=F32),
]


@pytest.fixture(scope="module")
def library():
    return load(build(SOURCES))


def run(library, drawn, schedule=0, multiprocessors=2, shared_bytes=SM_90, **options):
    library.wa_emu_set_seed(schedule)
    library.wa_emu_set_multiprocessors(multiprocessors)
    library.wa_emu_set_shared_bytes(shared_bytes)
    return Kernel(library, "wa_emu").run(drawn, **options)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_emulated_kernel_errs_no_more_than_pytorch_in_the_same_dtype(library, case):
    drawn = Drawn(case)
    assert problems(run(library, drawn), drawn) == []


@pytest.mark.parametrize("shared_bytes", [SM_86, SM_80, SM_90])
@pytest.mark.parametrize(
    "case",
    [
        Case((24, 24), (1, 1), heads=1, head_dim=64, weight="table", dtype=F16),
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
        Case((10, 10), (3, 2), batch=2, shift=(5, 5), weight="table", post=True, dtype=dtype)
    )
    for multiprocessors in (1, 3, 132):
        assert problems(run(library, drawn, multiprocessors=multiprocessors), drawn) == [], (
            multiprocessors
        )


@pytest.mark.parametrize(
    "case",
    [
        Case((9, 9), (3, 2), weight="table", shift=(4, 4)),
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
    drawn = Drawn(Case((9, 9), weight="table", post=True))
    whole = run(library, drawn)
    for asked in (("qkv",), ("qkv", "post"), ("qkv", "bias"), ("qkv", "weight")):
        part = run(library, drawn, gradients=asked)
        assert set(part) == {"out", "lse", *asked}
        assert (
            torch.equal(part["out"], whole["out"]) and problems(part, drawn) == []
        )  # sums may be taken in another order


def test_tables_too_large_for_shared_memory_together_are_summed_one_after_another(library):
    drawn = Drawn(
        Case((24, 24), (1, 1), heads=1, weight="table", post=True, head_dim=64, dtype=F16)
    )
    counters(library)
    together = run(library, drawn, shared_bytes=SM_90)
    few = counters(library)["launches"]
    apart = run(library, drawn, shared_bytes=SM_86)
    assert counters(library)["launches"] > few
    assert problems(together, drawn) == problems(apart, drawn) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"head_dim": 48}, "head dimensions"),
        ({"window": (25, 24)}, "1 to 576 tokens"),
        ({"shift": (12, 0)}, "less than the window"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused_in_words(library, change, words):
    assert words in Kernel(library, "wa_emu").why_not(Case((12, 12), (1, 1), heads=1).but(**change))


def test_matrix_reads_from_shared_memory_meet_no_bank_twice(library):
    for head_dim in (16, 32, 64):
        counters(library)
        run(library, Drawn(Case((12, 12), (1, 1), heads=1, head_dim=head_dim)))
        counted = counters(library)
        assert counted["wavefronts"] == 4 * counted["ldmatrix"]  # four 8 x 8 matrices each


def draw_case(source: random.Random) -> Case:
    """A shape of no particular regularity."""
    window = source.choice(
        [
            (3, 3),
            (7, 7),
            (8, 8),
            (8, 12),
            (9, 11),
            (10, 13),
            (12, 12),
            (5, 24),
            (1, 70),
            (16, 16),
            (20, 20),
            (24, 24),
        ]
    )
    windows = (
        (1, 1) if window[0] * window[1] > 300 else source.choice([(1, 1), (1, 2), (2, 2), (3, 1)])
    )
    return Case(
        window,
        windows,
        missing=tuple(min(side - 1, source.choice([0, 0, 1, side - 1])) for side in window),
        shift=tuple(source.choice([0, side // 2, side - 1]) for side in window),
        batch=source.choice([1, 2]),
        heads=source.choice([1, 2, 3]),
        head_dim=source.choice([16, 32, 64]),
        dtype=source.choice([F32, F16, BF16]),
        weight=source.choice(["one", "table"]),
        bias=source.random() < 0.7,
        post=source.random() < 0.3,
        cosine=source.random() < 0.4,
        dropout=source.choice([0.0, 0.0, 0.2]),
        scale=source.choice([0.5, 1.0, 2.0]),
        zero_rows=source.random() < 0.2,
    )


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
