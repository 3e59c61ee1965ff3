"""On what a benchmark ran: hardware, versions, date and commit, for the figures it leaves."""

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


PACKAGES = ("torch", "torchvision", "timm", "triton", "numpy")


def environment(device: str = "cpu") -> dict:
    """As a dictionary of plain values; of packages the installed version.

    The commit is that of the environment variable BENCHMARK_COMMIT where it is set, as for code
    copied without its repository.
    """

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip()

    now = datetime.datetime.now(datetime.timezone.utc)
    found = {
        "date": now.isoformat(timespec="seconds"),
        "commit": os.environ.get("BENCHMARK_COMMIT") or git("rev-parse", "HEAD"),
        "uncommitted files": len(git("status", "--porcelain").splitlines()),
        **{name: version(name) for name in PACKAGES},
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor(),
        "cores": os.cpu_count(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        return found | {
            "CUDA": torch.version.cuda,
            "device": properties.name,
            "driver": driver(),
            "multiprocessors": properties.multi_processor_count,
            "memory GiB": properties.total_memory >> 30,
            "capability": list(torch.cuda.get_device_capability()),
        }
    return found | {
        "device": "CPU",
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "multiplies bfloat16": (
            torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        ),
    }


def version(package: str) -> str:
    """The installed version, or that there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def driver() -> str:
    """The version of the GPU's driver, as its own tool says it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return (done.stdout.strip().splitlines() or ["unknown"])[0]


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
