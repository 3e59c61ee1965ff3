"""The CUDA kernels for windows of up to 64 tokens, run by the emulator, against the specification
in float64.
"""

import ctypes
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.window_attention import window_layout
from kernels.window_attention.reference import split_windows
from kernels.window_attention.testing import CRPW_V2, SMALL_CASES, TABLE, V2, Case, Drawn, by_part
from kernels.window_attention.testing_accuracy import distances
from kernels.window_attention.testing_call import Call
from tests.kernels.emulated import compiler, counters
from tests.kernels.small_kernels import FEW, Small, check_accuracy, library

F16, BF16 = torch.float16, torch.bfloat16


@pytest.fixture(scope="module")
def small():
    return Small(library())


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_results_err_no_more_than_pytorch_in_the_same_dtype(small, case):
    drawn = Drawn(case)
    check_accuracy(small.run(drawn).results(), drawn)


WIDE = list(
    itertools.product(
        [(7, 7), (8, 8), (4, 4), (3, 5)],
        [F16, BF16],
        ["one", "table"],
        [False, True],
        [False, True],
        [0.0, 0.25],
        [(0, 0), (2, 1)],
        [(0, 0), (1, 2)],
        [(16, 2), (32, 1), (64, 3)],
    )
)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_every_combination_errs_no_more_than_pytorch(small, part):
    torch.set_num_threads(1)
    for number, (
        window,
        dtype,
        scale,
        cosine,
        post,
        dropout,
        missing,
        shift,
        (head_dim, heads),
    ) in list(enumerate(WIDE))[part::8]:
        case = Case(
            window=window,
            dtype=dtype,
            scale=scale,
            cosine=cosine,
            post=post,
            dropout=dropout,
            missing=missing,
            shift=shift,
            head_dim=head_dim,
            heads=heads,
            windows=(2, 2) if number % 3 else (1, 3),
            bias=number % 5 > 0,
        )
        drawn = Drawn(case)
        check_accuracy(small.run(drawn, seed=number, blocks=1 + number % 3).results(), drawn)


@pytest.mark.parametrize(
    "case",
    [SMALL_CASES[6], SMALL_CASES[11], Case(dropout=0.2, post=True, missing=(2, 2), shift=(3, 3))],
    ids=str,
)
def test_every_schedule_and_every_run_gives_the_same_bits(small, case):
    drawn = Drawn(case)
    first = small.run(drawn, seed=0).results()
    for seed in (1, 2, 3, 3):
        for name, value in small.run(drawn, seed=seed).results().items():
            assert torch.equal(value, first[name]), name


