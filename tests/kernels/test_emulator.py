"""The emulator itself: each instruction against its definition, and each fault it is there to find,
planted and found.
"""

import ctypes

import pytest
import torch

from tests.kernels.emulated import build, counters, load

FAULTS = [
    "fine",
    "no wait",
    "no barrier",
    "one warp fewer",
    "divergent",
    "left open",
    "out of bounds",
    "misaligned",
    "half a warp",
    "unwritten",
]


@pytest.fixture(scope="module")
def lib():
    library = load(build(["emulator/check.cu", "emulator/emulator.cpp"]))
    library.wa_emu_set_seed(0)
    return library


def pointer(t):
    return ctypes.c_void_p(t.data_ptr())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("of_rows", [0, 1])
def test_mma_on_ldmatrix_fragments_is_a_matrix_product(lib, dtype, of_rows):
    a, b, d = (
        torch.randn(16, 16).to(dtype),
        torch.randn(16, 8).to(dtype),
        torch.full((16, 8), float("nan")),
    )
    left, right = (a.t().contiguous(), b.t().contiguous()) if of_rows else (a, b)
    assert (
        lib.check_product(
            pointer(left), pointer(right), pointer(d), int(dtype == torch.bfloat16), of_rows
        )
        == 0
    )
    torch.testing.assert_close(d.double(), a.double() @ b.double() + of_rows, rtol=1e-6, atol=1e-5)


def test_mma_tf32_multiplies_numbers_of_ten_bits(lib):
    a, b, d = torch.randn(16, 8), torch.randn(8, 8), torch.full((16, 8), float("nan"))
    assert lib.check_product_tf32(pointer(a), pointer(b), pointer(d)) == 0
    error = (d.double() - a.double() @ b.double()).abs().max()
    assert 1e-6 < error < 2e-2
    exact_a, exact_b = a.bfloat16().float(), b.bfloat16().float()
    assert lib.check_product_tf32(pointer(exact_a), pointer(exact_b), pointer(d)) == 0
    torch.testing.assert_close(
        d.double(), exact_a.double() @ exact_b.double(), rtol=1e-6, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_packing_rounds_as_pytorch_does(lib, dtype):
    for scale in (1.0, 1e-6, 1e5, 3e-8):
        x, y = torch.randn(64) * scale, torch.empty(64)
        assert lib.check_round_trip(pointer(x), pointer(y), int(dtype == torch.bfloat16)) == 0
        assert torch.equal(y, x.to(dtype).float())
    special = torch.ones(64)
    special[:12] = torch.tensor(
        [
            0.0,
            -0.0,
            torch.inf,
            -torch.inf,
            65504,
            65519,
            65520,
            6e-8,
            2**-25,
            3 * 2**-25,
            2**-14,
            1 + 2**-11,
        ]
    )
    assert lib.check_round_trip(pointer(special), pointer(y), int(dtype == torch.bfloat16)) == 0
    assert torch.equal(y, special.to(dtype).float())


def test_shuffles_hand_over_the_named_lanes_value(lib):
    x, y = torch.randn(32), torch.empty(64)
    assert lib.check_shuffles(pointer(x), pointer(y)) == 0
    assert torch.equal(y[:32], x[torch.arange(32) ^ 5]) and torch.equal(y[32:], x[3].expand(32))


def test_named_barriers_hold_their_warps_only(lib):
    out = torch.empty(128, dtype=torch.int32)
    assert lib.check_halves(pointer(out)) == 0
    half = torch.arange(64).roll(-32)
    assert torch.equal(out.long(), torch.cat([half, half + 64]))


def hand_over(lib, fault, seed=0):
    x, y = torch.randn(64), torch.full((64,), 7.0)
    lib.wa_emu_set_seed(seed)
    code = lib.check_hand_over(pointer(x), pointer(y), FAULTS.index(fault))
    return code, lib.wa_emu_fault().decode(), torch.equal(y, x[torch.arange(64) ^ 32]), y


def test_a_right_hand_over_is_right_under_every_schedule(lib):
    for seed in range(20):
        code, message, right, _ = hand_over(lib, "fine", seed)
        assert (code, message, right) == (0, "", True)


def test_a_missing_wait_reads_nan(lib):
    code, _, _, y = hand_over(lib, "no wait")
    assert code == 0 and y.isnan().any()


def test_a_missing_barrier_gives_a_wrong_answer(lib):
    assert not any(hand_over(lib, "no barrier", seed)[2] for seed in range(20))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("one warp fewer", "deadlock: 32 of 64 threads wait"),
        ("divergent", "divergent warp collective"),
        ("left open", "never committed"),
        ("out of bounds", "256 bytes beyond the start of 256 of shared memory"),
        ("misaligned", "not aligned to 16 bytes"),
        ("half a warp", "deadlock"),
    ],
)
def test_a_fault_ends_the_launch_with_its_name_and_the_next_launch_is_well(lib, fault, words):
    code, message, _, _ = hand_over(lib, fault)
    assert code != 0 and words in message
    assert hand_over(lib, "fine")[:3] == (0, "", True)


def test_a_copy_told_to_write_zeros_writes_zeros(lib):
    code, _, _, y = hand_over(lib, "unwritten")
    assert code == 0 and torch.equal(y, torch.zeros(64))


def test_schedules_differ_between_seeds_and_repeat_for_one(lib):
    def order(seed):
        lib.wa_emu_set_seed(seed)
        seen, count = torch.zeros(192, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        assert lib.check_order(pointer(seen), pointer(count)) == 0
        assert sorted(seen.tolist()) == list(range(192))
        return seen.tolist()

    assert order(1) == order(1) and order(1) != order(2) != order(3)


def test_ldmatrix_counts_the_wavefronts_of_bank_conflicts(lib):
    counters(lib)
    for stride, wavefronts in [(16, 1), (128, 8), (64, 4), (144, 1)]:
        assert lib.check_read_rows(stride) == 0
        taken = counters(lib)
        assert taken["ldmatrix"] == 1 and taken["wavefronts"] == 4 * wavefronts, stride
