"""Every setting arrives: another value changes what is built or done, or one line refuses it."""

import zipfile
from unittest.mock import patch

import pytest
import timm
import yaml
from safetensors.torch import load_file, save_file

from models import build_model
from tests.data import fakes
from tests.wiring.cases import CASES, FAMILIES, config_of, run_cases
from tests.wiring.data import DATA_CASES, FOLDER, data_seen
from tests.wiring.models import arrival_in_model, model_keys, model_settings
from tests.wiring.runs import SETTINGS, differences, nested, run

ELSEWHERE = {
    **{
        f"LOG.WANDB_{leaf}": "acts with LOG.WANDB; tests/wiring/test_runs.py"
        for leaf in ("PROJECT", "ENTITY", "GROUP", "TAGS")
    },
    "MODEL.TIMM.PRETRAINED": "fetches weights; a test below answers for the network",
    "TRAIN.GROUP_TIMEOUT": "acts between processes; tests/engine/test_distributed.py",
    "TRAIN.CHECK_RANKS": "acts between processes; tests/engine/test_distributed.py",
    "LOCAL_RANK": "chooses among the GPUs of a machine; tests/test_config.py and test_utils.py",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_setting_of_a_model_changes_what_it_computes_or_is_refused(family):
    cache: dict = {}
    found = {
        key: arrival_in_model(family, key, cache)
        for key in model_keys(family)
        if key not in ELSEWHERE
    }
    lost = {key: said for key, said in found.items() if said not in ("arrives", "refused")}
    assert not lost


def test_released_weights_are_asked_for_by_name():
    settings = model_settings("timm") | {"MODEL.TIMM.PRETRAINED": True}
    create = timm.create_model

    def refuse(name, pretrained=False, **options):
        if pretrained:
            raise RuntimeError("no network here")
        return create(name, **options)

    with patch("timm.create_model", refuse), pytest.raises(Exception, match="no network here"):
        build_model(config_of(settings))


# ---- data


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Where the files in braces of DATA_CASES lie."""
    folder = fakes.class_folder(tmp_path_factory.mktemp("images"))
    (folder / "train" / "ant" / "broken.jpg").write_bytes(b"no picture")
    other = fakes.class_folder(tmp_path_factory.mktemp("other"), train=4)
    thousand = tmp_path_factory.mktemp("thousand")
    picture = (folder / "val" / "ant" / "015.jpg").read_bytes()
    for split in ("train", "val"):
        with zipfile.ZipFile(thousand / f"{split}.zip", "w") as archive:
            for number in range(1000):
                archive.writestr(f"n{number:08d}/{number}.jpg", picture)
    return {"folder": folder, "other": other, "zip": thousand}


def filled(settings: dict, places: dict) -> dict:
    """Settings with the places in braces filled in."""
    return {
        key: value.format(**places) if "{" in str(value) else value
        for key, value in settings.items()
    }


def test_every_setting_of_the_data_changes_what_is_seen_or_is_refused(images):
    before, ignored = {}, []
    for case in DATA_CASES:
        beside = filled(FOLDER | case.beside, images)
        name = repr(beside)
        if name not in before:
            before[name] = data_seen(beside)
        if data_seen(beside | filled({case.key: case.value}, images)) == before[name]:
            ignored.append(str(case))
    assert not ignored


def test_the_same_data_are_seen_alike(images):
    assert data_seen(filled(FOLDER, images)) == data_seen(filled(FOLDER, images))


# ---- runs


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Where the files in braces of CASES lie: what finished runs have left, and two settings."""
    folder = tmp_path_factory.mktemp("files")
    made = {
        "one": run(folder / "one"),
        "two": run(folder / "two", {"SEED": 5}),
        "average": run(folder / "average", {"MODEL.EMA.ENABLE": True, "MODEL.EMA.DECAY": 0.5}),
    }
    assert all(left["status"] == [0] for left in made.values())
    place = "output/small/default"
    one = folder / "one" / place
    partial, wider = folder / "partial.safetensors", folder / "wider.yaml"
    weights = load_file(one / "model.safetensors")
    names = {"qk_residual": "none", "class_names": str(list("9876543210")).replace("'", '"')}
    save_file(weights, folder / "reversed.safetensors", names)
    weights.pop("head.weight")
    save_file(weights, partial, {"format": "pt"})
    wider.write_text(yaml.safe_dump(nested(SETTINGS | {"MODEL.VIT.MLP_RATIO": 2.0})))
    return {
        "last": one / "last.pth",
        "weights": one / "model.safetensors",
        "other": folder / "two" / place / "model.safetensors",
        "average": folder / "average" / place / "last.pth",
        "partial": partial,
        "reversed": folder / "reversed.safetensors",
        "yaml": folder / "one" / "base.yaml",
        "wider": wider,
    }


CLAIMED = {key for family in FAMILIES for key in model_keys(family)} | ELSEWHERE.keys()
CLAIMED |= {case.key for case in DATA_CASES if case.key not in {c.key for c in CASES}}
RUNS = run_cases(CLAIMED)


@pytest.mark.parametrize("section", ["MODEL", "TRAIN", "all else"])
def test_every_other_setting_changes_a_run_or_is_refused(section, files, tmp_path):
    before, ignored = {}, []
    for number, case in enumerate(RUNS):
        first = case.key.partition(".")[0]
        if section != (first if first in ("MODEL", "TRAIN") else "all else"):
            continue
        places = files | {"folder": tmp_path / f"after{number}"}
        beside, value = filled(case.beside, places), filled({case.key: case.value}, places)
        name = repr((beside, case.times))
        if name not in before:
            before[name] = run(tmp_path / f"before{number}", beside, times=case.times)
        after = run(tmp_path / f"after{number}", beside | value, times=case.times)
        if after == before[name]:
            ignored.append(str(case))
    assert not ignored


def test_the_same_run_leaves_the_same_behind(tmp_path):
    assert differences(run(tmp_path / "one"), run(tmp_path / "two")) == []
