"""Loading processes must not outlive the program, nor keep it from ending."""

import multiprocessing
import os
import signal
import time

import pytest
import torch
from numpy.random import default_rng
from PIL import Image

import main
from config import load_config
from data import build_data
from engine.trainer import Trainer
from tests.helpers import ROOT, run_main

OPTIONS = [
    "DATA.DATASET",
    "folder",
    "DATA.IMG_SIZE",
    "32",
    "DATA.NUM_WORKERS",
    "2",
    "MODEL.SWIN.EMBED_DIM",
    "24",
    "TRAIN.WARMUP_EPOCHS",
    "0",
]
CONFIG = "configs/swin/swin_tiny_patch4_window7_224.yaml"


@pytest.fixture
def images(tmp_path):
    random = default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(random.integers(0, 255, (40, 50, 3), dtype="uint8")).save(
                    folder / f"{number}.jpg"
                )
    return tmp_path / "images"


def test_a_run_with_loading_processes_and_image_files_ends(images, tmp_path):
    """Workers start with SIGTERM blocked, so the interpreter's own request to end at exit would
    wait for them for ever.
    """
    run = run_main(
        "--cfg",
        CONFIG,
        "--data-path",
        images,
        "--batch-size",
        4,
        "--epochs",
        1,
        "--output",
        tmp_path / "output",
        "--opts",
        *OPTIONS,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr


def test_closing_the_data_ends_every_loading_process_even_one_that_ignores_sigterm(images):
    data = build_data(
        load_config(
            ROOT / CONFIG, ["DATA.DATA_PATH", str(images), "DATA.BATCH_SIZE", "4", *OPTIONS]
        )
    )
    batches = data.train_loader.epoch(0), iter(data.val_loader)
    for loader in batches:
        next(loader)
    assert len(multiprocessing.active_children()) == 4
    data.close()
    deadline = time.monotonic() + 20
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not multiprocessing.active_children()
    assert len(list(data.train_loader.epoch(1))) == 4  # and it can be used again
    data.close()


@pytest.mark.slow
def test_worker_killed_in_a_run_is_one_line_and_the_run_goes_on_from_there(
    images, tmp_path, monkeypatch, capsys
):
    update = Trainer.update

    def kill_after(trainer, batches):
        update(trainer, batches)
        if trainer.state.update == 1:
            for process in multiprocessing.active_children():
                os.kill(process.pid, signal.SIGKILL)

    arguments = ["--cfg", ROOT / CONFIG, "--data-path", images, "--batch-size", 4, "--epochs", 1]
    arguments += ["--output", tmp_path / "output", "--device", "cpu", "--opts", *OPTIONS]
    arguments = list(map(str, arguments))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", kill_after)
        assert main.main(arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith("main.py: error: a data worker died") and told.count("\n") == 1
    last = next((tmp_path / "output").rglob("last.pth"))
    assert torch.load(last)["progress"]["update"] in (2, 3)  # a batch may have been on its way
    assert main.main(arguments) == 0
    assert torch.load(last)["progress"]["update"] == 4
