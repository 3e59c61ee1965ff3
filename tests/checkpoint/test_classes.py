"""Names of classes in files: the head follows them, or the file is refused."""

import json
import logging

import pytest
import torch

from checkpoint import (
    CheckpointError,
    load_weights,
    read_weights,
    save_weights,
    stored_classes,
    unwrap,
)
from models import VisionTransformer
from tests.data import fakes
from tests.wiring.runs import PLACE, run

ANIMALS = ["ant", "bee", "cat", "dog"]


def network(classes: int = 4):
    return VisionTransformer(8, 4, 3, classes, 8, 1, 2)


def filled():
    model = network()
    torch.manual_seed(0)
    torch.nn.init.normal_(model.head.weight)
    torch.nn.init.normal_(model.head.bias)
    return model


def file_of(folder, model, classes=ANIMALS, name="weights.safetensors"):
    """A weights file that names its classes."""
    path = folder / name
    return save_weights(path, model.state_dict(), {"class_names": json.dumps(classes)})


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
@pytest.mark.parametrize(("rule", "head"), [("exact", "auto"), ("finetune", "evaluate")])
def test_a_head_is_put_into_the_order_of_the_datas_classes(tmp_path, name, rule, head):
    model, other = filled(), network()
    wanted = ["dog", "ant", "cat", "bee"]
    weights = read_weights(file_of(tmp_path, model, name=name))
    report = load_weights(other, weights, rule=rule, head=head, classes=wanted)
    images = torch.randn(2, 3, 8, 8)
    expected = model(images)[:, [ANIMALS.index(animal) for animal in wanted]]
    torch.testing.assert_close(other(images), expected, rtol=0, atol=0)
    assert sum("3 rows of the head" in note for note in report.notes) == 1


@pytest.mark.parametrize(("rule", "head"), [("exact", "auto"), ("finetune", "auto")])
def test_other_classes_are_refused_by_name_and_the_model_stays(tmp_path, rule, head):
    weights = read_weights(file_of(tmp_path, filled()))
    model = network()
    before = model.head.weight.clone()
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, weights, rule=rule, head=head, classes=["ant", "bee", "cow", "dog"])
    message = str(caught.value)
    assert "in the file alone 'cat'; in the data alone 'cow'" in message and "\n" not in message
    assert "MODEL.MATCH_CLASSES False" in message
    assert ("MODEL.HEAD_RESET" in message) == (rule == "finetune")
    assert torch.equal(model.head.weight, before)


def test_a_head_that_is_not_kept_is_not_compared(tmp_path):
    weights = read_weights(file_of(tmp_path, filled()))
    load_weights(network(), weights, head="reset", classes=["a", "b", "c", "d"])
    load_weights(network(2), weights, classes=["a", "b"])


def test_classes_that_are_numbers_alone_are_taken_by_position_with_a_warning(tmp_path, caplog):
    path = file_of(tmp_path, network(), ANIMALS)
    with caplog.at_level(logging.WARNING):
        report = load_weights(
            network(), read_weights(path), logger=logging.getLogger("test"), classes=list("0123")
        )
    assert report.by_position and "taken by position" in caplog.text


def test_the_same_classes_a_file_without_names_and_numbers_are_no_alarm(tmp_path):
    model = filled()
    decomposed = ["e\u0301", "bee", "cat", "dog"]
    for stored, wanted in [
        (ANIMALS, ANIMALS),
        (None, ANIMALS),
        (ANIMALS, None),
        (decomposed, ["\u00e9", "bee", "cat", "dog"]),
        (["cat", "cat", "dog", "dog"], ["cat", "cat", "dog", "dog"]),
    ]:
        metadata = {"class_names": json.dumps(stored)} if stored else {}
        path = save_weights(tmp_path / "a.safetensors", model.state_dict(), metadata)
        other = network()
        report = load_weights(other, read_weights(path), rule="exact", classes=wanted)
        assert torch.equal(other.head.weight, model.head.weight)
        assert not any("class" in note for note in report.notes)
    path = file_of(tmp_path, model, ["0", "1", "2", "3"])
    report = load_weights(network(), read_weights(path), rule="exact", classes=ANIMALS)
    assert any("cannot be compared" in note for note in report.notes)


