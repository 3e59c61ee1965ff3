"""A run killed at any write is completed by the same command, and what it names is there."""

import errno
import itertools
import os
import shutil

import pytest
from safetensors import safe_open

from checkpoint import read_checkpoint
from engine.repair import repair
from engine.resume import newest
from engine.state import CheckpointFolder
from tests.engine.runs import differences
from tests.engine.small import Loader, evaluation, make_trainer, run_fit
from utils import RunError

OPTIONS = {"ema": True, "mix": True}
SCORES = (10.0, 30.0, 20.0, 30.0)  # of the average; the second epoch is the best


class Killed(BaseException):
    """Ends a run as a kill would, in the middle of a write."""


def killed_at(monkeypatch, number: int, before: bool) -> None:
    """The next files take their names, but the one of this number: there the run ends, before it
    does or after.
    """
    count, replace = itertools.count(), os.replace

    def replacing(source, target):
        last = next(count) == number
        if not (last and before):
            replace(source, target)
        if last:
            raise Killed

    monkeypatch.setattr("utils.os.replace", replacing)


def start(folder, epochs: int = 4, **plan):
    """What a start of the command does: goes on from the folder's checkpoint, or begins."""
    trainer = make_trainer(**OPTIONS)
    checkpoint = newest(folder)
    if checkpoint:
        trainer.restore(checkpoint.training_state())
        repair(CheckpointFolder(folder), checkpoint, trainer.state, epochs, averaged=True)

    def validate(model):
        return evaluation(SCORES[trainer.state.epoch] if model is trainer.leader else 0.0)

    run_fit(trainer, Loader(2), epochs, folder, validate, **plan)
    return trainer


def contents(folder) -> dict:
    """What all files of a run say."""
    found = {}
    for path in folder.iterdir():
        if path.suffix == ".pth":
            found[path.name] = read_checkpoint(path).content
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                weights = {name: file.get_tensor(name).clone() for name in file.keys()}
                found[path.name] = [weights, file.metadata()]
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    start(folder, epochs=2)
    return folder


@pytest.mark.parametrize("before", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_write_and_started_again_leaves_the_same_files(
    whole, tmp_path, monkeypatch, before
):
    for number in itertools.count():
        folder = tmp_path / str(number)
        folder.mkdir()
        with monkeypatch.context() as patch:
            killed_at(patch, number, before)
            try:
                start(folder, epochs=2)
            except Killed:
                pass
            else:
                break
        start(folder, epochs=2)
        assert differences(contents(folder), contents(whole)) == [], number
    # of each epoch: two saves, its own checkpoint, the best one and its weights
    assert number == 2 * (2 + 1 + 2)


@pytest.mark.slow
def test_a_disk_that_fills_up_at_any_write_loses_no_epoch(whole, tmp_path, monkeypatch):
    for number in itertools.count():
        folder = tmp_path / str(number)
        folder.mkdir()
        count, sync = itertools.count(), os.fsync

        def full(handle, count=count, number=number, sync=sync):
            if next(count) == 2 * number:  # each file, then its folder
                raise OSError(errno.ENOSPC, "No space left on device")
            sync(handle)

        with monkeypatch.context() as patch:
            patch.setattr("utils.os.fsync", full)
            try:
                start(folder, epochs=2)
            except RunError as error:
                assert "No space left on device (free on that disk:" in str(error)
                assert not [path for path in folder.iterdir() if path.name.startswith(".")]
            else:
                break
        checkpoint = newest(folder)
        done = checkpoint.training_state()["progress"]["update"] if checkpoint else 0
        assert done == (0 if number == 0 else 2 if number < 6 else 4)
        start(folder, epochs=2)
        assert differences(contents(folder), contents(whole)) == [], number
    assert number == 10


@pytest.mark.parametrize("epochs", [2, 4], ids=["the last is the best", "an earlier one is"])
@pytest.mark.parametrize("missing", ["best.pth", "model.safetensors", "ckpt_epoch_{}.pth"])
def test_what_is_missing_is_written_again(tmp_path, missing, epochs, caplog):
    start(tmp_path, epochs)
    before = contents(tmp_path)
    name = missing.format(epochs - 1)
    (tmp_path / name).unlink()
    start(tmp_path, epochs)
    assert differences(contents(tmp_path), before) == [] and name in caplog.text
    assert all(path.exists() for path in (tmp_path / "last.pth", tmp_path / name))


def test_a_best_checkpoint_of_an_older_epoch_is_replaced(tmp_path):
    start(tmp_path, epochs=1)
    for name in ("best.pth", "model.safetensors"):
        shutil.copy(tmp_path / name, tmp_path / f"old_{name}")
    start(tmp_path, epochs=2)
    before = contents(tmp_path)
    for name in ("best.pth", "model.safetensors"):
        shutil.copy(tmp_path / f"old_{name}", tmp_path / name)
    start(tmp_path, epochs=2)
    assert differences(contents(tmp_path), before) == []


def test_a_best_checkpoint_that_no_file_has_any_more_is_not_invented(tmp_path):
    start(tmp_path)
    for name in ("best.pth", "ckpt_epoch_1.pth", "model.safetensors"):
        (tmp_path / name).unlink()
    start(tmp_path)
    assert not (tmp_path / "best.pth").exists()
    assert not CheckpointFolder(tmp_path).holds_best(1, 30.0)


def test_at_a_limit_of_updates_inside_an_epoch_the_best_is_written_again_too(tmp_path):
    start(tmp_path, max_steps=1)
    before = contents(tmp_path)
    (tmp_path / "best.pth").unlink()
    start(tmp_path, max_steps=1)
    assert differences(contents(tmp_path), before) == []


def test_a_fork_keeps_the_best_it_begins_with_and_no_epoch_of_another_folder(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    start(one, epochs=2)
    checkpoint = read_checkpoint(one / "best.pth")
    trainer = make_trainer(**OPTIONS)
    trainer.restore(checkpoint.training_state())
    repair(CheckpointFolder(other), checkpoint, trainer.state, epochs=4, averaged=True)
    assert sorted(path.name for path in other.iterdir()) == ["best.pth", "model.safetensors"]
