"""The CPU kernel of every instruction set against the specification in float64, by the accuracy
rule of testing_accuracy.problems.
"""

import ctypes
import itertools
import platform
from pathlib import Path

import pytest
import torch

from kernels.window_attention.plain import keep_mask
from kernels.window_attention.testing import Case, Drawn
from kernels.window_attention.testing_accuracy import exact_lse, problems
from kernels.window_attention.testing_call import Call
from tests.kernels.cpu_kernels import INSTRUCTIONS, available, cpu_kernel

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = [F32, F16, BF16]
WINDOWS = [(7, 7), (8, 8), (5, 9), (1, 4), (12, 12), (16, 16), (4, 24)]
VARIANTS = [
    dict(),
    dict(scale="table", shift=True),
    dict(scale="table", missing=True, shift=True, cosine=True),
    dict(post=True, dropout=0.2, batch=2),
    dict(
        scale="table",
        post=True,
        dropout=0.1,
        shift=True,
        cosine=True,
        bias=False,
        heads=3,
        head_dim=16,
    ),
    dict(head_dim=64, scale="table", heads=1, bias=False),
    dict(head_dim=24, heads=5, batch=2, magnitude=3.0, missing=True),
]


def make(window, dtype, variant) -> Case:
    rows, columns = window
    given = dict(variant)
    given["shift"] = (rows // 2, columns // 3) if variant.get("shift") else (0, 0)
    given["missing"] = (min(2, rows - 1), 1) if variant.get("missing") else (0, 0)
    if rows * columns > 100:
        given["windows"] = (2, 1) if dtype == F32 else (1, 2)
        given["batch"] = 1
    return Case(window=window, dtype=dtype, **given)


TABLE = [make(*row) for row in itertools.product(WINDOWS, DTYPES, VARIANTS)]
SHORT = [
    make(window, dtype, VARIANTS[variant])
    for (window, variant), dtype in itertools.product(
        [((7, 7), 2), ((5, 9), 4), ((8, 8), 3), ((12, 12), 1), ((7, 7), 6)], DTYPES
    )
]
EXTREMES = [
    Case(window=(7, 7), heads=48, dtype=BF16, scale="table"),
    Case(window=(24, 24), windows=(1, 1), heads=1, dtype=F32),
    Case(window=(24, 24), windows=(2, 1), shift=(12, 12), heads=1, dtype=BF16, scale="table"),
    Case(window=(1, 1), dtype=F32),
    Case(window=(7, 7), ties=True, dtype=F32),
    Case(window=(7, 7), magnitude=8.0, dtype=BF16),
]
SUMS = [
    Case(dtype=F32, shift=(3, 3), scale="table"),
    Case(dtype=F32, missing=(2, 1), cosine=True),
    Case(window=(12, 12), dtype=BF16),
]


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_output_and_gradients_err_no_more_than_pytorch_in_the_same_dtype(case):
    drawn = Drawn(case)
    assert not problems(cpu_kernel().run(drawn), drawn)


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("case", SHORT, ids=str)
def test_every_instruction_set_errs_no_more_than_pytorch(instructions, case):
    drawn = Drawn(case)
    assert not problems(available(instructions).run(drawn), drawn)


@pytest.mark.parametrize("case", EXTREMES, ids=str)
def test_extremes_of_heads_windows_and_logits_err_no_more_than_pytorch(case):
    drawn = Drawn(case)
    assert not problems(cpu_kernel().run(drawn), drawn)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_vectors_of_zeros_have_cosine_zero_and_leave_no_nan(dtype):
    drawn = Drawn(Case(cosine=True, zero_rows=True, dtype=dtype))
    assert not problems(cpu_kernel().run(drawn), drawn)


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_the_same_bits_for_any_number_of_threads_and_again(instructions, dtype):
    drawn = Drawn(
        Case(
            batch=5,
            windows=(3, 3),
            shift=(3, 3),
            scale="table",
            post=True,
            dropout=0.1,
            dtype=dtype,
        )
    )
    kernel = available(instructions)
    results = []
    for threads in (1, 2, 5, 1):
        call = Call(drawn)
        call.args.threads = threads
        kernel.launch("forward", call)
        kernel.launch("backward", call)
        results.append({**call.results(), "lse": call.buffers["lse"].tensor})
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in results[0])


@pytest.mark.skipif(
    platform.machine() != "x86_64", reason="elsewhere subnormal numbers cost little and are kept"
)
@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_subnormal_results_are_zero_within_the_kernel_and_kept_outside(instructions):
    drawn = Drawn(Case(windows=(1, 1), dtype=F32))
    torch.set_flush_denormal(
        False
    )  # of this thread; a test before may have run main.py or a library that sets it
    drawn.qkv[..., 128:] = 1e-39  # v; its mean over a row is subnormal too
    assert not available(instructions).run(drawn)["out"].any()
    assert (torch.tensor([2e-39]) * 0.5).item() > 0


