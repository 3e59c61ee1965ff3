"""Every data set says what it is at one place, and a new one needs no other edit."""

import inspect
import subprocess
import sys

import pytest

from config import KEYS, load_config
from data import DataError
from data.build import find_sources
from data.catalogue import DATASETS, DataSet, data_set
from data.sources import Sources
from tests.helpers import ROOT, copy_project, run_main

SETS = ROOT / "data" / "sets"
DESCRIPTION = {"num_classes": 3, "mean": (0.5,), "std": (0.2,), "layout": "three files"}


def described(**changes) -> DataSet:
    fields = {"read": lambda request: None, **DESCRIPTION, **changes}
    return DataSet(name="toy", **fields)


def test_importing_the_data_sets_loads_no_library_that_only_one_of_them_needs():
    code = (
        "import sys, data.sets; print([name for name in ('torchvision', 'timm', 'scipy', 'sklearn')"
        " if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_every_file_registers_a_data_set_and_says_what_it_reads():
    readers = {inspect.getsourcefile(DATASETS[name].read) for name in DATASETS}
    files = {str(path) for path in SETS.glob("*.py") if path.name != "__init__.py"}
    assert files <= readers
    for name in DATASETS:
        assert DATASETS[name].name == name and inspect.getdoc(DATASETS[name].read), name


@pytest.mark.parametrize("name", DATASETS.names())
def test_a_data_set_is_a_choice_of_the_config_with_its_own_classes_and_statistics(name):
    entry = DATASETS[name]
    config = load_config(None, ["DATA.DATASET", name])
    assert config.MODEL.NUM_CLASSES == (entry.num_classes or 0)
    assert name in KEYS["DATA.DATASET"].kind.choices
    for channels in (1, 3):
        mean, std = entry.statistics(channels)
        assert len(mean) == len(std) == channels and all(0 < value < 1 for value in mean + std)


@pytest.mark.parametrize("name", [name for name in DATASETS.names() if DATASETS[name].needs_path])
def test_a_missing_layout_is_one_line_with_the_words_of_the_entry(name, tmp_path):
    with pytest.raises(DataError) as caught:
        find_sources(load_config(None, ["DATA.DATASET", name, "DATA.DATA_PATH", str(tmp_path)]))
    message = str(caught.value)
    assert "\n" not in message and DATASETS[name].layout.partition(", or")[0] in message


def test_given_statistics_win_and_grey_is_the_luma_of_the_colours():
    cifar, imagenet = DATASETS["cifar10"], DATASETS["imagenet"]
    assert cifar.statistics(3, (0.5,), (0.1, 0.2, 0.3)) == ((0.5,) * 3, (0.1, 0.2, 0.3))
    luma = 0.299 * 0.485 + 0.587 * 0.456 + 0.114 * 0.406
    assert imagenet.statistics(1)[0][0] == pytest.approx(luma)


@pytest.mark.parametrize("field", DESCRIPTION)
def test_a_forgotten_field_is_an_error_of_registration(field):
    fields = {name: value for name, value in DESCRIPTION.items() if name != field}
    with pytest.raises(TypeError, match=field):
        data_set("toy", **fields)(lambda request: None)
    assert "toy" not in DATASETS


@pytest.mark.parametrize(
    "field, value",
    [
        ("num_classes", 0),
        ("mean", ()),
        ("mean", (0.5, 0.5)),
        ("std", (0.0,)),
        ("std", (0.2, 0.2, 0.2)),
        ("layout", " "),
    ],
)
def test_a_field_that_cannot_be_right_is_named(field, value):
    with pytest.raises(ValueError, match=f"data set 'toy': {field} is"):
        described(**{field: value})


def test_another_number_of_classes_than_described_is_refused(monkeypatch, tmp_path):
    found = Sources(None, [], ["one", "two"])
    entry = described(read=lambda request: found)
    monkeypatch.setitem(DATASETS._entries, "cifar10", entry)
    config = load_config(None, ["DATA.DATASET", "cifar10", "DATA.DATA_PATH", str(tmp_path)])
    with pytest.raises(DataError, match="toy has 3 classes, .* has 2; .*DATA.DATASET folder"):
        find_sources(config, train=False)


TOY = '''"""Squares and bars, drawn when asked for."""

import numpy as np

from data.catalogue import Request, data_set
from data.sources import ArraySource, Sources


@data_set("shapes", num_classes=2, mean=(0.2,), std=(0.4,), layout="nothing", needs_path=False)
def shapes(request: Request) -> Sources:
    """(N, 32, 32) uint8; label 1 is a bar."""
    images = np.zeros((64, 32, 32), np.uint8)
    images[::2, 12:20, 12:20] = 255
    images[1::2, :, 12:20] = 255
    source = ArraySource("shapes", images, np.arange(64) % 2)
    return Sources(source if request.train else None, source, ["square", "bar"])
'''
YAML = """BASE: ['digits_tiny.yaml']
DATA: {DATASET: shapes, BATCH_SIZE: 32}
MODEL: {NAME: shapes_tiny}
AUG: {AFFINE: false}
"""


def test_one_file_and_its_yaml_are_a_new_data_set(tmp_path):
    """In a copy of the project that has these two files more."""
    project = copy_project(tmp_path / "project")
    (project / "data" / "sets" / "shapes.py").write_text(TOY)
    yaml = project / "configs" / "digits" / "shapes_tiny.yaml"
    yaml.write_text(YAML)
    fast = ("--opts", "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0", "LOG.TENSORBOARD", "False")
    trained = run_main("--cfg", yaml, *fast, root=project)
    assert trained.returncode == 0, trained.stderr
    best = project / "output" / "shapes_tiny" / "default" / "best.pth"
    evaluated = run_main("--cfg", yaml, "--eval", "--resume", best, root=project)
    assert evaluated.returncode == 0, evaluated.stderr
    assert "shapes, no training and 64 validation images, 2 classes" in evaluated.stdout
    refused = run_main("--cfg", yaml, "--opts", "AUG.AFFINE", "True", root=project)
    assert "AUG.AFFINE True is made for DATA.DATASET 'digits', not shapes" in refused.stderr
