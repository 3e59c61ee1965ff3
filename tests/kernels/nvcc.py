"""Compiles the CUDA kernels for an architecture without a GPU, and reads what came of it:
registers, spills, shared memory, instructions.

    python -m tests.kernels.nvcc    writes csrc/cuda/budgets.json, the limits of test_nvcc_budget.py
"""

import concurrent.futures
import fcntl
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

from tests.kernels.emulated import CSRC, cache_folder

ARCHITECTURES = (80, 86, 90, 100, 120)
BUDGETS = CSRC / "cuda" / "budgets.json"
FLAGS = [
    "-std=c++17",
    "-O3",
    "-Werror",
    "all-warnings",
    "-Xptxas",
    "-v",
    "-Xptxas",
    "--warn-on-spills",
    "-cubin",
]
SECONDS = 900  # one file for one architecture takes up to two minutes on a busy machine


def sources() -> list[Path]:
    """All .cu files of the product."""
    return sorted((CSRC / "cuda").glob("*.cu"))


def tool(name: str) -> str | None:
    """Path of nvcc, cuobjdump or nvdisasm: from PATH, CUDA_HOME, or (the last two) from beside
    Triton.
    """
    folders = [
        os.path.join(os.environ[home], "bin")
        for home in ("CUDA_HOME", "CUDA_PATH")
        if home in os.environ
    ] + ["/usr/local/cuda/bin"]
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        folders.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


def compile_for(source: Path, architecture: int) -> tuple[Path, str]:
    """(cubin, what ptxas said) of one file, compiled unless the same sources with the same flags
    were before.

    Raises: subprocess.CalledProcessError, the compiler's words in `stdout`; FileNotFoundError
        without nvcc.
    """
    nvcc = tool("nvcc")
    if nvcc is None:
        raise FileNotFoundError("no nvcc")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256(repr((version, FLAGS, architecture)).encode())
    for path in [source, *included_by(source)]:
        digest.update(path.name.encode() + path.read_bytes())
    cubin = cache_folder() / f"{source.stem}-sm_{architecture}-{digest.hexdigest()[:20]}.cubin"
    log = cubin.with_suffix(".log")
    with open(cubin.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not cubin.exists():
            command = [
                nvcc,
                *FLAGS,
                f"-arch=sm_{architecture}",
                str(source),
                "-o",
                str(cubin.with_suffix(".new")),
            ]
            done = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=SECONDS,
                check=True,
            )
            log.write_text(done.stdout)
            cubin.with_suffix(".new").rename(cubin)
    return cubin, log.read_text()


def included_by(source: Path) -> list[Path]:
    """The headers of csrc that a file includes, directly or not (those of the emulator left
    out).
    """
    found: list[Path] = []
    waiting = [source]
    while waiting:
        path = waiting.pop()
        for name in re.findall(r'^\s*#include "(.*?)"', path.read_text(), re.M):
            header = (path.parent / name).resolve()
            if header.exists() and "emulator" not in header.parts and header not in found:
                found.append(header)
                waiting.append(header)
    return sorted(found)


@functools.cache
def readable(symbol: str) -> str:
    """A kernel's name with its template arguments, as in "tiled::key_kernel<bf16, 32, 0>"."""
    demangler = shutil.which("c++filt")
    name = (
        subprocess.run(
            [demangler, symbol], capture_output=True, text=True, check=True
        ).stdout.strip()
        if demangler
        else symbol
    )
    name = re.sub(r"^void |\((?!anonymous).*\)$", "", name)
    return (
        name.replace("__nv_bfloat16", "bf16")
        .replace("__half", "f16")
        .replace("(anonymous namespace)::", "")
    )


def resources(log: str) -> dict[str, dict[str, int]]:
    """Of each kernel: registers, stack and spilled bytes, static shared memory."""
    patterns = {
        "registers": r"Used (\d+) registers",
        "stack": r"(\d+) bytes stack frame",
        "spill_stores": r"(\d+) bytes spill stores",
        "spill_loads": r"(\d+) bytes spill loads",
        "shared": r"(\d+) bytes smem",
    }
    found = {}
    for entry in log.split("Compiling entry function '")[1:]:
        matches = {what: re.search(pattern, entry) for what, pattern in patterns.items()}
        found[readable(entry.partition("'")[0])] = {
            what: int(match.group(1)) if match else 0 for what, match in matches.items()
        }
    return found


def instructions(cubin: Path) -> dict[str, Counter] | None:
    """Of each kernel: how often each machine instruction stands in it, with its modifiers; None
    without cuobjdump and nvdisasm.
    """
    cuobjdump, nvdisasm = tool("cuobjdump"), tool("nvdisasm")
    if cuobjdump is None or nvdisasm is None:
        return None
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(nvdisasm).parent), os.environ.get("PATH", "")]),
    }
    text = subprocess.run(
        [cuobjdump, "-sass", str(cubin)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    ).stdout
    found = {}
    for function in text.split("Function : ")[1:]:
        symbol = function.partition("\n")[0].strip()
        found[readable(symbol)] = Counter(
            re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_.]*)", function, re.M)
        )
    return found


def measure(architecture: int) -> dict[str, dict[str, int]]:
    """Resources of all kernels for an architecture."""
    found = {}
    for source in sources():
        found.update(resources(compile_for(source, architecture)[1]))
    return found


def write_budgets() -> None:
    """Writes what the kernels need now, the most over the architectures, as their budgets."""
    pairs = [(source, architecture) for source in sources() for architecture in ARCHITECTURES]
    budgets: dict[str, dict[str, int]] = {}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for (source, architecture), compiled in zip(
            pairs, [pool.submit(compile_for, *pair) for pair in pairs], strict=True
        ):
            try:
                found = resources(compiled.result()[1])
            except subprocess.CalledProcessError as error:
                print(f"{source.name} for sm_{architecture} has no budget:\n{error.stdout[-1000:]}")
                continue
            for name, used in found.items():
                budget = budgets.setdefault(name, {"registers": 0, "shared": 0})
                budgets[name] = {what: max(most, used[what]) for what, most in budget.items()}
    lines = ",\n".join(
        f"  {json.dumps(name)}: {json.dumps(budgets[name])}" for name in sorted(budgets)
    )
    BUDGETS.write_text("{\n" + lines + "\n}\n")
    print(
        f"{BUDGETS.name}: {len(budgets)} kernels, at most"
        f" {max(b['registers'] for b in budgets.values())} registers"
    )


if __name__ == "__main__":
    write_budgets()