def test_names_that_occur_twice_do_not_tell_which_is_which(tmp_path):
    weights = read_weights(file_of(tmp_path, filled(), ["crane", "crane", "bee", "cat"]))
    with pytest.raises(CheckpointError, match="'crane' occurs twice"):
        load_weights(network(), weights, classes=["bee", "cat", "crane", "crane"])


@pytest.mark.parametrize("odd", ["[1, 2, 3, 4]", "cat", '{"0": "cat"}', "[" * 9999, "[]"])
def test_class_names_of_another_structure_count_as_none(odd):
    assert stored_classes(unwrap({"model": {"w": torch.ones(1)}, "class_names": odd})) is None


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on three class folders of its own, and its settings."""
    images = fakes.class_folder(tmp_path_factory.mktemp("images"), train=8)
    settings = {
        "DATA.DATASET": "folder",
        "DATA.DATA_PATH": images,
        "MODEL.VIT.IN_CHANS": 3,
        "AUG.AFFINE": False,
        "DATA.CROP_RATIO": 1.0,
        "TRAIN.EPOCHS": 2,
    }
    folder = tmp_path_factory.mktemp("run")
    assert run(folder, settings)["status"] == [0]
    return folder, images, settings


def accuracies(left: dict) -> list[str]:
    return [line.split(": ")[-1] for line in left["log"] if line.startswith("Accuracy of")]


def test_fault_a_class_folder_is_renamed(trained, tmp_path):
    folder, images, settings = trained
    place = folder / PLACE
    assert json.loads((place / "config.json").read_text())["id2label"]["2"] == "cat"
    for name in ("last.pth", "best.pth", "model.safetensors"):
        assert stored_classes(read_weights(place / name)) == ["ant", "bee", "cat"]
    evaluation = settings | {"EVAL_MODE": True, "MODEL.RESUME": place / "best.pth"}
    right = accuracies(run(tmp_path / "right", evaluation, numbers=True))
    for split in ("train", "val"):
        (images / split / "ant").rename(images / split / "zebra")
    try:
        left = run(tmp_path / "renamed", evaluation)
        assert left["status"] == [2] and left["errors"].count("\n") == 1
        assert "in the file alone 'ant'; in the data alone 'zebra'" in left["errors"]
        more = settings | {"TRAIN.EPOCHS": 3}
        assert "alone 'ant'" in run(folder, more)["errors"]  # the run goes on with other classes
        weights = {"MODEL.PRETRAINED": place / "model.safetensors"}
        left = run(tmp_path / "weights", settings | weights)
        assert left["status"] == [2] and "MODEL.HEAD_RESET" in left["errors"]
        left = run(tmp_path / "consent", evaluation | {"MODEL.MATCH_CLASSES": False})
        assert left["status"] == [0]
    finally:
        for split in ("train", "val"):
            (images / split / "zebra").rename(images / split / "ant")
    assert accuracies(run(tmp_path / "again", evaluation, numbers=True)) == right


def test_a_teacher_of_other_classes_is_refused(trained, tmp_path):
    _, _, settings = trained
    teacher = file_of(tmp_path, network(3), ["ant", "bee", "cow"])
    asked = {
        "TRAIN.DISTILL.KIND": "hard",
        "TRAIN.DISTILL.TEACHER": "resnet18",
        "TRAIN.DISTILL.TEACHER_WEIGHTS": teacher,
    }
    left = run(tmp_path / "run", settings | asked)
    assert left["status"] == [2] and "in the file alone 'cow'" in left["errors"]


def test_a_run_does_not_go_on_with_its_classes_in_another_order(trained, tmp_path):
    folder, _, settings = trained
    checkpoint = torch.load(folder / PLACE / "last.pth", weights_only=True)
    checkpoint["class_names"] = ["bee", "ant", "cat"]
    torch.save(checkpoint, tmp_path / "last.pth")
    left = run(tmp_path / "run", settings | {"MODEL.RESUME": tmp_path / "last.pth"})
    assert left["status"] == [2] and "in another order" in left["errors"]
