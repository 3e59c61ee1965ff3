"""The compilers of this machine, and the flags with which each source file is compiled.

Every csrc/cpu/*.cpp and csrc/cuda/*.cu is compiled by itself; comments in its first lines may add
flags:

    // build[x86_64]: -mavx2 -mfma
    // build: -fno-math-errno

The first is for this kind of processor alone; elsewhere, and where the compiler refuses the flags,
the file is left out. All files see WA_HAVE_<FILE NAME> for each such file that is compiled. The
second is for all processors.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ARCHITECTURES = (  # environment: compute capabilities to compile for, "80;90" or "80;90+PTX"
    "WINDOW_ATTENTION_CUDA_ARCHS"
)
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-pthread", "-Wall", "-Wextra"]
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "-Xcompiler",
    "-fPIC,-pthread,-Wall",
    "-Xcudafe",
    "--display_error_number",
]
LINKER_FLAGS = ["--no-as-needed", "-Bsymbolic", "--exclude-libs=ALL"]
FLAG_LINES = 15  # a file's comments about flags stand in its first lines
SECONDS = 1200  # one file may take this long
MACHINES = {"AMD64": "x86_64", "arm64": "aarch64"}


class BuildError(RuntimeError):
    """What stopped a build, in one clause."""


class Compilers(NamedTuple):
    """Paths of the C++ compiler and of nvcc, and the first lines of their version texts."""

    cxx: str
    nvcc: str | None
    identity: str


def find_compilers(cuda: bool = True) -> Compilers:
    """From CXX, CUDA_HOME and PATH.

    Raises: BuildError where there is no C++ compiler that works.
    """
    if sys.platform == "win32":
        raise BuildError("building on Windows is not supported")
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    cxx = next((path for path in map(shutil.which, candidates) if path), None)
    if cxx is None:
        raise BuildError(f"no C++ compiler ({', '.join(candidates)}) found")
    nvcc = _find_nvcc() if cuda else None
    return Compilers(cxx, nvcc, " | ".join(_version(tool) for tool in (cxx, nvcc) if tool))


def _find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = os.pathsep.join(os.path.join(home, "bin") for home in homes if home)
    return shutil.which("nvcc") or shutil.which("nvcc", path=folders)


def _version(tool: str) -> str:
    try:
        output = subprocess.run(
            [tool, "--version"],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{tool} does not work ({type(error).__name__})") from None
    lines = [line for line in output.splitlines() if line.strip()]
    if not lines:
        return tool
    telling = -2 if "nvcc" in tool and len(lines) > 1 else 0
    return f"{tool}: {lines[telling]}"


class Unit(NamedTuple):
    """One file to compile, with the flags that its comments ask for.

    tagged: whether it is for one kind of processor.
    """

    path: Path
    flags: list[str]
    tagged: bool


def read_unit(path: Path, machine: str) -> Unit | None:
    """The file with its flags for this machine, or None if it is for others."""
    flags, tags = [], set()
    for line in path.read_text().splitlines()[:FLAG_LINES]:
        match = re.match(r"// build(?:\[(\w+)\])?:(.*)", line)
        if match is None:
            continue
        tag = match.group(1)
        if tag:
            tags.add(tag)
        if tag in (None, machine):
            flags += match.group(2).split()
    if tags and machine not in tags:
        return None
    return Unit(path, flags, bool(tags))


def find_units(kind: str, csrc: Path, cxx: str) -> list[Unit]:
    """The files of a library of this kind ("cpu" or "cuda") that this machine can compile."""
    machine = MACHINES.get(platform.machine(), platform.machine())
    units = _read_units(csrc / "cpu", "*.cpp", machine)
    units = [unit for unit in units if not unit.tagged or accepts_flags(cxx, unit.flags)]
    if kind == "cuda":
        units += _read_units(csrc / "cuda", "*.cu", machine)
    return units


def _read_units(folder: Path, pattern: str, machine: str) -> list[Unit]:
    found = (read_unit(path, machine) for path in sorted(folder.glob(pattern)))
    return [unit for unit in found if unit is not None]


def accepts_flags(cxx: str, flags: list[str]) -> bool:
    """Whether the compiler knows these flags."""
    command = [cxx, *flags, "-x", "c++", "-fsyntax-only", "-"]
    done = subprocess.run(command, input="", capture_output=True, text=True, check=False)
    return done.returncode == 0


def gencode(architectures: str, known: str) -> list[str]:
    """nvcc's flags for "80;90+PTX": code for each that is in `known` (nvcc --list-gpu-code), and
    PTX of the last if asked for.
    """
    wanted = re.findall(r"\d+[a-z]?", architectures)
    numbers = [number for number in wanted if f"sm_{number}" in known.split()]
    if not numbers:
        raise BuildError(
            f"nvcc knows none of the compute capabilities {architectures}; set {ARCHITECTURES}"
        )
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    if architectures.upper().endswith("PTX"):
        flags.append(f"-gencode=arch=compute_{numbers[-1]},code=compute_{numbers[-1]}")
    return flags


def linker_options(kind: str) -> list[str]:
    """LINKER_FLAGS as the compiler that links a library of this kind passes them on."""
    if sys.platform == "darwin":
        return []
    if kind == "cuda":
        return [word for flag in LINKER_FLAGS for word in ("-Xlinker", flag)]
    return [f"-Wl,{flag}" for flag in LINKER_FLAGS]


def run(command: list[str]) -> subprocess.CompletedProcess:
    """The finished process; one that cannot start or takes too long counts as failed."""
    start = time.monotonic()
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        seconds = time.monotonic() - start
        return subprocess.CompletedProcess(command, 1, "", f"{error} after {seconds:.0f} s")
