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
    assert {"date", "commit", "torch", "timm", "device"} <= set(found["environment"])
    assert found["parts"]["correctness"] == [{"cases": 4, "of": 4}]
    assert {row["by"] for row in found["parts"]["ops"]} == {"fused", "reference", "eager", "sdpa"}
    assert all(row["ms"] > 0 for part in ("ops", "models") for row in found["parts"][part])


def test_without_a_gpu_the_script_says_that_nothing_was_measured():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run()
    assert done.returncode == 2 and "no CUDA device" in done.stderr and not done.stdout


def test_timms_models_are_named_by_the_attention_that_they_use():
    """timm's Swin is unfused by default; SwinV2 has no fused attention."""
    from benchmarks.model_speed import Family, timm_models

    swin = Family(224, 1, None, "swin_tiny_patch4_window7_224")
    models = timm_models(swin, torch.device("meta"))
    used = {
        name: {m.fused_attn for m in model.modules() if hasattr(m, "fused_attn")}
        for name, model in models.items()
    }
    assert used == {"timm, unfused attention": {False}, "timm, fused attention": {True}}
    v2 = Family(256, 1, None, "swinv2_tiny_window8_256")
    assert list(timm_models(v2, torch.device("meta"))) == ["timm, unfused attention"]
