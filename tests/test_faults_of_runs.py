"""Faults between two starts of a run and around its settings, one test each, named after it."""

import shutil

import pytest

from tests.fuzz import call_main
from tests.wiring.runs import PLACE, differences, payload, run
from tests.wiring.test_processes import one_of_two

DIGITS = ("--cfg", "configs/digits/digits_tiny.yaml")
HALF = {"TRAIN.EPOCHS": 2, "TRAIN.MAX_STEPS": 1, "MODEL.DROP_RATE": 0.3}


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A run that has stopped inside its first epoch; not to be written to."""
    folder = tmp_path_factory.mktemp("half")
    assert run(folder, HALF)["status"] == [0]
    return folder


@pytest.fixture
def mine(half, tmp_path):
    return shutil.copytree(half, tmp_path / "mine")


def test_read_only_output_folder(tmp_path):
    (tmp_path / "file").write_text("")
    left = run(tmp_path, {"OUTPUT": tmp_path / "file" / "x"})
    assert left["status"] == [2] and "output folder" in left["errors"]
    assert "choose another one with --output" in left["errors"] and left["asked"] == []


@pytest.mark.parametrize("batch, accepted", [(4, True), (8, False)])
def test_resume_with_other_world_size(batch, accepted, mine):
    settings = HALF | {"TRAIN.MAX_STEPS": 2, "DATA.BATCH_SIZE": batch}
    with one_of_two(0):
        left = run(mine, settings)
    if accepted:
        assert left["status"] == [0], left["errors"]
        assert any("resuming with # processes a run of #" in line for line in left["log"])
        assert payload(mine)["layout"] == {"batch_size": 4, "world_size": 2, "accumulation": 1}
    else:
        assert left["status"] == [2] and "--resume-changed" in left["errors"]
        assert "an update: 8 images" in left["errors"] and "-> 16 images" in left["errors"]


def test_resume_with_other_worker_count(mine, tmp_path):
    rest = HALF | {"TRAIN.MAX_STEPS": 2}
    whole = run(tmp_path / "whole", rest)["files"]
    parts = run(mine, rest | {"DATA.NUM_WORKERS": 2})["files"]
    for name in ("last.pth", "model.safetensors"):
        assert differences(whole[f"{PLACE}/{name}"], parts[f"{PLACE}/{name}"]) == []


@pytest.mark.parametrize(
    "changed", [{"TRAIN.BASE_LR": 0.2}, {"MODEL.VIT.DEPTH": 2}, {"SEED": 1}, {"AUG.MIXUP": 0.8}]
)
def test_resume_with_changed_config(changed, mine):
    before = (mine / PLACE / "last.pth").read_bytes()
    left = run(mine, HALF | {"TRAIN.MAX_STEPS": 2} | changed)
    [(key, value)] = changed.items()
    assert (
        left["status"] == [2] and f"{key}: " in left["errors"] and f"-> {value}" in left["errors"]
    )
    assert "--tag" in left["errors"] and "--resume-changed" in left["errors"]
    assert (mine / PLACE / "last.pth").read_bytes() == before


@pytest.mark.parametrize(
    "argv, hint",
    [
        (["--opts", "TRAIN.EPOCH", "3"], "did you mean TRAIN.EPOCHS?"),
        (["--epoch", "3"], "did you mean --epochs?"),
        (["--optim", "adamv"], "did you mean 'adamw'?"),
        (["--opts", "MODEL.ATTENTION.MODIFIERS", "crwp"], "did you mean 'crpw'?"),
    ],
)
def test_typo_in_options_and_flags(argv, hint):
    status, _, error = call_main(*DIGITS, "--print-config", *argv)
    assert status == 2 and hint in error


def test_typo_in_a_yaml(tmp_path):
    path = tmp_path / "typo.yaml"
    for text, hint in (
        ("TRAIN: {EPOCH: 3}", "did you mean TRAIN.EPOCHS?"),
        ("TRIAN: {EPOCHS: 3}", "did you mean TRAIN?"),
        ("MODEL: {TYPE: swinv3}", "did you mean 'swinv2'?"),
        ("BASE: typo.yml", "BASE: "),
    ):
        path.write_text(text)
        status, _, error = call_main("--cfg", path, "--print-config")
        assert status == 2 and hint in error
