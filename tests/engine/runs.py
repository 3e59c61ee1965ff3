"""Short trainings in processes of their own, and comparing what they leave behind."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

from tests.helpers import ROOT

SHORT = {
    "TRAIN.EPOCHS": 2,
    "TRAIN.WARMUP_EPOCHS": 1,
    "TRAIN.SAVE_STEPS": 3,
    "MODEL.DROP_PATH_RATE": 0.2,
    "MODEL.DROP_RATE": 0.1,
    "MODEL.EMA.ENABLE": True,
    "MODEL.EMA.DECAY": 0.9,
    "AUG.MIXUP": 0.8,
    "AUG.CUTMIX": 1.0,
    "AUG.REPROB": 0.25,
    "DATA.NUM_WORKERS": 2,
    "SAVE_FREQ": 1,
    "PRINT_FREQ": 4,
    "LOG.TENSORBOARD": False,
    "LOG.PLOT": False,
    "DEVICE": "cpu",
}


def arguments(output: Path, **settings) -> list[str]:
    """Arguments of main.py for a short digits run; settings as KEY__SUBKEY=value."""
    chosen = SHORT | {key.replace("__", "."): value for key, value in settings.items()}
    pairs = [str(word) for pair in chosen.items() for word in pair]
    return ["--cfg", "configs/digits/digits_tiny.yaml", "--output", str(output), "--opts", *pairs]


def run(
    script: str, *argv: str, nproc: int = 1, restarts: int = 0, timeout: float = 240
) -> subprocess.CompletedProcess:
    """Runs a Python file of this repository, under torchrun where nproc > 1, in a process group of
    its own.
    """
    launcher = [sys.executable]
    if nproc > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += [f"--nproc-per-node={nproc}", f"--max-restarts={restarts}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    with subprocess.Popen(
        [*launcher, script, *map(str, argv)],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def train(output: Path, nproc: int = 1, **settings) -> Path:
    """A training that must succeed; returns its folder."""
    done = run("main.py", *arguments(output, **settings), nproc=nproc)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder(output)


def folder(output: Path) -> Path:
    """Where a short run puts its files."""
    return output / "digits_tiny" / "default"


def checkpoint(run_folder: Path, name: str = "last.pth") -> dict:
    """A checkpoint, read as a user would: weights_only."""
    return torch.load(run_folder / name, weights_only=True)


def differences(a, b, path: str = "") -> list[str]:
    """Where two nested structures of tensors and plain data differ by as much as a bit."""
    if isinstance(a, torch.Tensor):
        same = isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        return [] if same else [path]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [line for key in a for line in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [
            line
            for index, (x, y) in enumerate(zip(a, b, strict=True))
            for line in differences(x, y, f"{path}/{index}")
        ]
    return [] if a == b else [path]


def metrics(run_folder: Path) -> list[dict]:
    """The entries of metrics.jsonl."""
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(one: Path, other: Path) -> None:
    """Both runs left the same checkpoint, bit by bit (model, average, optimizer, random states,
    position), and the same metrics.
    """
    ours, theirs = checkpoint(one), checkpoint(other)
    for payload in (ours, theirs):
        del payload["config"]["OUTPUT"]
    assert differences(ours, theirs) == []
    assert metrics(one) == metrics(other)
