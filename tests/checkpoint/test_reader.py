"""One reader for every kind of file: it says what a file is, and reads it once."""

import argparse
import builtins
import io
import os

import pytest
import torch

from checkpoint import (
    FORMAT,
    SWIN,
    TRAINING,
    CheckpointError,
    peek_checkpoint,
    read_checkpoint,
    read_weights,
    save_weights,
)
from checkpoint.archive import CheckedArchive
from engine.state import CheckpointFolder
from tests.checkpoint.states import changed, training_state
from tests.engine.runs import differences

STATE = {"head.weight": torch.ones(2, 3), "head.bias": torch.zeros(2)}


def swin_state(**more):
    """What the Swin repository saves."""
    return {
        "model": STATE,
        "optimizer": {"state": {}, "param_groups": [{"params": [0, 1], "lr": 0.1}]},
        "lr_scheduler": {"t": 1},
        "max_accuracy": 81.2,
        "scaler": {"scale": 2.0},
        "epoch": 7,
        **more,
    }


def frozen_config():
    from yacs.config import CfgNode

    config = CfgNode({"MODEL": CfgNode({"TYPE": "swin"})})
    config.freeze()
    return config


def saved(path, content):
    torch.save(content, path)
    return path


@pytest.mark.parametrize("average", [True, False])
def test_a_training_state_of_this_program_says_so(tmp_path, average):
    CheckpointFolder(tmp_path).save(training_state(ema=average))
    for read in (read_checkpoint, peek_checkpoint):
        checkpoint = read(tmp_path / "last.pth")
        assert checkpoint.kind == TRAINING and checkpoint.has_average == average
        assert checkpoint.training_state()["format"] == FORMAT


@pytest.mark.parametrize(
    "more",
    [{}, {"config": frozen_config()}, {"args": argparse.Namespace(lr=0.1)}],
    ids=["bare", "yacs", "argparse"],
)
def test_a_training_state_of_swin_says_so_whatever_class_its_settings_have(tmp_path, more):
    checkpoint = read_checkpoint(saved(tmp_path / "a.pth", swin_state(**more)))
    assert checkpoint.kind == SWIN and checkpoint.swin_state()["epoch"] == 7
    assert checkpoint.weights().keys() == STATE.keys() and not checkpoint.has_average
    with pytest.raises(CheckpointError, match="no training state of this program"):
        checkpoint.training_state()


@pytest.mark.parametrize(
    "place, value, says",
    [
        ("epoch", "7", "epoch is '7', expected a whole number"),
        ("max_accuracy", "high", "max_accuracy is 'high'"),
        ("scaler", 1, "scaler is 1"),
        ("optimizer", [], "optimizer is a list of 0"),
        ("optimizer.param_groups", {}, "optimizer.param_groups is a dict of 0"),
        ("optimizer.param_groups.0.params", [1, 2], "do not number their params"),
        ("optimizer.state.5", {}, r"optimizer.state\[5\] is of no parameter"),
    ],
)
def test_swins_training_states_are_checked_too(tmp_path, place, value, says):
    path = saved(tmp_path / "a.pth", changed(swin_state(), place, value))
    with pytest.raises(CheckpointError, match=rf"a\.pth: .*{says}"):
        read_checkpoint(path).swin_state()


def test_swins_training_state_without_its_moments_is_refused(tmp_path):
    emptied = {"state": {}, "param_groups": [{"params": [0, 1], "betas": (0.9, 0.999)}]}
    torch.save(swin_state(optimizer=emptied), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="optimizer.state is empty after 8 epochs"):
        read_checkpoint(tmp_path / "a.pth").swin_state()


@pytest.mark.parametrize(
    "content", [STATE, {"model": STATE}, {"model": STATE, "epoch": 3}], ids=str
)
def test_weights_are_neither(tmp_path, content):
    checkpoint = read_checkpoint(saved(tmp_path / "a.pth", content))
    assert checkpoint.kind not in (TRAINING, SWIN) and not checkpoint.has_average
    assert differences(dict(checkpoint.weights()), STATE) == []
    with pytest.raises(CheckpointError, match="a.pth holds no training state .*--pretrained"):
        checkpoint.training_state()
    assert read_checkpoint(save_weights(tmp_path / "a.safetensors", STATE)).kind == checkpoint.kind


def test_the_average_is_never_taken_for_the_missing_weights(tmp_path):
    CheckpointFolder(tmp_path).save(changed(training_state(ema=True), "model"))
    checkpoint = read_checkpoint(tmp_path / "last.pth")
    assert checkpoint.weights("ema").keys() == {"w", "b"}
    with pytest.raises(CheckpointError, match="no entry 'model'"):
        checkpoint.weights()


def test_the_home_folder_is_spelt_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    CheckpointFolder(tmp_path).save(training_state(ema=True))
    assert read_checkpoint("~/last.pth").path == tmp_path / "last.pth"
    assert peek_checkpoint("~/last.pth").has_average
    assert read_weights("~/last.pth").keys() == {"w", "b"}


def test_a_file_that_may_not_be_opened_is_one_line(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    path = saved(tmp_path / "a.pth", STATE)
    monkeypatch.setattr(builtins, "open", refuse)
    with pytest.raises(CheckpointError, match="a.pth cannot be read: Permission denied"):
        read_checkpoint(path)


class Counted(io.BytesIO):
    """A file that counts the bytes read from it."""

    def __init__(self, content):
        super().__init__(content)
        self.count = 0

    def readinto(self, buffer):
        self.count += len(buffer)
        return super().readinto(buffer)

    def read(self, size=-1):
        content = super().read(size)
        self.count += len(content)
        return content


def test_checksums_are_formed_in_the_one_pass_that_reads_the_tensors(tmp_path):
    path = saved(tmp_path / "a.pth", {"a": torch.randn(500, 500), "b": torch.randn(300, 300)})
    file = Counted(path.read_bytes())
    archive = CheckedArchive(path, file)
    torch.load(archive, weights_only=True)
    archive.check_rest()
    assert all(archive.whole.values()) and len(archive.whole) == len(archive.records)
    assert file.count < 1.02 * os.path.getsize(path)


def test_a_compressed_archive_is_checked_too(tmp_path):
    import zipfile

    path = saved(tmp_path / "a.pth", STATE)
    with zipfile.ZipFile(path) as stored, zipfile.ZipFile(tmp_path / "b.pth", "w") as packed:
        for record in stored.infolist():
            packed.writestr(record.filename, stored.read(record), zipfile.ZIP_DEFLATED)
    assert differences(dict(read_weights(tmp_path / "b.pth")), STATE) == []


def test_a_file_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(tmp_path / "a.pth", STATE)
    finally:
        torch.serialization.set_crc32_options(True)
    assert differences(dict(read_weights(path)), STATE) == []


def test_a_path_that_the_system_refuses_is_one_line():
    with pytest.raises(CheckpointError, match="cannot be read: File name too long"):
        read_checkpoint("/" + "a" * 5000)
