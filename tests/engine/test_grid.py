"""Every combination of QK residual, CRPW and pre-MLP on Swin and SwinV2, and every other modifier's
digits YAML, trains from its YAML, on one process and on two.
"""

import pytest
import torch

import main as program
from checkpoint import read_checkpoint
from tests.engine.runs import run
from tests.helpers import ROOT

GRID = sorted(
    path.relative_to(ROOT) for path in (ROOT / "configs" / "digits").glob("digits_swin*.yaml")
)
OTHERS = ["efficient_additive", "elm", "gmm", "re_attention", "refiner", "talking_heads"]
OPTIONS = [
    "TRAIN.MAX_STEPS",
    "2",
    "DATA.NUM_WORKERS",
    "0",
    "LOG.TENSORBOARD",
    "False",
    "LOG.PLOT",
    "False",
    "DEVICE",
    "cpu",
]


def test_the_grid_is_complete():
    parts = [
        f"digits_{family}{qk}{crpw}{mlp}"
        for family in ("swin", "swinv2")
        for qk in ("", "_qkres")
        for crpw in ("", "_crpw")
        for mlp in ("", "_premlp")
    ]
    assert sorted(path.stem for path in GRID) == sorted(
        parts + [f"digits_swin_{name}" for name in OTHERS]
    )


@pytest.mark.parametrize("path", GRID, ids=lambda path: path.stem)
def test_a_configuration_trains_and_resumes(path, tmp_path):
    argv = ["--cfg", str(ROOT / path), "--output", str(tmp_path), "--opts", *OPTIONS]
    assert program.main(argv) == 0
    assert program.main([*argv, "TRAIN.MAX_STEPS", "3"]) == 0
    payload = read_checkpoint(tmp_path / path.stem / "default" / "last.pth").content
    assert payload["progress"]["update"] == 3
    assert all(torch.isfinite(tensor).all() for tensor in payload["model"].values())


@pytest.mark.slow
def test_all_configurations_train_on_two_processes(tmp_path):
    done = run(
        "tests/engine/two_ranks_grid.py", str(tmp_path), *OPTIONS, "--", *map(str, GRID), nproc=2
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("TRAINED") == len(GRID) == 16 + len(OTHERS)
