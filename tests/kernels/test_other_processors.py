"""The CPU kernel on 64-bit Arm, by a cross compiler and an emulator where both are installed: the
portable code, as NEON.

On Debian: apt install g++-aarch64-linux-gnu qemu-user.
"""

import ctypes
import shutil
import subprocess

import numpy as np
import pytest
import torch

from kernels.library.compilers import CXX_FLAGS, read_unit
from kernels.window_attention.testing import Case, Drawn
from kernels.window_attention.testing_accuracy import problems
from kernels.window_attention.testing_call import POINTERS, Call
from tests.kernels.emulated import CSRC

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
CASES = [
    Case(dtype=F32, shift=(3, 3)),
    Case(dtype=F32, scale="table", missing=(2, 1), shift=(3, 2), cosine=True),
    Case((8, 8), (1, 2), dtype=BF16, scale="table", shift=(4, 4)),
    Case((5, 9), dtype=F16, missing=(2, 1), post=True, dropout=0.2),
    Case((8, 8), (1, 1), dtype=F16, magnitude=1e-4),
    Case((12, 12), (1, 1), heads=1, head_dim=24, dtype=BF16, cosine=True),
    Case(dtype=F32, missing=(2, 1), shift=(3, 2), epilogue="affine", lse=True),
    Case((4, 4), dtype=BF16, scale="table", epilogue="exclusive", lse=True),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The driver for 64-bit Arm, linked statically."""
    if not (shutil.which(COMPILER) and shutil.which(EMULATOR)):
        pytest.skip(f"{COMPILER} or {EMULATOR} is not installed")
    units = [read_unit(path, "aarch64") for path in sorted((CSRC / "cpu").glob("*.cpp"))]
    sources = [str(unit.path) for unit in units if unit and not unit.tagged]
    output = tmp_path_factory.mktemp("arm") / "driver"
    driver = str(CSRC.parents[2] / "tests/kernels/cpu_driver.cpp")
    subprocess.run(
        [
            COMPILER,
            *CXX_FLAGS,
            "-Werror",
            "-static",
            f"-I{CSRC}",
            *sources,
            driver,
            "-o",
            str(output),
        ],
        check=True,
    )
    return output


def run(program, drawn: Drawn) -> dict[str, torch.Tensor]:
    call = Call(drawn)
    as_bytes = {
        name: call.buffers[name].tensor.contiguous().view(torch.uint8).numpy()
        for name in POINTERS
        if name in call.buffers
    }
    said = [bytes(call.args)]
    for name in POINTERS:
        held = as_bytes.get(name)
        said += [
            np.int64(-1 if held is None else held.size).tobytes(),
            b"" if held is None else held.tobytes(),
        ]
    done = subprocess.run(
        [EMULATOR, str(program)],
        input=b"".join(said),
        capture_output=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    at = 0
    for name in POINTERS:
        size = int(np.frombuffer(done.stdout, np.int64, 1, at)[0])
        at += 8
        if size > 0:
            ctypes.memmove(call.buffers[name].tensor.data_ptr(), done.stdout[at : at + size], size)
            at += size
    call.check_margins()
    return {**call.results(), "lse": call.buffers["lse"].tensor}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_64_bit_arm_results_err_no_more_than_pytorch(program, case):
    drawn = Drawn(case)
    assert not problems(run(program, drawn), drawn)


@pytest.mark.slow
def test_on_64_bit_arm_the_vectors_are_those_of_the_processor(program):
    tool = shutil.which("aarch64-linux-gnu-objdump")
    if tool is None:
        pytest.skip("no objdump for 64-bit Arm")
    said = subprocess.run(
        [tool, "-d", "--no-show-raw-insn", str(program)], capture_output=True, text=True, check=True
    ).stdout
    kernel = [line for line in said.splitlines() if "fmla" in line and ".4s" in line]
    assert len(kernel) > 100
