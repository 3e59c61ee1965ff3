"""Checkpoint files: written whole or not at all, damage always noticed, the right one chosen,
nothing of others deleted.
"""

import os
import random
import resource

import pytest
import torch

from checkpoint import (
    CheckpointError,
    peek_checkpoint,
    read_checkpoint,
)
from engine.resume import choose, earlier_runs, newest
from engine.state import CheckpointFolder, Layout, TrainState, config_changes, place
from tests.checkpoint.states import changed, training_state
from tests.engine.runs import differences
from utils import RunError, World


def read(path):
    """A whole training state."""
    return read_checkpoint(path).training_state()


@pytest.fixture
def saved(tmp_path):
    """A folder with the checkpoints of three epochs and a best one."""
    files = CheckpointFolder(tmp_path)
    for epoch in range(3):
        files.save(training_state(update=10 * (epoch + 1), epoch=epoch + 1))
        files.keep_epoch(epoch)
        if epoch == 1:
            files.keep_best({"w": torch.ones(2)}, epoch=1, accuracy=50.0)
    return tmp_path


def test_a_checkpoint_reads_back_bit_by_bit_as_plain_data(tmp_path):
    CheckpointFolder(tmp_path).save(training_state())
    assert differences(read(tmp_path / "last.pth"), training_state() | {"format": 1}) == []
    peeked = peek_checkpoint(tmp_path / "last.pth").training_state()
    assert TrainState(**peeked["progress"]) == TrainState(1, 2, 5, 12.5, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["last.pth"]  # no temporary file is left


def test_every_truncation_is_noticed_in_one_line(tmp_path):
    CheckpointFolder(tmp_path).save(training_state())
    path, whole = tmp_path / "last.pth", (tmp_path / "last.pth").read_bytes()
    for size in [0, 1, 100, len(whole) // 2, len(whole) - 16, len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="last.pth") as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_a_flipped_bit_is_noticed_or_without_effect(tmp_path):
    CheckpointFolder(tmp_path).save(training_state())
    path, whole = tmp_path / "last.pth", (tmp_path / "last.pth").read_bytes()
    expected, draw, noticed = read(path), random.Random(0), 0
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            assert differences(read(path), expected) == []
        except CheckpointError:
            noticed += 1
    assert noticed > 200


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    torch.save({"format": 1, "model": Attack()}, tmp_path / "last.pth")
    with pytest.raises(CheckpointError):
        read(tmp_path / "last.pth")
    assert not (tmp_path / "attacked").exists()


def test_the_furthest_checkpoint_is_chosen_by_content_not_by_date(saved):
    os.utime(saved / "last.pth", (0, 0))
    (saved / "ckpt_epoch_0.pth").touch()
    assert newest(saved).path == saved / "last.pth"
    (saved / "last.pth").unlink()
    assert newest(saved).path == saved / "ckpt_epoch_2.pth"


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "html"])
def test_auto_resume_falls_back_to_the_previous_whole_one_and_says_so(saved, caplog, damage):
    for name in ("last.pth", "ckpt_epoch_2.pth"):
        content = bytearray((saved / name).read_bytes())
        content[len(content) // 2] ^= 4
        (saved / name).write_bytes(
            {
                "truncate": content[: len(content) // 2],
                "flip": content,
                "empty": b"",
                "html": b"<html>",
            }[damage]
        )
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    assert choose(saved, None, auto=True, world=World("cpu")).path.name in (
        "ckpt_epoch_1.pth",
        "best.pth",
    )
    assert caplog.text.count("SKIPPED in auto-resume") == 2 and "last.pth" in caplog.text
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_a_folder_with_nothing_but_damaged_checkpoints_is_not_written_over(saved):
    for path in saved.glob("*.pth"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="4|5"):
        newest(saved)
    assert newest(saved / "..") is None


def test_an_explicit_checkpoint_is_taken_at_its_word(saved, tmp_path_factory):
    world, elsewhere = World("cpu"), tmp_path_factory.mktemp("elsewhere")
    explicit = saved / "ckpt_epoch_0.pth"
    assert choose(saved, explicit, True, world).path == explicit
    assert choose(elsewhere, explicit, True, world).path == explicit  # the output folder is empty
    assert choose(elsewhere, None, True, world) is None
    CheckpointFolder(elsewhere).save(training_state())
    # the same command, run again
    assert choose(elsewhere, explicit, True, world).path == elsewhere / "last.pth"
    assert choose(elsewhere, explicit, False, world).path == explicit
    with pytest.raises(CheckpointError, match="missing.pth does not exist"):
        choose(elsewhere, saved / "missing.pth", True, world)


@pytest.mark.parametrize("place", ["optimizer", "progress.epoch", "ranks.0.rng.torch"])
def test_auto_resume_falls_back_from_another_structure_too(saved, caplog, place):
    for name in ("last.pth", "ckpt_epoch_2.pth"):
        whole = torch.load(saved / name, weights_only=True)
        torch.save(changed(whole, place), saved / name)
    assert newest(saved).training_state()["progress"]["update"] == 20
    assert caplog.text.count(f"{place.split('.')[-1]} is missing") == 2


@pytest.fixture
def reads(monkeypatch):
    """Counts what is read: (names of files opened whole, names of files mapped)."""
    opened, mapped = [], []
    load = torch.load

    def counted(file, *args, mmap=False, **options):
        name = os.path.basename(file if mmap else file.path)
        (mapped if mmap else opened).append(name)
        return load(file, *args, mmap=mmap, **options)

    monkeypatch.setattr(torch, "load", counted)
    return opened, mapped


def test_the_last_checkpoint_is_read_once_and_of_the_others_only_what_is_no_tensor(saved, reads):
    assert choose(saved, None, True, World("cpu")).path == saved / "last.pth"
    opened, mapped = reads
    assert opened == ["last.pth"]
    assert sorted(mapped) == ["best.pth", *(f"ckpt_epoch_{epoch}.pth" for epoch in range(3))]


def test_a_further_checkpoint_than_the_last_one_is_found(saved, reads):
    CheckpointFolder(saved).save(training_state(update=15))
    assert newest(saved).path == saved / "ckpt_epoch_2.pth"
    assert reads[0] == ["last.pth", "ckpt_epoch_2.pth"]


def test_a_further_checkpoint_of_an_earlier_run_is_left_alone(saved, caplog):
    assert earlier_runs(saved) == 1
    CheckpointFolder(saved).save(training_state(update=15) | {"logs": {"run": 1}})
    assert earlier_runs(saved) == 2
    assert newest(saved).path == saved / "last.pth"
    assert "ckpt_epoch_2.pth is of an earlier run" in caplog.text


def test_only_the_newest_checkpoints_of_this_program_are_kept(tmp_path):
    torch.save({"model": {}, "config": 1}, tmp_path / "ckpt_epoch_1.pth")  # of another program
    files = CheckpointFolder(tmp_path, save_freq=2, keep=2)
    for epoch in range(10):
        files.save(training_state(epoch=epoch))
        files.keep_epoch(epoch, last=epoch == 9)
    assert sorted(path.name for path in tmp_path.glob("ckpt*")) == [
        "ckpt_epoch_1.pth",
        "ckpt_epoch_8.pth",
        "ckpt_epoch_9.pth",
    ]
    everything = CheckpointFolder(tmp_path, keep=0)
    everything.keep_epoch(10)
    assert len(list(tmp_path.glob("ckpt*"))) == 4


def test_a_copy_on_disk_shares_no_bytes_with_the_original(saved):
    with open(saved / "last.pth", "r+b") as file:
        file.truncate(10)
    assert read(saved / "ckpt_epoch_2.pth")["progress"]["update"] == 30


def test_a_full_disk_leaves_the_old_checkpoint_and_names_the_path(tmp_path):
    files = CheckpointFolder(tmp_path)
    files.save(training_state(update=1))
    before = (tmp_path / "last.pth").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(RunError, match="cannot write .*last.pth") as caught:
            files.save(training_state(update=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value) and "MiB" in str(caught.value)
    assert (tmp_path / "last.pth").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_positions_move_to_another_layout_only_where_updates_hold_as_many_images():
    inside, border = (
        TrainState(epoch=3, batch=6, update=40),
        TrainState(epoch=3, batch=0, update=40),
    )
    one = Layout(batch_size=8, world_size=2, accumulation=2)
    assert place(inside, one, one) == inside
    assert place(inside, one, Layout(4, 4, 2)).batch == 6
    assert place(inside, one, Layout(16, 1, 2)).batch == 6
    assert place(inside, one, Layout(32, 1, 1)).batch == 3
    assert place(border, one, Layout(5, 1, 1)) == border
    with pytest.raises(
        CheckpointError, match="inside epoch 3 with updates of 32 images .* this run has 16"
    ):
        place(inside, one, Layout(8, 2, 1))


def test_changed_settings_are_listed_by_their_full_names():
    saved = {"TRAIN": {"BASE_LR": 1e-3, "EPOCHS": 5}, "SEED": 0, "OLD": 1}
    now = {"TRAIN": {"BASE_LR": 2e-3, "EPOCHS": 5}, "SEED": 0, "NEW": [1]}
    assert config_changes(saved, now) == [
        "NEW: None -> [1]",
        "OLD: 1 -> None",
        "TRAIN.BASE_LR: 0.001 -> 0.002",
    ]
    assert config_changes(now, now) == []