@pytest.mark.parametrize(
    "case",
    [
        Case(shift=(3, 3), dtype=dtype, **more)
        for dtype in DTYPES
        for more in ({}, {"cosine": True})
    ],
    ids=str,
)
def test_small_gradients_err_no_more_than_pytorch(case):
    drawn = Drawn(case)
    drawn.grad_out *= 2.0 ** (-10 if case.dtype == F16 else -30)  # float16 ends at 2^-24
    assert not problems(cpu_kernel().run(drawn), drawn)


@pytest.mark.parametrize("case", SUMS, ids=str)
def test_lse_is_the_log_sum_exp_of_the_logits_and_padding_rows_are_not_written(case):
    drawn = Drawn(case)
    lse, exact = cpu_kernel().run(drawn)["lse"].double(), exact_lse(drawn)
    assert torch.equal(lse.isnan(), exact.isnan())
    assert (lse - exact).nan_to_num().abs().max() < 2e-5


def test_dropped_entries_are_those_of_the_common_hash():
    case = Case(
        window=(4, 4), windows=(1, 1), heads=1, head_dim=16, dtype=F32, dropout=0.5, bias=False
    )
    drawn = Drawn(case)
    drawn.qkv[..., :32] = 0  # all entries of the map are 1 / 16
    drawn.qkv[..., 32:] = torch.eye(16).view(1, 4, 4, 16)
    found = cpu_kernel().run(drawn)["out"].view(16, 16) * 16
    torch.testing.assert_close(
        found.double(), keep_mask(drawn.seed, 16, 16, 0.5), rtol=1e-5, atol=1e-5
    )


def test_gradients_nobody_asked_for_change_nothing():
    drawn = Drawn(Case(scale="table", post=True))
    everything = cpu_kernel().run(drawn)
    for name in ("scale", "bias", "post"):
        some = cpu_kernel().run(drawn, ("qkv", name))
        assert set(some) == {"out", "qkv", name, "lse"}
        assert all(torch.equal(some[key], everything[key]) for key in some)


def test_inference_needs_no_lse_and_gives_the_same_output():
    drawn = Drawn(Case())
    call = Call(drawn, (), lse=False)
    cpu_kernel().launch("forward", call)
    call.check_margins()
    assert torch.equal(call.results()["out"], cpu_kernel().run(drawn)["out"])


def test_what_is_not_a_number_reaches_the_output_of_its_window_alone():
    drawn = Drawn(Case(windows=(1, 2), dtype=BF16))
    drawn.qkv[0, 0, 0, 0] = torch.nan
    call = Call(drawn, (), lse=False)
    cpu_kernel().launch("forward", call)
    out = call.results()["out"]
    assert out[0, 0, 0, :32].isnan().all()
    assert not out[:, :, 7:].isnan().any()


@pytest.mark.parametrize(
    "changes, words",
    [({"head_dim": 20}, "multiple of 8"), ({"window": (33, 2)}, "1 .. 32")],
    ids=str,
)
def test_what_is_not_supported_is_refused_with_a_reason(changes, words):
    assert words in cpu_kernel().why_not(Case(**changes))


def test_an_instruction_set_that_does_not_exist_is_refused_with_a_reason():
    assert "WINDOW_ATTENTION_CPU_ISA" in cpu_kernel("quantum").why_not(Case())


AVX2, AVX512, AVX512_BF16, TILES, INTEL = 1, 2, 4, 8, 16  # csrc/cpu/processor.h


@pytest.mark.parametrize(
    ("has", "best"),
    [
        (0, "scalar"),
        (INTEL, "scalar"),
        (AVX2, "avx2"),
        (AVX2 | AVX512, "avx512"),
        (AVX2 | AVX512 | AVX512_BF16, "avx512bf16"),
        (AVX2 | AVX512 | AVX512_BF16 | INTEL, "avx512"),  # AMX is there but not permitted, or not
        (AVX2 | AVX512 | AVX512_BF16 | TILES | INTEL, "amx"),
        (AVX2 | AVX512 | AVX512_BF16 | TILES, "amx"),
    ],
)
def test_the_fastest_instructions_of_a_processor_are_chosen(has, best):
    if "this build" in (cpu_kernel(best).why_not(Case()) or ""):
        pytest.skip(f"the compiler has no {best}")
    choose = cpu_kernel().library.wa_cpu_best
    choose.restype = ctypes.c_char_p
    assert choose(has).decode() == best


def test_what_this_processor_has_decides_unless_one_is_forced():
    said = {name: cpu_kernel(name).library.wa_cpu_instructions() for name in ("", "scalar")}
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    assert said["scalar"] == b"scalar"
    if "AuthenticAMD" in flags and "avx512_bf16" in flags:
        assert said[""] == b"avx512bf16"
