"""Compiles the kernels' sources into one shared library: the C++ compiler alone gives the CPU
kernels, nvcc in addition the CUDA kernels.

This file and compilers.py use the standard library alone, since setup.py runs where PyTorch may not
be importable. A library is named after the hash of all it is made from; one with another hash is
never loaded. Which files are compiled with which flags: see compilers.py.
"""

import contextlib
import hashlib
import importlib.util
import os
import platform
import re
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .compilers import (
    ARCHITECTURES,
    CXX_FLAGS,
    NVCC_FLAGS,
    BuildError,
    Compilers,
    Unit,
    find_compilers,
    find_units,
    gencode,
    linker_options,
    run,
)

CSRC = Path(__file__).resolve().parents[1] / "window_attention" / "csrc"
OWN_FILES = ("build.py", "compilers.py")  # a change of these is another library
SUFFIXES = {".h", ".inc", ".cpp", ".cu"}
CACHE = "WINDOW_ATTENTION_CACHE"  # environment: the folder for what is built on demand
AHEAD = "80;90;100;120+PTX"  # what a build ahead of time compiles for


def has_cuda_sources(csrc: Path = CSRC) -> bool:
    """Whether the CUDA kernel is part of these sources."""
    return any((csrc / "cuda").glob("launch*.cu"))


def source_hash(kind: str, csrc: Path = CSRC) -> str:
    """16 digits over names and contents of what a library of this kind is made from, the build's
    own files included.

    Raises: BuildError where the sources are not there.
    """
    if not (csrc / "binding.cpp").is_file():
        raise BuildError(f"the sources are not here ({csrc})")
    digest = hashlib.sha256()
    for name in OWN_FILES:
        digest.update(Path(__file__).with_name(name).read_bytes())
    folders = [csrc, csrc / "cpu"]
    if kind.startswith("cuda"):
        folders.append(csrc / "cuda")
    paths = [path for folder in folders for path in folder.glob("*") if path.suffix in SUFFIXES]
    for path in sorted(paths):
        digest.update(f"\0{path.relative_to(csrc).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def library_name(kind: str, csrc: Path = CSRC) -> str:
    """kind: "cpu", or "cuda" with what it was compiled for, as in "cuda-90"."""
    return f"window_attention-{source_hash(kind, csrc)}-{platform.machine()}-{kind}.so"


def cache_folder() -> Path:
    """Where libraries built on demand are stored; may be deleted at any time."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(CACHE) or Path(base) / "window_attention")


def torch_folder() -> Path:
    """The folder of the installed PyTorch, without importing it: it may be installed but not
    importable.

    Raises: BuildError where there is none, or one without headers.
    """
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
        kind: "cpu" or "cuda".
        architectures: as in WINDOW_ATTENTION_CUDA_ARCHS, for "cuda".
        say: called with one line before compiling.
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
    """A lock among processes; where the file system has none, two processes may compile the same,
    which is only slow.
    """
    import fcntl

    with open(path, "w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    with contextlib.suppress(OSError):
        path.unlink()


def _compile(
    kind: str,
    target: Path,
    log: Path,
    csrc: Path,
    compilers: Compilers,
    architectures: str,
    say,
) -> None:
    torch = torch_folder()
    units = find_units(kind, csrc, compilers.cxx)
    if not any(unit.path.suffix == ".cpp" for unit in units):
        raise BuildError(f"there is no CPU kernel for this machine in {csrc}")
    defines = [f"-DWA_HAVE_{unit.path.stem.upper()}=1" for unit in units if unit.tagged]
    units.append(Unit(csrc / "binding.cpp", ["-O2", *_torch_headers(torch)], False))
    compile_cpp = [compilers.cxx, *CXX_FLAGS]
    compile_cuda: list[str] = []
    what, duration = "CPU", "a minute or so"
    if kind == "cuda":
        nvcc = compilers.nvcc or ""
        known = run([nvcc, "--list-gpu-code"]).stdout
        compile_cuda = [nvcc, *NVCC_FLAGS, *gencode(architectures, known), "-ccbin", compilers.cxx]
        defines.append("-DWA_WITH_CUDA=1")
        what, duration = "CPU and CUDA", "some minutes"
    say(
        f"window_attention: compiling the fused kernel ({what}, {len(units)} files, {duration},"
        f" once per machine) into {target.parent}"
    )
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        objects = [str(Path(scratch, f"{number}.o")) for number in range(len(units))]
        commands = []
        for unit, output in zip(units, objects, strict=True):
            command = compile_cuda if unit.path.suffix == ".cu" else compile_cpp
            commands.append([*command, *defines, *unit.flags, "-c", str(unit.path), "-o", output])
        library = str(Path(scratch, "library.so"))
        with ThreadPoolExecutor(_jobs()) as pool:
            results = list(pool.map(run, commands))
        if all(result.returncode == 0 for result in results):
            results.append(run(_link_command(kind, compilers, objects, torch, library)))
        failed = [result for result in results if result.returncode]
        if failed:
            log.write_text(f"{compilers.identity}\n\n{_describe(failed)}\n")
            raise BuildError(f"the compiler failed; its log is {log}")
        os.replace(library, target)


def _torch_headers(torch: Path) -> list[str]:
    include = torch / "include"
    api = include / "torch" / "csrc" / "api" / "include"
    return ["-isystem", str(include), "-isystem", str(api)]


def _link_command(
    kind: str, compilers: Compilers, objects: list[str], torch: Path, library: str
) -> list[str]:
    if kind == "cuda":
        command = [compilers.nvcc, "-ccbin", compilers.cxx, "-shared", "-cudart", "static"]
    else:
        command = [compilers.cxx, "-shared", "-pthread"]
    libraries = [f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    return [*command, *linker_options(kind), *objects, *libraries, "-o", library]


def _describe(failed: list[subprocess.CompletedProcess]) -> str:
    return "\n\n".join(
        f"{' '.join(map(str, result.args))}\n{result.stdout}{result.stderr}" for result in failed
    )


def _jobs() -> int:
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
