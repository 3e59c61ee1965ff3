"""The diagonal of the map taken out by the tables, in the CPU kernel of every instruction set and
in the emulated CUDA kernels: masked (bias -1e4, forbidden pairs at -inf) or excluded (post 0). A
token alone keeps itself, or gets 0.
"""

import math

import pytest
import torch

from kernels.window_attention.testing import BF16, F16, F32, Case, Drawn
from kernels.window_attention.testing_accuracy import problems
from kernels.window_attention.testing_call import Kernel
from tests.kernels.cpu_kernels import INSTRUCTIONS, available
from tests.kernels.emulated import build, load
from tests.kernels.small_kernels import Small, check_accuracy
from tests.kernels.small_kernels import library as small_library
from tests.kernels.tiled_kernels import SOURCES

# Alone in a region of a shifted window, and alone beside padding: in both the first or last token.
SHIFTED = Case((3, 3), (3, 3), missing=(1, 1), shift=(1, 1), mask_value=-math.inf)
PADDED = Case((7, 7), (2, 2), missing=(6, 6), mask_value=-math.inf)
CORNERS = {SHIFTED.shift: (0, 0), PADDED.shift: (-1, -1)}
FORMS = [{}, {"cosine": True, "scale": "table"}]


def draw(case: Case, edit: str) -> Drawn:
    drawn = Drawn(case.but(post=edit == "excluded"))
    own = case.offsets // 2
    if edit == "masked":
        drawn.bias[own] = -1e4
    else:
        drawn.post[own] = 0
    return drawn


def assert_alone(results: dict[str, torch.Tensor], drawn: Drawn, edit: str) -> None:
    """Output and gradient of v of the token in the corner."""
    row, column = CORNERS[drawn.case.shift]
    found = results["out"][:, row, column], results["qkv"].chunk(3, -1)[2][:, row, column]
    kept = drawn.qkv.chunk(3, -1)[2][:, row, column], drawn.grad_out[:, row, column]
    for value, own in zip(found, kept, strict=True):
        expected = own if edit == "masked" else torch.zeros_like(own)
        torch.testing.assert_close(value.float(), expected.float(), rtol=2e-3, atol=1e-6)


def products(*dtypes: torch.dtype) -> list:
    """(case, edit): by default a mask beside a lone token in a shifted region, of each dtype."""
    found = []
    for case in (SHIFTED, PADDED):
        for form in FORMS:
            for dtype in dtypes:
                for edit in ("masked", "excluded"):
                    first = case is SHIFTED and not form and edit == "masked"
                    usual = first and dtype != F16
                    marks = () if usual else pytest.mark.slow
                    drawn = case.but(dtype=dtype, **form)
                    found.append(pytest.param(drawn, edit, marks=marks, id=f"{drawn}-{edit}"))
    return found


@pytest.mark.parametrize(("case", "edit"), products(BF16, F16))
def test_cuda_of_small_windows_in_16_bits(case, edit):
    drawn = draw(case, edit)
    results = Small(small_library()).run(drawn).results()
    check_accuracy(results, drawn)
    assert_alone(results, drawn, edit)


@pytest.mark.parametrize(("case", "edit"), products(F32))
def test_cuda_in_float32(case, edit):
    drawn = draw(case, edit)
    results = Kernel(load(build(SOURCES)), "wa_emu").run(drawn)
    assert problems(results, drawn) == []
    assert_alone(results, drawn, edit)


@pytest.mark.slow
@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("edit", ["masked", "excluded"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("case", [SHIFTED.but(**FORMS[1]), PADDED], ids=str)
def test_cpu(case, dtype, edit, instructions):
    drawn = draw(case.but(dtype=dtype), edit)
    results = available(instructions).run(drawn)
    assert problems(results, drawn) == []
    assert_alone(results, drawn, edit)
