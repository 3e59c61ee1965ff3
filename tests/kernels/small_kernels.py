"""Runs the emulated kernels for windows of up to 64 tokens.

As a program: a fixed set of probes on the libraries named on its input, for mutants and sanitizers.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path

import torch

from kernels.window_attention.testing import Case, Drawn, by_part
from kernels.window_attention.testing_accuracy import distances, rounding
from kernels.window_attention.testing_call import Call
from tests.kernels.emulated import CSRC, build, load

SOURCES = [
    "cuda/small.cu",
    "cuda/small_bf16.cu",
    "cuda/small_f16.cu",
    "emulator/small_exports.cpp",
    "emulator/emulator.cpp",
]
FEW = "-DWA_SMALL_FEW"  # of the kernels: bf16 and head dim 32 only
# Lean and general kernels, several windows a block, every mask and term; what FEW leaves in a
# build.
PROBES = [
    Case(windows=(1, 3), batch=2, scale="table", shift=(3, 3)),
    Case(window=(8, 8), missing=(3, 5), shift=(4, 2), cosine=True, scale="table"),
    Case(windows=(1, 2), cosine=True, heads=1),
    Case(
        window=(3, 5),
        windows=(3, 2),
        missing=(1, 2),
        shift=(1, 3),
        post=True,
        dropout=0.3,
        scale="table",
    ),
    Case(window=(8, 7), windows=(2, 1), post=True, dropout=0.2, cosine=True, magnitude=3.0),
    Case(windows=(1, 2), missing=(2, 3), shift=(3, 3), scale="table", epilogue="affine", lse=True),
    Case(window=(8, 8), windows=(1, 2), cosine=True, epilogue="exclusive", tiny_values=True),
    Case(window=(3, 5), post=True, dropout=0.2, epilogue="affine"),
]


class Small:
    """The kernels of a library."""

    def __init__(self, path: Path | str):
        self.lib = load(path)
        self.lib.wa_emu_small_supports.restype = ctypes.c_char_p
        self.lib.wa_emu_small_workspace.restype = ctypes.c_int64

    def refusal(self, call: Call) -> str | None:
        """Why these arguments are not for these kernels."""
        words = self.lib.wa_emu_small_supports(ctypes.byref(call.args))
        return None if words is None else words.decode()

    def launch(self, direction: str, call: Call) -> None:
        """Runs "forward" or "backward"; fails with the emulator's words."""
        code = getattr(self.lib, "wa_emu_small_" + direction)(ctypes.byref(call.args))
        assert code == 0, f"{direction}: {self.lib.wa_emu_fault().decode()} ({call.case})"

    def run(self, drawn: Drawn, seed: int = 0, blocks: int = 1, **how) -> Call:
        """Forward and backward of a case; the call with its results.

        seed: of the schedule. blocks: multiprocessors; each gets about 4 blocks forward and 2
            backward, over which heads and windows are
        spread. how: arguments of `Call`.
        """
        self.lib.wa_emu_set_seed(ctypes.c_uint64(seed))
        self.lib.wa_emu_set_multiprocessors(blocks)
        call = Call(drawn, **how)
        assert (words := self.refusal(call)) is None, words
        self.launch("forward", call)
        if any(name.startswith("grad_") and name != "grad_out" for name in call.buffers):
            call.give_workspace(self.lib.wa_emu_small_workspace(ctypes.byref(call.args), 1))
            self.launch("backward", call)
        call.check_margins()
        return call


def check_accuracy(
    found: dict[str, torch.Tensor], drawn: Drawn, factor: float = 2.0, only: str = ""
) -> None:
    """Each result errs at most `factor` times as much as the specification run in the case's own
    dtype, in norm and in the worst element.

    Storing the exact result in that dtype may cost half a unit in the last place of the largest
    element; where the specification's worst element is closer, it was lucky, and that half unit is
    the yardstick. only: names of results, separated by spaces.
    """
    c = drawn.case
    exact, plain = drawn.expected
    ours = by_part(found, c)
    for name in only.split() or ours:
        assert torch.isfinite(ours[name]).all(), f"{name} is not finite ({c})"
        assert torch.isfinite(plain[name]).all(), f"{name} is no yardstick ({c})"
        size, norm = exact[name].abs().max().item(), exact[name].norm().item()
        error, worst = distances(ours[name], exact[name])
        error_plain, worst_plain = distances(plain[name], exact[name])
        assert error <= factor * error_plain + 1e-6 * norm, (
            f"{name}: error {error:.2e} in norm, PyTorch's is {error_plain:.2e} ({c})"
        )
        worst_plain = max(worst_plain, rounding(size, ours[name].dtype))
        assert worst <= factor * worst_plain + 1e-6 * size, (
            f"{name}: worst element {worst:.2e} off, PyTorch's {worst_plain:.2e} ({c})"
        )


def probe(path: str, drawn: list[Drawn]) -> None:
    """Runs the probes under three schedules; fails at the first wrong one. Whatever the schedule,
    the bits must be equal.
    """
    small = Small(path)
    for inputs in drawn:
        first: dict = {}
        for seed in range(3):
            results = small.run(inputs, seed).results()
            if not first:
                check_accuracy(results, inputs)
                first = results
            for name, value in results.items():
                assert torch.equal(value, first[name]), (
                    f"{name} depends on the schedule ({inputs.case})"
                )


def library(*flags: str, csrc: Path = CSRC) -> Path:
    """The emulated library of the small kernels alone."""
    return build([s for s in SOURCES if FEW not in flags or s != "cuda/small_f16.cu"], flags, csrc)


def serve() -> None:
    """For each library named on a line of the input: a line with what became of the probes, run in
    a fork, which they may bring down.
    """
    torch.set_num_threads(1)
    drawn = [Drawn(case) for case in PROBES]
    for inputs in drawn:
        _ = inputs.expected  # once, for all forks
    for line in sys.stdin:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            signal.alarm(300)
            words = "right"
            try:
                probe(line.strip(), drawn)
            except AssertionError as problem:
                words = "wrong: " + str(problem).splitlines()[0]
            os.write(write, words.encode())
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as result:
            words = result.read()
        _, status = os.waitpid(child, 0)
        signalled = f"ended by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "broken"
        print(words or signalled, flush=True)


if __name__ == "__main__":
    serve()
