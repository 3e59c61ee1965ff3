"""The CPU kernel and the emulated CUDA kernels, written independently of each other, give the same
results.
"""

import ctypes

import pytest
import torch

from kernels.library import loader
from kernels.window_attention.testing import Case, Drawn, by_part, by_pytorch
from kernels.window_attention.testing_accuracy import distances, problems
from kernels.window_attention.testing_call import Kernel
from tests.kernels.emulated import build, load
from tests.kernels.tiled_kernels import SOURCES

CASES = [
    Case((7, 7), missing=(2, 3), shift=(3, 3), scale="table"),
    Case((8, 8), (1, 2), cosine=True, dropout=0.2, dtype=torch.float32),
    Case((8, 8), (2, 1), shift=(4, 0), scale="table", dropout=0.3, dtype=torch.float16, batch=2),
    Case((9, 12), missing=(1, 5), shift=(4, 6), scale="table", post=True, dropout=0.1),
    Case((12, 12), (1, 2), shift=(6, 6), cosine=True, head_dim=16, dtype=torch.float32),
    Case((16, 16), (1, 1), heads=1, scale="table", head_dim=64, post=True),
    Case((7, 7), (1, 2), missing=(2, 3), shift=(3, 3), epilogue="exclusive", lse=True),
    Case((9, 12), (1, 1), heads=1, dtype=torch.float32, epilogue="affine", lse=True),
]


@pytest.fixture(scope="module")
def kernels():
    path, reason = loader.load(quiet=True)
    if path is None:
        pytest.skip(f"no CPU kernel: {reason}")
    emulated = load(build(SOURCES))
    emulated.wa_emu_set_shared_bytes(232448)
    return Kernel(ctypes.CDLL(str(path)), "wa_cpu"), Kernel(emulated, "wa_emu")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cpu_and_emulated_cuda_kernels_differ_by_rounding_alone(kernels, case):
    drawn = Drawn(case)
    cpu, cuda = (by_part(kernel.run(drawn), case) for kernel in kernels)
    exact, plain = by_pytorch(drawn, torch.float64), by_pytorch(drawn, case.dtype)
    for name, rounded in plain.items():
        apart, _ = distances(cpu[name], cuda[name])
        rounding, _ = distances(rounded, exact[name])
        assert apart <= 3 * rounding + 1e-5 * exact[name].norm().item(), name
    lse = torch.stack([cpu["lse"], cuda["lse"]])
    assert torch.equal(*lse.isnan())
    slack = 2 * torch.finfo(case.dtype).eps * drawn.scale.abs().max().item() if case.cosine else 0.0
    assert (lse[0] - lse[1]).nan_to_num().abs().max() <= 2e-5 * lse.nan_to_num().abs().max() + slack


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cpu_kernel_passes_the_check_of_the_cuda_kernels(kernels, case):
    drawn = Drawn(case)
    assert problems(kernels[0].run(drawn), drawn) == []
