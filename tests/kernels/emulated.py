"""Builds the CUDA kernels with the host compiler and the emulator (csrc/emulator), once per
content, and loads them.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "kernels" / "window_attention" / "csrc"
FLAGS = [
    "-std=c++17",
    "-O1",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-DWA_EMU",
    "-shared",
    "-fPIC",
    "-fvisibility=hidden",
    "-x",
    "c++",
]


def cache_folder() -> Path:
    """Where builds are kept from one test run to the next, shared by the processes of one."""
    folder = (
        Path(os.environ.get("XDG_CACHE_HOME", Path(tempfile.gettempdir()) / f"cache-{os.getuid()}"))
        / "window_attention_emulated"
    )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def compiler() -> str:
    """The host's C++ compiler; skips the test where there is none."""
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        pytest.skip("no C++ compiler to build the emulated kernels with")
    return found


def build(sources: list[str], flags: tuple[str, ...] = (), csrc: Path = CSRC) -> Path:
    """The shared library of `sources` (paths under csrc), compiled unless one of the same sources,
    headers and flags is kept.

    Raises: subprocess.CalledProcessError with the compiler's words in `stderr`.
    """
    tool = compiler()
    digest = hashlib.sha256(repr((tool, sources, FLAGS, flags)).encode())
    for path in sorted(
        p
        for p in csrc.rglob("*")
        if p.suffix in (".h", ".cu", ".cpp") and "cpu" not in p.relative_to(csrc).parts
    ):
        digest.update(path.relative_to(csrc).as_posix().encode() + path.read_bytes())
    library = cache_folder() / f"{Path(sources[0]).stem}-{digest.hexdigest()[:20]}.so"
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            unfinished = library.with_suffix(f".{os.getpid()}")
            command = [
                tool,
                *FLAGS,
                *flags,
                *(str(csrc / s) for s in sources),
                "-o",
                str(unfinished),
            ]
            subprocess.run(command, check=True, capture_output=True, text=True)
            unfinished.rename(library)
    return library


@functools.cache
def load(path: Path) -> ctypes.CDLL:
    """The library at `path` with the emulator's own functions typed."""
    library = ctypes.CDLL(str(path))
    library.wa_emu_fault.restype = ctypes.c_char_p
    library.wa_emu_set_seed.argtypes = [ctypes.c_uint64]
    return library


def counters(library: ctypes.CDLL) -> dict[str, int]:
    """What the emulator counted since the last call."""
    names = [
        "switches",
        "barriers",
        "collectives",
        "mma",
        "ldmatrix",
        "wavefronts",
        "copies",
        "launches",
    ]
    values = (ctypes.c_uint64 * len(names))()
    library.wa_emu_take_counters(values)
    return dict(zip(names, values, strict=True))


def few_by_default(cases: list) -> list:
    """The cases as parameters of a test, all but every ninth of them for the slow tier."""
    return [
        pytest.param(case, id=str(case), marks=[pytest.mark.slow] if number % 9 else [])
        for number, case in enumerate(cases)
    ]
