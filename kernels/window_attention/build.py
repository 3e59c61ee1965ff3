"""Compiles csrc/ into one shared library: the C++ compiler alone gives the CPU kernel, nvcc in
addition the CUDA kernel.

Uses the standard library alone, so that setup.py can load this file by its path. A library is named
after the hash of all it is made from; one with another hash is never loaded. Every csrc/cpu/*.cpp
and csrc/cuda/*.cu is compiled by itself; comments in its first lines may add flags:

    // build[x86_64]: -mavx2 -mfma      for this kind of processor alone
    // build: -fno-math-errno           for all

On another processor, and where the compiler refuses the flags, such a file is left out. All files
see WA_HAVE_<FILE NAME> for each of these that is in.
"""

import contextlib
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).resolve().parent / "csrc"
CACHE = "WINDOW_ATTENTION_CACHE"  # environment: the folder for what is built on demand
ARCHITECTURES = (  # environment: compute capabilities to compile for, "80;90" or "80;90+PTX"
    "WINDOW_ATTENTION_CUDA_ARCHS"
)
AHEAD = "80;90;100;120+PTX"  # what a build ahead of time compiles for
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-pthread", "-Wall", "-Wextra"]
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "-Xcompiler",
    "-fPIC,-pthread,-Wall",
    "-Xcudafe",
    "--display_error_number",
]
SECONDS = 1200  # one file may take this long


class BuildError(RuntimeError):
    """What stopped a build, in one clause."""


class Compilers(NamedTuple):
    """Paths of the C++ compiler and of nvcc, and the first lines of what they say of themselves."""

    cxx: str
    nvcc: str | None
    identity: str


def find_compilers(cuda: bool = True) -> Compilers:
    """From CXX, CUDA_HOME and PATH. Raises: BuildError where there is no C++ compiler that
    works.
    """
    if sys.platform == "win32":
        raise BuildError("building on Windows is not supported")
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    cxx = next((path for path in map(shutil.which, candidates) if path), None)
    if cxx is None:
        raise BuildError(f"no C++ compiler ({', '.join(candidates)}) found")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    paths = [os.path.join(home, "bin") for home in homes if home]
    nvcc = (
        (shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(paths)))
        if cuda
        else None
    )
    return Compilers(cxx, nvcc, " | ".join(_version(tool) for tool in (cxx, nvcc) if tool))


