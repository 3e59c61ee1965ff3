"""Faults of checkpoints and weights files, one test each, named after it."""

import logging
import os
import shutil

import pytest
import torch

from checkpoint import load_weights, map_22k_to_1k
from engine.resume import newest
from engine.state import CheckpointFolder
from models import VisionTransformer
from tests.checkpoint.states import training_state
from tests.wiring.runs import PLACE, run


@pytest.fixture
def saved(tmp_path):
    """A folder whose last checkpoint, of 9 updates, has a predecessor of 5."""
    folder = CheckpointFolder(tmp_path)
    folder.save(training_state(update=5))
    folder.keep_epoch(0)
    folder.save(training_state(update=9))
    return tmp_path


def updates(folder) -> int:
    return newest(folder).content["progress"]["update"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run; not to be written to."""
    folder = tmp_path_factory.mktemp("trained")
    assert run(folder)["status"] == [0]
    return folder / PLACE


@pytest.mark.parametrize("kept", [0, 0.5, 0.99, -16])
def test_truncated_checkpoint(saved, caplog, kept):
    data = (saved / "last.pth").read_bytes()
    length = kept if kept < 0 else int(kept * len(data))
    (saved / "last.pth").write_bytes(data[:length])
    assert updates(saved) == 5
    assert "last.pth" in caplog.text and caplog.records[0].levelno == logging.WARNING


def test_flipped_bit_in_a_checkpoint(saved, caplog):
    data = bytearray((saved / "last.pth").read_bytes())
    data[len(data) // 2] ^= 16
    (saved / "last.pth").write_bytes(data)
    assert updates(saved) == 5 and "checksum" in caplog.text


def test_newest_by_date_is_not_the_furthest(saved):
    os.utime(saved / "ckpt_epoch_0.pth", (4e9, 4e9))
    os.utime(saved / "last.pth", (1e9, 1e9))
    assert updates(saved) == 9


class Touch:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("flag", ["MODEL.RESUME", "MODEL.PRETRAINED"])
def test_malicious_pickle(tmp_path, flag):
    torch.save({"model": {"w": torch.ones(1)}, "x": Touch(tmp_path / "run")}, tmp_path / "a.pth")
    left = run(tmp_path, {flag: tmp_path / "a.pth"})
    assert left["status"] == [2] and "could run code" in left["errors"]
    assert left["errors"].count("\n") == 1 and not (tmp_path / "run").exists()


def test_old_checkpoint_with_a_pickled_config(trained, tmp_path):
    from yacs.config import CfgNode

    model = torch.load(trained / "last.pth", weights_only=True)["model"]
    config = CfgNode({"MODEL": CfgNode({"TYPE": "swin"})})
    torch.save({"model": model, "config": config, "epoch": 7}, tmp_path / "old.pth")
    left = run(tmp_path, {"MODEL.PRETRAINED": tmp_path / "old.pth"})
    assert left["status"] == [0], left["errors"]


@pytest.mark.parametrize("flag", ["MODEL.RESUME", "MODEL.PRETRAINED"])
@pytest.mark.parametrize("evaluate", [True, False])
def test_missing_and_unexpected_keys(trained, tmp_path, flag, evaluate):
    model = torch.load(trained / "last.pth", weights_only=True)["model"]
    model["norm.weigth"] = model.pop("norm.weight")
    torch.save({"model": model}, tmp_path / "a.pth")
    left = run(tmp_path, {flag: tmp_path / "a.pth", "EVAL_MODE": evaluate})
    assert left["status"] == [2] and left["errors"].count("\n") == 1
    assert "missing or of another shape: norm.weight;" in left["errors"]
    assert "unexpected: norm.weigth;" in left["errors"]


def test_head_of_another_class_count(trained, tmp_path):
    saved = torch.load(trained / "last.pth", weights_only=True)["model"]
    saved |= {"head.weight": torch.ones(3, 8), "head.bias": torch.ones(3)}
    torch.save(saved, tmp_path / "three.pth")
    left = run(tmp_path, {"MODEL.PRETRAINED": tmp_path / "three.pth"}, numbers=True)
    said = "the file's head has 3 classes, the model 10: the head starts at zero"
    assert left["status"] == [0] and any(said in line for line in left["log"])
    shutil.rmtree(tmp_path / "output")
    left = run(tmp_path, {"MODEL.PRETRAINED": tmp_path / "three.pth", "EVAL_MODE": True})
    assert left["status"] == [2] and "evaluate it on the data set" in left["errors"]


def test_head_of_imagenet_22k_is_mapped_to_1k():
    model = VisionTransformer(8, 4, 3, 1000, 8, 1, 2)
    rows = torch.arange(21841.0)
    state = model.state_dict() | {"head.weight": rows[:, None].expand(-1, 8), "head.bias": rows}
    report = load_weights(model, state)
    assert "was mapped to the 1000 of ImageNet-1k" in report.text
    assert torch.equal(model.head.bias.detach(), torch.tensor(map_22k_to_1k()).float())