@pytest.mark.parametrize(
    "case",
    [Case(scale="table", shift=(3, 3)), Case(cosine=True, post=True), Case(cosine=True)],
    ids=str,
)
def test_spreading_windows_over_more_blocks_changes_nothing_but_the_order_of_sums(small, case):
    drawn = Drawn(case.but(batch=3))
    one, many = (small.run(drawn, blocks=blocks).results() for blocks in (1, 64))
    for name in one:
        if name in ("out", "qkv"):
            assert torch.equal(one[name], many[name]), name
        else:
            torch.testing.assert_close(one[name], many[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "case",
    [Case(shift=(3, 3)), Case(missing=(3, 2), shift=(3, 3), **TABLE), Case(window=(4, 4), **V2)],
    ids=str,
)
def test_lse_is_the_log_sum_exp_of_the_logits_and_padding_rows_are_not_written(small, case):
    drawn = Drawn(case)
    found = small.run(drawn).buffers["lse"].tensor.double()
    layout = window_layout(case.grid, case.window, case.shift, case.mask_value)
    q, k, _ = split_windows(drawn.qkv.double(), layout, case.heads)
    if case.cosine:
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    area, width = case.window[0] * case.window[1], 2 * case.window[1] - 1
    y, x = torch.arange(area) // case.window[1], torch.arange(area) % case.window[1]
    index = (y[:, None] - y + case.window[0] - 1) * width + x[:, None] - x + case.window[1] - 1
    scale = drawn.scale.double()[
        index if len(drawn.scale) > 1 else torch.zeros_like(index)
    ].permute(2, 0, 1)
    logits = q @ k.mT * scale + drawn.bias.double()[index].permute(2, 0, 1)
    if layout.mask is not None:
        logits = (
            logits.unflatten(0, (-1, layout.num_windows)) + layout.mask[:, None].double()
        ).flatten(0, 1)
    exact = logits.logsumexp(-1).view_as(found)
    real = (
        split_windows(torch.ones(case.batch, *case.grid, 3 * case.heads), layout, case.heads)[0][
            ..., 0
        ].view_as(found)
        > 0
    )
    torch.testing.assert_close(found[real], exact[real], rtol=1e-5, atol=1e-4)
    assert found[~real].isnan().all() and real.any()


def test_a_window_of_one_token_passes_its_value_on(small):
    drawn = Drawn(Case(window=(1, 1), heads=3))
    results = small.run(drawn).results()
    v = drawn.qkv.unflatten(-1, (3, 3, 32))[..., 2, :, :].flatten(-2)
    assert torch.equal(results["out"], v)
    for name, value in by_part(results, drawn.case).items():
        if name not in ("out", "v"):
            assert value.abs().max() < 1e-5, name


def test_exact_ties_share_the_softmax_evenly(small):
    drawn = Drawn(Case(ties=True, bias=False))
    results = small.run(drawn).results()
    check_accuracy(results, drawn, only="out v")
    exact = drawn.expected[0]
    found = by_part(results, drawn.case)
    for name in ("q", "k", "scale"):  # sums that cancel: PyTorch's error is as accidental as ours
        assert distances(found[name], exact[name])[1] < 1e-2, name


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_vectors_of_zeros_have_cosine_zero_and_leave_no_nan(small, dtype):
    drawn = Drawn(Case(zero_rows=True, cosine=True, dtype=dtype))
    found = by_part(small.run(drawn).results(), drawn.case)
    exact = drawn.expected[0]
    zero = (drawn.qkv.unflatten(-1, (3, 2, 32))[:, :, :, 0] == 0).all(-1)
    for name in ("out", "v", "bias", "scale"):
        error, worst = distances(found[name], exact[name])
        assert error <= 2 * torch.finfo(dtype).eps * exact[name].norm(), name
    for name in ("q", "k"):
        assert not found[name].isnan().any()
        error, worst = distances(found[name][~zero], exact[name][~zero])
        assert error <= 2 * torch.finfo(dtype).eps * exact[name][~zero].norm(), name
    if dtype == BF16:  # 1e12 times the gradient, which float16 cannot hold
        torch.testing.assert_close(
            found["q"][zero].double(),
            exact["q"][zero],
            rtol=0.05,
            atol=0.02 * exact["q"][zero].abs().max().item(),
        )


@pytest.mark.parametrize(
    "case", [Case(**TABLE), Case(**V2), Case(**CRPW_V2, window=(8, 8), shift=(4, 4))], ids=str
)
def test_bf16_errs_no_more_than_eager_autocast(small, case):
    drawn = Drawn(case)
    check_accuracy(small.run(drawn).results(), drawn, factor=1.0)


def test_gradients_nobody_asked_for_are_not_written_and_change_nothing(small):
    for case in (Case(), Case(scale="table", cosine=True), Case(post=True, head_dim=16)):
        drawn = Drawn(case)
        full = small.run(drawn).results()
        for wanted in (("qkv",), ("qkv", "bias"), ("qkv", "scale"), ("qkv", "post")):
            part = small.run(drawn, gradients=wanted).results()
            assert {"out", *wanted} >= set(part)
            for name, value in part.items():
                assert torch.equal(value, full[name]), name


def test_inference_needs_no_lse(small):
    drawn = Drawn(Case(shift=(3, 3), missing=(1, 1)))
    assert torch.equal(
        small.run(drawn, gradients=(), lse=False).results()["out"],
        small.run(drawn).results()["out"],
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": torch.float32}, "fp16 and bf16"),
        ({"window": (9, 8)}, "1 to 64 tokens"),
        ({"head_dim": 48}, "head_dim is not"),
    ],
)
def test_what_is_not_supported_is_refused_with_a_reason(small, changes, words):
    assert words in small.refusal(Call(Drawn(Case(**changes))))


def test_devices_with_little_shared_memory_refuse_only_the_largest_backward(small):
    small.lib.wa_emu_set_shared_bytes(101376)  # sm_86, sm_89, sm_120
    try:
        everything = Case(head_dim=64, window=(8, 8), post=True, cosine=True, scale="table")
        assert "shared memory" in small.refusal(Call(Drawn(everything)))
        assert small.refusal(Call(Drawn(everything), gradients=())) is None
        assert small.refusal(Call(Drawn(everything), gradients=("qkv", "scale", "bias"))) is None
        for case in (
            Case(scale="table", cosine=True, window=(8, 8)),
            Case(head_dim=64, scale="table"),
            Case(post=True, scale="table"),
        ):
            small.run(Drawn(case))
    finally:
        small.lib.wa_emu_set_shared_bytes(232448)


def test_tiles_are_read_without_bank_conflicts(small):
    for case in (Case(), Case(head_dim=16), Case(head_dim=64), Case(window=(4, 4))):
        call = Call(Drawn(case))
        counters(small.lib)
        small.launch("forward", call)
        call.give_workspace(small.lib.wa_emu_small_workspace(ctypes.byref(call.args), 1))
        small.launch("backward", call)
        taken = counters(small.lib)
        assert taken["wavefronts"] <= 4 * taken["ldmatrix"], case


def test_a_plain_window_takes_the_products_it_needs_and_no_more(small):
    counters(small.lib)
    small.run(Drawn(Case(windows=(1, 1), heads=1)), gradients=())
    taken = counters(small.lib)
    assert taken["mma"] == 4 * (
        7 * 2 + 4 * 4
    )  # warps * (tiles of keys * steps of d + steps of keys * tiles of d)
    assert taken["launches"] == 1 and taken["copies"] == 3 * 64 * 4


@pytest.mark.slow
def test_address_and_undefined_behaviour_sanitizers_find_nothing():
    flags = (
        FEW,
        "-g",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-fno-omit-frame-pointer",
    )
    path = library(*flags)
    # the C++ library too: the sanitizer looks for its functions at the start, and PyTorch's imports
    # may throw before anything loads it
    runtime = [
        subprocess.run(
            [compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    if not all(Path(path).is_absolute() for path in runtime):
        pytest.skip("the compiler comes without the address sanitizer's library")
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(runtime),
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.small_kernels"],
        input=f"{path}\n",
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        env=environment,
        timeout=800,
    )
    assert done.stdout.strip() == "right", done.stdout + done.stderr[-3000:]
