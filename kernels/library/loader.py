"""The compiled library: installed beforehand, stored by an earlier build, or built now; or the
reason why there is none.
"""

import importlib.util
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from . import build
from .compilers import BuildError

BUILD = "WINDOW_ATTENTION_BUILD"  # environment: 0 = never compile on demand
INSTALLED = (  # the package that `pip install ./kernels` makes; it holds the library alone
    "window_attention_kernels"
)
OLDEST = (8, 0)  # compute capability that the CUDA kernel needs
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # that the kernels are compiled for

_lock = threading.RLock()
_loaded: Path | None = None
_reason: str | None = None  # set once loading has failed
_after_loading: list[Callable[[], None]] = []


def after_loading(register: Callable[[], None]) -> Callable[[], None]:
    """Decorator: calls `register` once, as soon as the library that defines the operations is
    loaded.
    """
    with _lock:
        _after_loading.append(register)
        if _loaded is not None:
            register()
    return register


def missing(device: str) -> str | None:
    """Why there is no kernel for tensors on `device` ("cpu", "cuda", "cuda:1"), or None if there is
    one, which is then loaded.

    The first call may compile (see build.py): one line on stderr says so, and one line says so if
    that fails; nothing is raised.
    """
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda"):
        return f"there is no kernel for {device}"
    number = int(index) if index else None
    if kind == "cuda" and device_reason(number):
        return device_reason(number)
    path, reason = load()
    if path is None:
        return reason
    if kind == "cuda" and "-cuda" not in path.name:
        return "the library was built without CUDA (no nvcc)"
    return None


def load(quiet: bool = False) -> tuple[Path | None, str | None]:
    """The library, loaded into PyTorch, or the reason why there is none, which is also printed
    unless `quiet` or by choice.

    The answer stays the same for the life of the process.
    """
    global _loaded, _reason
    with _lock:
        if _loaded is None and _reason is None:
            path, _reason = find()
            if path is not None:
                try:
                    torch.ops.load_library(str(path))
                    for register in _after_loading:
                        register()
                    _loaded = path
                except OSError as error:  # made for another PyTorch or system
                    _reason = f"{path} cannot be loaded ({str(error).splitlines()[0]})"
            if _reason and not quiet and not _off():
                say(
                    f"window_attention: no fused kernel, since {_reason}; PyTorch's own operations"
                    " are used (same results, slower)"
                )
    return _loaded, _reason


def find(csrc: Path = build.CSRC) -> tuple[Path | None, str | None]:
    """The library for this machine: with CUDA where a device is here, its sources are and nvcc or a
    built library is; else for the CPU.
    """
    cuda = device_reason() is None and build.has_cuda_sources(csrc)
    try:
        installed = _installed(csrc)
    except BuildError as error:  # no sources
        return None, str(error)
    with_cuda = [path for path in installed if "-cuda" in path.name]
    if with_cuda or (installed and not cuda):
        return (with_cuda or installed)[0], None
    path, reason = _on_demand("cuda", csrc) if cuda else (None, None)
    if path is None and installed:
        return installed[0], None
    if path is None:
        path, reason = _on_demand("cpu", csrc)
    return path, reason


def device_reason(index: int | None = None) -> str | None:
    """Why the CUDA kernel cannot run on the device of this number (by default the current one), or
    None.
    """
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "there is no CUDA device"
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST:
        return "the device has compute capability {}.{}, and {}.{} is needed".format(
            *capability, *OLDEST
        )
    return None


def _installed(csrc: Path) -> list[Path]:
    """What `pip install ./kernels` left here and is made from these very sources."""
    spec = importlib.util.find_spec(INSTALLED)
    found = sorted(Path(spec.origin).parent.glob("*.so")) if spec and spec.origin else []
    current = []
    for path in found:
        kind = path.stem.split("-", 3)[-1]
        if path.name == build.library_name(kind, csrc):
            current.append(path)
    if found and not current:
        say(
            f"window_attention: the installed {INSTALLED} is of other sources and not used; `pip"
            " install ./kernels` renews it"
        )
    return current


def _on_demand(kind: str, csrc: Path) -> tuple[Path | None, str | None]:
    """A library of this kind from the cache, or built into it."""
    architectures = ";".join(map(str, _capabilities())) + "+PTX" if kind == "cuda" else None
    folder = build.cache_folder()
    try:
        if not _off():
            return build.build(kind, folder, csrc, architectures, say), None
        built = sorted(folder.glob(build.library_name(f"{kind}*", csrc)))
    except BuildError as error:
        if kind == "cuda":  # the library for the CPU follows
            say(f"window_attention: no fused kernel for CUDA, since {error}")
        return None, str(error)
    if built:
        return built[0], None
    return None, f"it is not built, and {BUILD} is off; `make kernels` builds it"


def _off() -> bool:
    return os.environ.get(BUILD, "1") in ("0", "off", "no", "false")


def _capabilities() -> list[int]:
    found = {
        torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())
    }
    return sorted(10 * major + minor for major, minor in found if (major, minor) >= OLDEST)


def say(line: str) -> None:
    """One line on stderr, from the first process of a machine alone."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)
