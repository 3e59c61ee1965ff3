"""Runs that go on, evaluations, weights to start from, and teachers."""

import itertools
import os
import re
import shutil
import signal
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from tests.data import fakes
from tests.wiring.runs import PLACE, differences, metrics, payload, run

AVERAGED = {"MODEL.EMA.ENABLE": True, "MODEL.EMA.DECAY": 0.5}


@contextmanager
def stopped_after(updates: int):
    """A SIGTERM comes with this update."""
    count = itertools.count(1)

    def stop(*_):
        if next(count) == updates:
            os.kill(os.getpid(), signal.SIGTERM)

    hook = register_optimizer_step_post_hook(stop)
    try:
        yield
    finally:
        hook.remove()


def test_a_run_stopped_by_a_signal_goes_on_and_ends_as_one_that_never_stopped(tmp_path):
    settings = AVERAGED | {"TRAIN.EPOCHS": 3, "MODEL.DROP_RATE": 0.3, "AUG.MIXUP": 0.8}
    whole = run(tmp_path / "whole", settings)["files"]
    with stopped_after(3):
        left = run(tmp_path / "parts", settings)
    assert left["status"] == [128 + signal.SIGTERM]
    assert any(line.startswith("stopped by signal #") for line in left["log"])
    assert payload(tmp_path / "parts")["progress"]["update"] == 3
    rest = run(tmp_path / "parts", settings)
    assert sum(call[0] == "seed" for call in rest["asked"]) == 3  # the other updates, no more
    parts = rest["files"]
    for name in ("last.pth", "metrics.jsonl", "model.safetensors"):
        assert differences(whole[f"{PLACE}/{name}"], parts[f"{PLACE}/{name}"]) == []


def test_a_folder_deleted_during_a_run_is_made_again_and_the_run_ends_well(tmp_path):
    count = itertools.count(1)

    def delete(*_):
        if next(count) == 1:
            shutil.rmtree(tmp_path / PLACE)

    hook = register_optimizer_step_post_hook(delete)
    try:
        left = run(tmp_path, {"TRAIN.EPOCHS": 2, "LOG.PLOT": True})
    finally:
        hook.remove()
    assert left["status"] == [0], left["errors"]
    assert sum("was deleted during the run" in line for line in left["log"]) == 1
    assert payload(tmp_path)["progress"]["epoch"] == 2
    assert {f"{PLACE}/best.pth", f"{PLACE}/model.safetensors"} <= left["files"].keys()


@pytest.mark.parametrize("name", ["best.pth", "model.safetensors", "config.yaml"])
def test_a_file_that_a_finished_run_lacks_is_written_again(name, tmp_path):
    whole = run(tmp_path)["files"]
    (tmp_path / PLACE / name).unlink()
    left = run(tmp_path)
    assert left["status"] == [0] and left["files"].keys() == whole.keys()
    assert left["files"][f"{PLACE}/{name}"] == whole[f"{PLACE}/{name}"]
    assert any("best accuracy" in line and "checkpoint" in line for line in left["log"])


def losses_said(left: dict) -> list[float]:
    """The mean losses of whole evaluations, from the last line of each; two batches."""
    lines = [line for line in left["log"] if line.startswith("Test: [1/2]")]
    return [float(re.search(r"Loss \S+ \((\S+)\)", line)[1]) for line in lines]


