"""benchmarks/gpu_kernels.py, as far as it goes without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.library import loader

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_kernels.py"


def run(*words):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *words],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.slow
def test_dry_run_on_the_cpu_checks_and_times_and_writes_json(tmp_path):
    path, reason = loader.load(quiet=True)
    if path is None:
        pytest.skip(f"no CPU kernel: {reason}")
    done = run(
        "--device", "cpu", "--quick", "--rounds", "1", "--json", str(tmp_path / "found.json")
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert {"date", "commit", "torch", "device"} <= set(found["environment"])
    assert found["parts"]["correctness"] == [{"cases": 4, "of": 4}]
    assert {row["by"] for row in found["parts"]["ops"]} == {"fused", "reference", "eager", "sdpa"}
    assert all(row["ms"] > 0 for part in ("ops", "models") for row in found["parts"][part])


def test_without_a_gpu_the_script_says_that_nothing_was_measured():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run()
    assert done.returncode == 2 and "no CUDA device" in done.stderr and not done.stdout
