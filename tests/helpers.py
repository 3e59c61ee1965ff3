"""What several tests share: golden vectors of the Swin repository, and running main.py as
a user would.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT.parent / "shared" / "golden"


def golden(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """The description and the tensors of a golden vector; the test is skipped where the vectors are
    absent.
    """
    if not GOLDEN.is_dir():
        pytest.skip(
            "the golden vectors are not part of this repository (looked for ../shared/golden)"
        )
    tensors = GOLDEN / f"{name}.safetensors"
    return json.loads((GOLDEN / f"{name}.json").read_text()), (
        load_file(tensors) if tensors.exists() else {}
    )


def golden_names(pattern: str) -> list[str]:
    """Names of the golden vectors that match a glob pattern, or one placeholder name, which
    `golden` then skips.
    """
    return sorted(path.stem for path in GOLDEN.glob(f"{pattern}.json")) or [pattern]


def subtree(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names start with `prefix`/, under the rest of their names."""
    return {
        name[len(prefix) + 1 :]: tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix + "/")
    }


def imported_packages(path: Path) -> set[str]:
    """The top-level packages that a file imports by their full name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def run_main(
    *argv: str,
    env: dict[str, str] | None = None,
    nproc: int = 1,
    timeout: float = 300,
    root: Path = ROOT,
) -> subprocess.CompletedProcess:
    """Runs the main.py of `root`, in that folder, under torchrun where nproc > 1; output as text in
    .stdout and .stderr.
    """
    launcher = (
        [sys.executable, "main.py"]
        if nproc == 1
        else [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={nproc}",
            "main.py",
        ]
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", **(env or {})}
    command = [*launcher, *map(str, argv)]
    return subprocess.run(
        command,
        cwd=root,
        env=environment,
        timeout=timeout,
        text=True,
        capture_output=True,
        check=False,
    )


def copy_project(folder: Path) -> Path:
    """The modules, packages and configurations of the project below `folder`, for a test that adds
    files to it.
    """
    packages = {path.parent.relative_to(ROOT).parts[0] for path in ROOT.glob("*/__init__.py")}
    for name in {"configs", *packages} - {"tests"}:
        ignored = shutil.ignore_patterns("__pycache__", "build")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    return folder
