"""Builds the CPU kernel without PyTorch's binding, once per content, and loads one copy of it for
each instruction set.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import pytest

from kernels.library.compilers import CXX_FLAGS, find_units
from kernels.window_attention.testing import Case
from kernels.window_attention.testing_call import Kernel
from tests.kernels.emulated import CSRC, cache_folder, compiler

INSTRUCTIONS = ["scalar", "avx2", "avx512", "avx512bf16", "amx_emulated", "amx"]
VARIABLE = "WINDOW_ATTENTION_CPU_ISA"


def build_cpu(flags: tuple[str, ...] = (), csrc: Path = CSRC) -> Path:
    """The shared library of csrc/cpu alone, built with the flags that build.py uses and warnings as
    errors.
    """
    tool = compiler()
    command = [tool, *CXX_FLAGS, "-Werror", *flags]
    units = find_units("cpu", csrc, tool)
    have = [f"-DWA_HAVE_{unit.path.stem.upper()}=1" for unit in units if unit.tagged]
    digest = hashlib.sha256(repr((command, units, have)).encode())
    for path in sorted([*csrc.glob("*.h"), *(csrc / "cpu").glob("*")]):
        digest.update(path.name.encode() + path.read_bytes())
    library = cache_folder() / f"cpu-{digest.hexdigest()[:20]}.so"
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            scratch = library.with_suffix(f".{os.getpid()}")
            scratch.mkdir(exist_ok=True)
            compiling = [
                subprocess.Popen(
                    [
                        *command,
                        *have,
                        *unit.flags,
                        "-c",
                        str(unit.path),
                        "-o",
                        str(scratch / f"{unit.path.stem}.o"),
                    ],
                    stderr=subprocess.PIPE,
                    text=True,
                )
                for unit in units
            ]
            words = [process.communicate()[1] for process in compiling]
            assert not any(process.returncode for process in compiling), "\n".join(words)
            objects = [str(path) for path in scratch.glob("*.o")]
            subprocess.run(
                [tool, "-shared", "-pthread", *flags, *objects, "-o", str(scratch / "library")],
                check=True,
            )
            (scratch / "library").rename(library)
            shutil.rmtree(scratch)
    return library


@functools.cache
def cpu_kernel(instructions: str = "") -> Kernel:
    """The kernel with this instruction set, or with its own choice. A library reads its variable
    once, so each has its own copy.
    """
    library = build_cpu()
    copy = library.with_name(f"{library.stem}-{instructions or 'own'}-{os.getpid()}.so")
    shutil.copy(library, copy)
    loaded = ctypes.CDLL(str(copy))
    copy.unlink()
    with mock.patch.dict(os.environ, {VARIABLE: instructions}):
        loaded.wa_cpu_instructions.restype = ctypes.c_char_p
        loaded.wa_cpu_instructions()
    kernel = Kernel(loaded, "wa_cpu")
    kernel.library = loaded
    return kernel


def available(instructions: str):
    """The kernel of this instruction set; skips where the processor or the compiler lacks it."""
    kernel = cpu_kernel(instructions)
    reason = kernel.why_not(Case())
    if reason:
        pytest.skip(reason)
    return kernel