def test_an_evaluation_repeats_what_training_found(tmp_path):
    settings = AVERAGED | {"TRAIN.BASE_LR": 1.0}
    run(tmp_path / "train", settings)
    place = tmp_path / "train" / PLACE
    plainly, averaged = (
        metrics(tmp_path / "train", kind)[0]["loss"] for kind in ("val", "val_ema")
    )
    last, weights = place / "last.pth", place / "model.safetensors"
    unevaluated, disabled = {"MODEL.EMA.EVAL": False}, {"MODEL.EMA.ENABLE": False}
    cases = [
        (("--resume", last), {}, [plainly, averaged]),
        (("--resume", last), unevaluated | {"PRINT_FREQ": 1}, [plainly]),
        (("--resume", last, "--pretrained", weights), disabled, [plainly]),
        (("--resume", weights), {}, [averaged]),
        (("--pretrained", weights), {}, [averaged]),
        (("--pretrained", last), {}, [plainly]),
    ]
    for number, (flags, more, found) in enumerate(cases):
        words = ("--eval", *map(str, flags))
        left = run(tmp_path / str(number), AVERAGED | more, words, numbers=True)
        assert left["status"] == [0], left["errors"]
        assert losses_said(left) == pytest.approx(found, abs=2e-4), words
        assert any("no training" in line for line in left["log"])
        averages = sum("Accuracy of the averaged network" in line for line in left["log"])
        assert averages == len(found) - 1


def loadings_said(left: dict) -> list[str]:
    """Which share of its parameters each loaded network has from its file, as the log says it."""
    found = (re.match(r"loaded .* parameters \((.*?)\)", line) for line in left["log"])
    return [match[1] for match in found if match]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("trained")
    assert run(folder, {"SEED": 3})["status"] == [0]
    return folder


def test_weights_to_start_from_are_evaluated_first(trained, tmp_path):
    weights = trained / PLACE / "model.safetensors"
    left = run(tmp_path, {"MODEL.PRETRAINED": weights}, numbers=True)
    assert loadings_said(left) == ["100 %"]
    first, last = metrics(tmp_path, "val")
    assert first["step"] == 0 and first["loss"] == metrics(trained, "val")[0]["loss"]
    assert last["step"] == 2 and last["loss"] != first["loss"]


@pytest.mark.parametrize("reset", [False, True])
def test_the_head_begins_anew_where_asked(reset, trained, tmp_path):
    weights = trained / PLACE / "model.safetensors"
    settings = {"MODEL.PRETRAINED": weights, "MODEL.HEAD_RESET": reset, "TRAIN.BASE_LR": 0}
    run(tmp_path, settings | {"TRAIN.MIN_LR": 0, "TRAIN.WARMUP_LR": 0})
    before, after = payload(trained)["model"], payload(tmp_path)["model"]
    assert torch.equal(before["blocks.0.mlp.fc1.weight"], after["blocks.0.mlp.fc1.weight"])
    assert torch.equal(before["head.weight"], after["head.weight"]) != reset


def test_a_teacher_without_a_share_changes_nothing_and_one_with_all_of_it_decides(
    trained, tmp_path
):
    distill = {
        "TRAIN.DISTILL.KIND": "soft",
        "TRAIN.DISTILL.TEACHER": trained / "base.yaml",
        "TRAIN.DISTILL.TEACHER_WEIGHTS": trained / PLACE / "model.safetensors",
        "TRAIN.DISTILL.TAU": 2.0,
    }
    runs = {"plain": {}, "none": distill | {"TRAIN.DISTILL.ALPHA": 0.0}}
    for smoothing in (0.0, 0.3):  # of the labels, which a teacher with all of the share outweighs
        options = {"TRAIN.DISTILL.ALPHA": 1.0, "MODEL.LABEL_SMOOTHING": smoothing}
        runs[f"all {smoothing}"] = distill | options
    left = {name: run(tmp_path / name, settings, numbers=True) for name, settings in runs.items()}
    assert [loadings_said(one) for one in left.values()] == [[]] + [["100 %"]] * 3
    weights = {name: one["files"][f"{PLACE}/last.pth"]["model"] for name, one in left.items()}
    assert weights["plain"] == weights["none"]
    assert weights["all 0.0"] == weights["all 0.3"] != weights["plain"]


