"""On what a benchmark ran: hardware, versions, date and commit, for the figures it leaves."""

import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def environment(device: str = "cpu", *packages) -> dict:
    """As a dictionary of plain values; packages: modules whose version counts.

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
        "torch": torch.__version__,
        **{package.__name__: package.__version__ for package in packages},
        "python": platform.python_version(),
        "processor": processor(),
        "cores": os.cpu_count(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        return found | {
            "CUDA": torch.version.cuda,
            "device": properties.name,
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


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