def _version(tool: str) -> str:
    try:
        said = subprocess.run(
            [tool, "--version"], capture_output=True, text=True, timeout=60, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{tool} does not work ({type(error).__name__})") from None
    lines = [line for line in said.splitlines() if line.strip()]
    return f"{tool}: {lines[-2 if 'nvcc' in tool and len(lines) > 1 else 0]}" if lines else tool


def has_cuda_sources(csrc: Path = CSRC) -> bool:
    """Whether the CUDA kernel is part of these sources."""
    return any((csrc / "cuda").glob("launch*.cu"))


def source_hash(kind: str, csrc: Path = CSRC) -> str:
    """16 digits over names and contents of what a library of this kind is made from, this file
    included.

    Raises: BuildError where the sources are not there.
    """
    if not (csrc / "binding.cpp").is_file():
        raise BuildError(f"the sources are not here ({csrc})")
    digest = hashlib.sha256(Path(__file__).read_bytes())
    used = [csrc, csrc / "cpu"] + [csrc / "cuda"] * kind.startswith("cuda")
    for path in sorted(
        path
        for folder in used
        for path in folder.glob("*")
        if path.suffix in {".h", ".inc", ".cpp", ".cu"}
    ):
        digest.update(f"\0{path.relative_to(csrc).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def library_name(kind: str, csrc: Path = CSRC) -> str:
    """kind: "cpu", or "cuda" with what it was compiled for, as in "cuda-90"."""
    return f"window_attention-{source_hash(kind, csrc)}-{platform.machine()}-{kind}.so"


def cache_folder() -> Path:
    """Where libraries built on demand are kept; may be deleted at any time."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(CACHE) or Path(base) / "window_attention")


def torch_folder() -> Path:
    """The folder of the installed PyTorch, without importing it; setup.py runs where it may be
    installed but not importable.
    """
    import importlib.util
    import sysconfig

    spec = importlib.util.find_spec("torch")
    found = [Path(spec.origin).parent] if spec and spec.origin else []
    found += [Path(sysconfig.get_path(name)) / "torch" for name in ("purelib", "platlib")]
    for folder in found:
        if (folder / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
            return folder
    raise BuildError("no PyTorch with headers found beside this Python")


def build(
    kind: str,
    folder: Path,
    csrc: Path = CSRC,
    architectures: str | None = None,
    say=lambda line: None,
) -> Path:
    """The library of this kind in `folder`, compiled unless it is there; several processes at once
    compile it once.

    Args:
        kind: "cpu" or "cuda". architectures: as in WINDOW_ATTENTION_CUDA_ARCHS, for "cuda". say:
            called with one line before compiling.
    Raises: BuildError with the reason; the name of the log is part of it where a compiler failed.
        What has failed is not tried again with the same compilers until that log is deleted.
    """
    architectures = os.environ.get(ARCHITECTURES) or architectures or AHEAD
    tag = kind if kind == "cpu" else f"cuda-{re.sub('[^0-9A-Za-z]+', '_', architectures)}"
    target = folder / library_name(tag, csrc)
    if target.is_file():
        return target
    compilers = find_compilers(kind == "cuda")
    if kind == "cuda" and compilers.nvcc is None:
        raise BuildError("no nvcc found")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(
            f"{folder} cannot be written ({error.strerror}); set {CACHE} to a folder that can"
        ) from None
    log = target.with_suffix(".log")
    with _lock(target.with_suffix(".lock")):
        if target.is_file():
            return target
        if log.is_file() and log.read_text().partition("\n")[0] == compilers.identity:
            raise BuildError(
                f"it failed before; the log, which may be deleted to try again, is {log}"
            )
        _compile(kind, target, log, csrc, compilers, architectures, say)
    return target


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Holds a lock among processes; where the file system has none, two processes may compile the
    same, which is only slow.
    """
    import fcntl

    with open(path, "w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    with contextlib.suppress(OSError):
        path.unlink()


class Unit(NamedTuple):
    """One file to compile, with the flags that its comments ask for; tagged: it is for one kind of
    processor.
    """

    path: Path
    flags: list[str]
    tagged: bool


def read_unit(path: Path, machine: str) -> Unit | None:
    """The file with its flags for this machine, or None if it is for others."""
    head = path.read_text().splitlines()[:15]
    found = [
        match.groups()
        for match in (re.match(r"// build(?:\[(\w+)\])?:(.*)", line) for line in head)
        if match
    ]
    tags = {tag for tag, _ in found if tag}
    if tags and machine not in tags:
        return None
    return Unit(
        path,
        [flag for tag, flags in found if tag in (None, machine) for flag in flags.split()],
        bool(tags),
    )


def _units(kind: str, csrc: Path, cxx: str) -> list[Unit]:
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    units = [read_unit(path, machine) for path in sorted((csrc / "cpu").glob("*.cpp"))]
    units = [unit for unit in units if unit and (not unit.tagged or _accepts(cxx, unit.flags))]
    if kind == "cuda":
        units += [
            unit
            for unit in (read_unit(path, machine) for path in sorted((csrc / "cuda").glob("*.cu")))
            if unit
        ]
    return units


def _accepts(cxx: str, flags: list[str]) -> bool:
    command = [cxx, *flags, "-x", "c++", "-fsyntax-only", "-"]
    return (
        subprocess.run(command, input="", capture_output=True, text=True, check=False).returncode
        == 0
    )


def gencode(architectures: str, known: str) -> list[str]:
    """nvcc's flags for "80;90+PTX": code for each that is in `known` (nvcc --list-gpu-code), and
    PTX of the last if asked for.
    """
    numbers = [
        number
        for number in re.findall(r"\d+[a-z]?", architectures)
        if f"sm_{number}" in known.split()
    ]
    if not numbers:
        raise BuildError(
            f"nvcc knows none of the compute capabilities {architectures}; set {ARCHITECTURES}"
        )
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    return flags + [
        f"-gencode=arch=compute_{numbers[-1]},code=compute_{numbers[-1]}"
    ] * architectures.upper().endswith("PTX")


def _compile(
    kind: str, target: Path, log: Path, csrc: Path, compilers: Compilers, architectures: str, say
) -> None:
    torch = torch_folder()
    units = _units(kind, csrc, compilers.cxx)
    if not any(unit.path.suffix == ".cpp" for unit in units):
        raise BuildError(f"there is no CPU kernel for this machine in {csrc}")
    have = [f"-DWA_HAVE_{unit.path.stem.upper()}=1" for unit in units if unit.tagged] + [
        "-DWA_WITH_CUDA=1"
    ] * (kind == "cuda")
    headers = [
        "-isystem",
        str(torch / "include"),
        "-isystem",
        str(torch / "include" / "torch" / "csrc" / "api" / "include"),
    ]
    units.append(Unit(csrc / "binding.cpp", ["-O2", *headers], False))
    nvcc = compilers.nvcc or ""
    if kind == "cuda":
        cuda = gencode(architectures, _run([nvcc, "--list-gpu-code"]).stdout) + [
            "-ccbin",
            compilers.cxx,
        ]
    what, duration = (
        ("CPU and CUDA", "some minutes") if kind == "cuda" else ("CPU", "a minute or so")
    )
    say(
        f"window_attention: compiling the fused kernel ({what}, {len(units)} files, {duration},"
        f" once per machine) into {target.parent}"
    )
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        objects = [str(Path(scratch, f"{number}.o")) for number in range(len(units))]
        commands = [
            [nvcc, *NVCC_FLAGS, *cuda] if unit.path.suffix == ".cu" else [compilers.cxx, *CXX_FLAGS]
            for unit in units
        ]
        commands = [
            [*command, *have, *unit.flags, "-c", str(unit.path), "-o", output]
            for command, unit, output in zip(commands, units, objects, strict=True)
        ]
        link = (
            [nvcc, "-ccbin", compilers.cxx, "-shared", "-cudart", "static"]
            if kind == "cuda"
            else [compilers.cxx, "-shared", "-pthread"]
        )
        library = str(Path(scratch, "library.so"))
        passed = (
            []
            if sys.platform == "darwin"
            else ["--no-as-needed", "-Bsymbolic", "--exclude-libs=ALL"]
        )
        passed = [
            word
            for flag in passed
            for word in (("-Xlinker", flag) if kind == "cuda" else (f"-Wl,{flag}",))
        ]
        link += [
            *passed,
            *objects,
            f"-L{torch / 'lib'}",
            "-ltorch",
            "-ltorch_cpu",
            "-lc10",
            "-o",
            library,
        ]
        with ThreadPoolExecutor(_jobs()) as pool:
            results = list(pool.map(_run, commands))
        if all(result.returncode == 0 for result in results):
            results.append(_run(link))
        if any(result.returncode for result in results):
            failed = [result for result in results if result.returncode]
            text = "\n\n".join(
                f"{' '.join(map(str, result.args))}\n{result.stdout}{result.stderr}"
                for result in failed
            )
            log.write_text(f"{compilers.identity}\n\n{text}\n")
            raise BuildError(f"the compiler failed; its log is {log}")
        os.replace(library, target)


def _jobs() -> int:
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(1, int(os.environ.get("MAX_JOBS") or cores))


def _run(command: list[str]) -> subprocess.CompletedProcess:
    start = time.monotonic()
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(
            command, 1, "", f"{error} after {time.monotonic() - start:.0f} s"
        )
