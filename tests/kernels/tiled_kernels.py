"""The emulated tiled kernels: their sources, and what is wrong with a library of one instance.

python -m tests.kernels.tiled_kernels LIBRARY
"""

import subprocess
import sys
from pathlib import Path

from kernels.window_attention.testing import Case, Drawn
from kernels.window_attention.testing_accuracy import problems
from kernels.window_attention.testing_call import Kernel, KernelError
from tests.helpers import ROOT
from tests.kernels.emulated import CSRC, build, load

# csrc/cuda/launch.cu and all it calls
SOURCES = [*sorted(f"cuda/{path.name}" for path in CSRC.glob("cuda/*.cu")), "emulator/emulator.cpp"]
# One instance alone, so that a mutant is built in a few seconds.
ONE = """#include "tiled_launch.h"
using One = tiled::Kernels<bf16, 32, tiled::kFull>;
#define WA_EXPORT extern "C" __attribute__((visibility("default")))
WA_EXPORT const char* wa_emu_supports(const WindowAttentionArgs*) { return nullptr; }
WA_EXPORT int64_t wa_emu_workspace(const WindowAttentionArgs* a, int backward) {
  return backward ? One::workspace(*a) : 0;
}
WA_EXPORT int wa_emu_forward(const WindowAttentionArgs* a) { return One::forward(*a, nullptr); }
WA_EXPORT int wa_emu_backward(const WindowAttentionArgs* a) { return One::backward(*a, nullptr); }
"""
# Each with the shared memory a block may have (20000: keys are streamed; 101376: four warps share a
# tile's keys) and the number of multiprocessors (1: several windows a block).
TRIALS = [
    (
        Case((9, 11), missing=(3, 4), shift=(4, 5), scale="table", post=True, dropout=0.2),
        232448,
        1,
    ),
    (
        Case((12, 12), (2, 2), heads=1, shift=(6, 6), cosine=True, scale="table", magnitude=3.0),
        101376,
        1,
    ),
    (Case((8, 13), (3, 2), heads=1, scale="table", post=True), 20000, 1),
    (Case((4, 18), (1, 1), heads=1, cosine=True, shift=(2, 0), missing=(0, 1)), 232448, 132),
    (
        Case((9, 11), missing=(3, 4), shift=(4, 5), post=True, epilogue="affine", lse=True),
        232448,
        1,
    ),
    (Case((8, 13), (3, 2), heads=1, cosine=True, epilogue="exclusive", tiny_values=True), 20000, 1),
]


def verdict(library: Path) -> str:
    """What is wrong with it, or an empty text."""
    loaded = load(library)
    kernel = Kernel(loaded, "wa_emu")
    for case, shared_bytes, multiprocessors in TRIALS:
        drawn = Drawn(case)
        loaded.wa_emu_set_shared_bytes(shared_bytes)
        loaded.wa_emu_set_multiprocessors(multiprocessors)
        for schedule in range(5):
            loaded.wa_emu_set_seed(schedule)
            try:
                found = problems(kernel.run(drawn), drawn)
            except (KernelError, AssertionError) as error:
                found = [str(error)]
            if found:
                return f"{case}, schedule {schedule}: {found[0]}"
    return ""


def judge(csrc: Path) -> str:
    """Builds the one instance from these sources and says what is wrong; in a process of its own,
    since a bug may end it.
    """
    (csrc / "cuda" / "tiled_one.cu").write_text(ONE)
    library = build(["cuda/tiled_one.cu", "emulator/emulator.cpp"], csrc=csrc)
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.tiled_kernels", str(library)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.stdout.strip() or (f"ended with {done.returncode}" if done.returncode else "")


if __name__ == "__main__":
    print(verdict(Path(sys.argv[1])))
