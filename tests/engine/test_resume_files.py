"""main.py with each kind of checkpoint file: what it goes on from, and how often it reads it."""

import argparse
import builtins
import shutil
from pathlib import Path

import pytest
import torch

import main as program
from tests.checkpoint.states import MISSING, changed
from tests.engine.runs import arguments, checkpoint, folder, metrics

QUICK = {"TRAIN__MAX_STEPS": 3, "TRAIN__SAVE_STEPS": 0, "DATA__NUM_WORKERS": 0}
ONWARD = QUICK | {"TRAIN__MAX_STEPS": 5}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished short run; not to be written to."""
    output = tmp_path_factory.mktemp("trained")
    assert program.main(arguments(output, **QUICK)) == 0
    return output


@pytest.fixture
def mine(trained, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(trained, tmp_path / "copy")


def refused(capsys, argv) -> str:
    """The one line of a command that must fail."""
    capsys.readouterr()
    status = program.main([str(word) for word in argv])
    lines = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and len(lines) == 1, (status, lines)
    return lines[0]


def damage(path, place, value=MISSING):
    """Writes the training state back with another structure."""
    torch.save(changed(torch.load(path, weights_only=True), place, value), path)


def test_a_resumed_run_opens_its_last_checkpoint_once_to_read_it(mine, monkeypatch, capsys):
    opened, mapped = [], []
    real_open, real_load = builtins.open, torch.load

    def counted_open(file, mode="r", *args, **options):
        if "r" in mode and str(file).endswith(".pth"):
            opened.append(Path(file).name)
        return real_open(file, mode, *args, **options)

    def counted_load(file, *args, mmap=False, **options):
        if mmap:
            mapped.append(Path(file).name)
        return real_load(file, *args, mmap=mmap, **options)

    monkeypatch.setattr(builtins, "open", counted_open)
    monkeypatch.setattr(torch, "load", counted_load)
    monkeypatch.setattr("engine.state.copy_whole", lambda *_: None)  # of what is saved
    assert program.main(arguments(mine, **ONWARD)) == 0
    assert "resumed from" in capsys.readouterr().out
    assert opened.count("last.pth") == 1 and set(opened) == {"last.pth", "best.pth"}
    assert set(mapped) == {"best.pth"}  # its names, shapes and plain data alone


def test_the_home_folder_changes_nothing_about_an_evaluation(
    trained, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("HOME", str(folder(trained)))
    outputs = []
    for path in ("~/best.pth", str(folder(trained) / "best.pth")):
        assert program.main([*arguments(tmp_path), "--eval", "--resume", path]) == 0
        lines = capsys.readouterr().out.splitlines()
        outputs.append([line.split("INFO")[1] for line in lines if "Accuracy of the" in line])
    assert outputs[0] == outputs[1]
    assert [line.split(" on ")[0].strip() for line in outputs[0]] == [
        "Accuracy of the network",
        "Accuracy of the averaged network",
    ]


@pytest.mark.parametrize(
    "place, value",
    [
        ("progress", MISSING),
        ("progress.update", "many"),
        ("optimizer.state.3.exp_avg_sq", MISSING),
        ("ranks", []),
        ("model", MISSING),
    ],
)
def test_a_checkpoint_of_another_structure_is_one_line_and_touches_nothing(
    mine, tmp_path, capsys, place, value
):
    odd = shutil.copy(folder(mine) / "last.pth", tmp_path / "odd.pth")
    damage(odd, place, value)
    before = (folder(mine) / "last.pth").read_bytes()
    argv = arguments(mine, **QUICK, TRAIN__AUTO_RESUME=False)
    line = refused(capsys, [*argv, "--resume", odd])
    assert "odd.pth" in line and place.split(".")[-1] in line
    assert (folder(mine) / "last.pth").read_bytes() == before


def test_auto_resume_goes_on_from_the_next_older_file_of_the_right_structure(mine, capsys):
    damage(folder(mine) / "last.pth", "optimizer")
    assert program.main(arguments(mine, **ONWARD)) == 0
    out = capsys.readouterr().out
    assert "last.pth: optimizer is missing" in out and "best.pth: epoch 0" in out
    assert checkpoint(folder(mine))["progress"]["update"] == 5


def test_an_evaluation_needs_the_weights_of_a_file_alone(trained, tmp_path, capsys):
    odd = shutil.copy(folder(trained) / "last.pth", tmp_path / "odd.pth")
    for place in ("optimizer", "ranks", "progress"):
        damage(odd, place)
    assert program.main([*arguments(tmp_path), "--eval", "--resume", str(odd)]) == 0
    out = capsys.readouterr().out
    assert all(f"Acc@1 {entry['acc1']:.3f}" in out for entry in metrics(folder(trained))[-2:])


def test_lost_moments_of_a_parameter_are_noticed_before_the_next_update(mine, capsys):
    name = list(checkpoint(folder(mine))["optimizer"]["state"])[-1]
    for file in ("last.pth", "best.pth"):
        damage(folder(mine) / file, f"optimizer.state.{name}")
    before = (folder(mine) / "last.pth").read_bytes()
    assert "no moments of " in refused(capsys, arguments(mine, **ONWARD))
    assert (folder(mine) / "last.pth").read_bytes() == before


@pytest.mark.parametrize("settings", ["config", "args"])
def test_a_run_of_swin_goes_on_at_its_epoch_with_its_optimizer(tmp_path, capsys, settings):
    from yacs.config import CfgNode

    def start(output, **options):
        argv = arguments(tmp_path / output, **QUICK | {"MODEL__EMA__ENABLE": False, **options})
        argv[1] = "configs/digits/digits_swin.yaml"
        return argv

    def last(output):
        return checkpoint(tmp_path / output / "digits_swin" / "default")

    assert program.main(start("a")) == 0
    ours = last("a")
    for group in ours["optimizer"]["param_groups"]:
        del group["optimizer"]
    about = {
        "config": CfgNode({"MODEL": CfgNode({"TYPE": "swin"})}),
        "args": argparse.Namespace(cfg="swin.yaml", lr=0.1),
    }
    swin = {
        "model": ours["model"],
        "optimizer": ours["optimizer"],
        "lr_scheduler": {"t_initial": 5},
        "max_accuracy": 33.0,
        "scaler": {},
        "epoch": 0,
        settings: about[settings],
    }
    torch.save(swin, tmp_path / "ckpt_epoch_0.pth")
    argv = start("b", TRAIN__MAX_STEPS=24)
    assert program.main([*argv, "--resume", str(tmp_path / "ckpt_epoch_0.pth")]) == 0
    assert "resumed Swin's checkpoint" in capsys.readouterr().out
    after = last("b")
    assert after["progress"] | {"best_epoch": 0} == {
        "epoch": 1,
        "batch": 2,
        "update": 24,
        "best": 33.0,
        "best_epoch": 0,
    }
    assert float(after["optimizer"]["state"][0]["step"]) == 5
