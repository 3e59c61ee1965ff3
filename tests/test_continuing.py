"""A run is never given out as another one: finished runs, changed settings, other images."""

import shutil

import pytest

from config import KEYS
from settings.continuing import CLASSES, class_of
from tests.data import fakes
from tests.wiring.runs import PLACE, payload, run

CONSENT = ("--resume-changed",)
FOLDER = {"DATA.DATASET": "folder", "DATA.BATCH_SIZE": 4, "AUG.AFFINE": False}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run; not to be written to."""
    folder = tmp_path_factory.mktemp("finished")
    assert run(folder)["status"] == [0]
    return folder


@pytest.fixture
def mine(finished, tmp_path):
    """A copy of it; the place is not a setting that counts."""
    return shutil.copytree(finished, tmp_path / "mine")


def kept(folder) -> dict[str, bytes]:
    """What a repeated command must leave as it is."""
    names = ("last.pth", "best.pth", "model.safetensors", "config.yaml", "config.json")
    return {name: (folder / PLACE / name).read_bytes() for name in names}


def test_every_setting_has_a_class_and_no_class_names_another():
    assert all(class_of(key) in CLASSES for key in KEYS)
    for names in CLASSES.values():
        for name in names:
            known = [key for key in KEYS if key == name or key.startswith(name)]
            assert known or name == "BASE", name


@pytest.mark.parametrize(
    "key, value",
    [
        ("SEED", 7),
        ("TRAIN.BASE_LR", 0.2),
        ("TRAIN.WEIGHT_DECAY", 0.5),
        ("TRAIN.OPTIMIZER.NAME", "sgd"),
        ("TRAIN.ACCUMULATION_STEPS", 2),
        ("DATA.BATCH_SIZE", 4),
        ("AUG.HFLIP", 0.0),
        ("MODEL.LABEL_SMOOTHING", 0.0),
        ("MODEL.DROP_PATH_RATE", 0.0),
        ("MODEL.EMA.ENABLE", True),
        ("MODEL.ATTENTION.MODIFIERS", ["qk_residual"]),
        ("MODEL.VIT.MLP_RATIO", 2.0),
        ("DATA.IMG_SIZE", 24),
        ("TRAIN.MAX_STEPS", 1),
        ("TEST.CROP", False),
        ("MODEL.COMPILE", True),
        ("TRAIN.DETERMINISTIC", True),
        ("MODEL.PRETRAINED", "{weights}"),
        ("MODEL.RESUME", "{weights}"),
    ],
)
def test_a_finished_run_is_not_the_result_of_other_settings(key, value, mine, finished):
    before = kept(mine)
    value = str(value).format(weights=finished / PLACE / "best.pth")
    for words in ((), CONSENT):
        left = run(mine, {key: value}, words)
        assert left["status"] == [2] and "--tag" in left["errors"]
        assert "finished run" in left["errors"] and left["errors"].count("\n") == 1
        named = "an update: " if key in ("DATA.BATCH_SIZE", "TRAIN.ACCUMULATION_STEPS") else key
        assert named in left["errors"]
    assert kept(mine) == before


def test_a_finished_run_repeated_changes_nothing_whatever_its_places_workers_and_logs(mine):
    before = kept(mine)
    free = {
        "PRINT_FREQ": 2,
        "LOG.PLOT": True,
        "TRAIN.KEEP": 1,
        "SAVE_FREQ": 2,
        "DATA.NUM_WORKERS": 1,
        "DATA.BATCH_SIZE": 4,
        "TRAIN.ACCUMULATION_STEPS": 2,
        "DATA.DATA_PATH": "elsewhere",
        "MODEL.SWIN.EMBED_DIM": 48,  # another family's
    }
    left = run(mine, free)
    assert left["status"] == [0], left["errors"]
    assert not any("the new one holds" in line for line in left["log"])
    assert kept(mine) == before


def test_a_longer_run_goes_on_and_writes_its_settings(mine):
    left = run(mine, {"TRAIN.EPOCHS": 2}, numbers=True)
    assert left["status"] == [0], left["errors"]
    assert any("TRAIN.EPOCHS: 1 -> 2" in line for line in left["log"])
    assert payload(mine)["progress"]["epoch"] == 2
    assert "EPOCHS: 2" in (mine / PLACE / "config.yaml").read_text()


def test_a_run_stopped_within_an_epoch_of_more_images_than_there_are_is_one_line(tmp_path):
    images = fakes.class_folder(tmp_path / "images", train=8)
    settings = FOLDER | {"DATA.DATA_PATH": images, "TRAIN.MAX_STEPS": 5}
    assert run(tmp_path, settings)["status"] == [0]
    for name in ("ant", "bee"):
        shutil.rmtree(images / "train" / name)
        fakes.save(images / "train" / name / "1.jpg", 1)
    left = run(tmp_path, settings | {"TRAIN.MAX_STEPS": 6}, CONSENT)
    assert left["status"] == [2] and "an epoch of these images has 2" in left["errors"]


@pytest.mark.parametrize(
    "more", [{"SEED": 7}, {"TRAIN.BASE_LR": 0.2}, {"TRAIN.ACCUMULATION_STEPS": 2}]
)
def test_an_unfinished_run_goes_on_with_other_settings_only_where_asked_to(mine, more):
    before = kept(mine)
    longer = {"TRAIN.EPOCHS": 2} | more
    left = run(mine, longer)
    assert left["status"] == [2] and "--resume-changed" in left["errors"]
    assert "TRAIN.EPOCHS" not in left["errors"] and kept(mine) == before
    left = run(mine, longer, CONSENT)
    assert left["status"] == [0] and payload(mine)["progress"]["epoch"] == 2
    assert any("the new one holds" in line for line in left["log"])


def test_a_named_checkpoint_goes_on_with_other_rates_but_not_as_another_function(
    finished, tmp_path
):
    words = ("--resume", str(finished / PLACE / "last.pth"))
    longer = {"TRAIN.EPOCHS": 2}
    left = run(tmp_path / "rate", longer | {"TRAIN.BASE_LR": 0.2, "SEED": 3}, words, numbers=True)
    assert left["status"] == [0], left["errors"]
    assert any("TRAIN.BASE_LR: 0.1 -> 0.2" in line for line in left["log"])
    other = longer | {"MODEL.ATTENTION.MODIFIERS": ["qk_residual"]}
    left = run(tmp_path / "other", other, words)
    assert left["status"] == [2] and "MODEL.ATTENTION.MODIFIERS" in left["errors"]
    assert "--pretrained" in left["errors"] and "--resume-changed" in left["errors"]
    assert not (tmp_path / "other" / PLACE / "last.pth").exists()
    assert run(tmp_path / "other", other, (*words, *CONSENT))["status"] == [0]


def test_other_images_are_noticed(tmp_path):
    images = fakes.class_folder(tmp_path / "images")
    settings = FOLDER | {"DATA.DATA_PATH": images}
    assert run(tmp_path / "a", settings)["status"] == [0]
    saved = payload(tmp_path / "a")["images"]
    assert set(saved) == {"training", "validation"} and "images, digest " in saved["training"]
    moved = settings | {"DATA.DATA_PATH": shutil.copytree(images, tmp_path / "moved")}
    assert run(tmp_path / "a", moved | {"TRAIN.EPOCHS": 2})["status"] == [0]

    picture = sorted((tmp_path / "moved" / "train").rglob("*.jpg"))[-1]
    content = picture.read_bytes()
    changes = {
        "larger": lambda: picture.write_bytes(content + b" "),
        "renamed": lambda: picture.rename(picture.with_name("zzz.jpg")),
        "gone": lambda: picture.with_name("zzz.jpg").unlink(),
    }
    for name, change in changes.items():
        change()
        left = run(tmp_path / "a", moved | {"TRAIN.EPOCHS": 3})
        assert left["status"] == [2] and "training images: " in left["errors"], name
        assert "validation images" not in left["errors"]
    assert run(tmp_path / "a", moved | {"TRAIN.EPOCHS": 3}, CONSENT)["status"] == [0]


def test_a_checkpoint_is_not_evaluated_as_another_network(tmp_path):
    settings = {"MODEL.ATTENTION.MODIFIERS": ["crpw"]}
    assert run(tmp_path / "a", settings)["status"] == [0]
    words = ("--eval", "--resume", str(tmp_path / "a" / PLACE / "last.pth"))

    def evaluated(more, words=words):
        return run(tmp_path / "b", settings | more, words)

    for key, value in [
        ("MODEL.ATTENTION.MODIFIERS", ["crpw(apply=probs)"]),
        ("MODEL.ATTENTION.MODIFIERS", ["crpw", "qk_residual(drop_bias=True)"]),
        ("MODEL.VIT.NORM_EPS", 0.01),
    ]:
        left = evaluated({key: value})
        assert left["status"] == [2] and "another network" in left["errors"]
        assert key in left["errors"] and left["errors"].count("\n") == 1
        left = evaluated({key: value}, words + CONSENT)
        assert left["status"] == [0] and any(key in line for line in left["log"])
    weights = str(tmp_path / "a" / PLACE / "model.safetensors")
    other = {"MODEL.ATTENTION.MODIFIERS": ["crpw(apply=probs)"]}
    assert evaluated(other, ("--eval", "--resume", weights))["status"] == [2]
    told = evaluated(other, ("--eval", "--pretrained", weights))
    assert told["status"] == [0] and any("apply=probs" in line for line in told["log"])
    assert evaluated({}, ("--eval", "--resume", weights))["status"] == [0]
    for more in (
        {},
        {"MODEL.ATTENTION.MODIFIERS": ["crpw()"]},
        {"MODEL.ATTENTION.MODIFIERS": ["qk_residual", "crpw"]},  # converted: the same function
        {"MODEL.DROP_PATH_RATE": 0.0, "MODEL.ATTENTION.BACKEND": "reference", "SEED": 7},
        {"MODEL.EMA.ENABLE": True},
    ):
        assert evaluated(more)["status"] == [0], more