def test_a_checkpoint_has_to_fit_and_weights_may_have_another_head(trained, tmp_path):
    weights = payload(trained)["model"]
    weights |= {"head.weight": torch.zeros(7, 8), "head.bias": torch.zeros(7)}
    file = tmp_path / "seven.pth"
    torch.save({"model": weights}, file)
    fitted = run(tmp_path / "fitted", {"MODEL.PRETRAINED": file})
    assert fitted["status"] == [0]
    assert payload(tmp_path / "fitted")["model"]["head.weight"].shape == (10, 8)
    for words in (("--resume", str(file)), ("--eval", "--pretrained", str(file))):
        assert run(tmp_path / "refused", words=words)["status"] == [2]
    teacher = {
        "TRAIN.DISTILL.KIND": "hard",
        "TRAIN.DISTILL.TEACHER": trained / "base.yaml",
        "TRAIN.DISTILL.TEACHER_WEIGHTS": file,
    }
    left = run(tmp_path / "pupil", teacher)
    assert left["status"] == [2] and "seven.pth does not fit the model" in left["errors"]


def test_classes_are_those_of_the_data_for_network_and_teacher(tmp_path):
    images = fakes.class_folder(tmp_path / "images")
    settings = {
        "DATA.DATASET": "folder",
        "DATA.DATA_PATH": images,
        "DATA.BATCH_SIZE": 4,
        "AUG.AFFINE": False,
        "TEST.PER_CLASS": True,
    }
    assert run(tmp_path / "teacher", settings)["status"] == [0]
    teacher = {
        "TRAIN.DISTILL.KIND": "hard",
        "TRAIN.DISTILL.TEACHER": tmp_path / "teacher" / "base.yaml",
        "TRAIN.DISTILL.TEACHER_WEIGHTS": tmp_path / "teacher" / PLACE / "model.safetensors",
    }
    left = run(tmp_path / "pupil", settings | teacher)
    assert left["status"] == [0], left["errors"]
    assert payload(tmp_path / "pupil")["model"]["head.weight"].shape == (3, 8)
    rows = (tmp_path / "pupil" / PLACE / "per_class.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == ["ant", "bee", "cat"]


@pytest.mark.parametrize("weights, pretrained", [("", True), ("{}/teacher.bin", False)])
def test_a_teacher_of_timm_has_the_weights_and_the_classes_it_should(weights, pretrained, tmp_path):
    file = weights.format(tmp_path)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10))
    if file:
        torch.save(teacher.state_dict(), file)
    settings = {
        "TRAIN.DISTILL.KIND": "hard",
        "TRAIN.DISTILL.TEACHER": "resnet18",
        "TRAIN.DISTILL.TEACHER_WEIGHTS": file,
    }
    with patch("timm.create_model", return_value=teacher) as made:
        left = run(tmp_path, settings)
    assert left["status"] == [0], left["errors"]
    made.assert_called_once_with(
        "resnet18",
        pretrained=pretrained,
        num_classes=10,
        checkpoint_path=file,
    )
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_a_second_head_alone_learns_from_a_teacher_with_all_of_the_share(trained, tmp_path):
    settings = {
        "MODEL.TYPE": "pit",
        "MODEL.PIT.PATCH_SIZE": 8,
        "MODEL.PIT.EMBED_DIM": 8,
        "MODEL.PIT.DEPTHS": "[1]",
        "MODEL.PIT.NUM_HEADS": "[2]",
        "MODEL.PIT.DISTILLED": True,
        "TRAIN.DISTILL.KIND": "soft",
        "TRAIN.DISTILL.TEACHER": trained / "base.yaml",
        "TRAIN.DISTILL.TEACHER_WEIGHTS": trained / PLACE / "model.safetensors",
        "TRAIN.DISTILL.ALPHA": 1.0,
    }
    alone = {key: value for key, value in settings.items() if "DISTILL." not in key}
    assert run(tmp_path / "alone", alone)["status"] == [0]
    left = run(tmp_path, settings)
    assert left["status"] == [0], left["errors"]
    model = payload(tmp_path)["model"]
    assert model["head.bias"].abs().max() == 0 < model["head_dist.bias"].abs().max()
