"""Checkpoints and weights files of odd structure: a run goes on as from the right one, or refuses
the file in one line.
"""

import argparse
import copy
import math
import random
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engine.runs import differences
from tests.wiring.runs import PLACE, run

STRUCTURES = 240
SEED = 11
# Entries that the weights at the end do not depend on: what they hold may change.
DESCRIBES = ("config", "metadata", "images", "class_names", "metrics", "environment", "wandb")
MISSING = object()


def shared_nest() -> list:
    """Small in a file, 2^60 values when printed."""
    nest: list = [1]
    for _ in range(60):
        nest = [nest, nest]
    return nest


def endless() -> list:
    """A list that contains itself."""
    nest: list = [1]
    nest.append(nest)
    return nest


def deep(levels: int = 400) -> list:
    """A list in a list in a list."""
    nest: list = []
    for _ in range(levels):
        nest = [nest]
    return nest


def whole_numbers(value):
    """A tensor's numbers cut to whole ones, of another type."""
    return value.to(torch.int64) if torch.is_tensor(value) else torch.ones(3, dtype=torch.int64)


def not_a_number(value):
    """The same with a NaN in it."""
    if not torch.is_tensor(value) or not value.is_floating_point() or not value.numel():
        return math.nan
    value = value.clone()
    value.view(-1)[0] = math.nan
    return value


def as_numpy(value):
    """The same number as NumPy's scalar."""
    return np.float64(value) if isinstance(value, float) else np.int64(7)


def shaped(value):
    """A tensor of another shape."""
    return torch.zeros(*value.shape, 2) if torch.is_tensor(value) else torch.zeros(2, 2)


def like(value) -> torch.Size:
    return value.shape if torch.is_tensor(value) else torch.Size((2, 3))


ODDITIES = (
    lambda value: MISSING,
    lambda value: None,
    lambda value: -1,
    lambda value: 10**30,
    lambda value: 2**100_000,
    lambda value: math.inf,
    lambda value: 0.5,
    lambda value: True,
    lambda value: "text",
    lambda value: "x" * 3_000_000,
    lambda value: b"bytes",
    lambda value: [],
    lambda value: {},
    lambda value: (1, 2, 3),
    lambda value: OrderedDict(a=1),
    lambda value: {1: 2, None: 3, (4, 5): 6},
    lambda value: {"more": value},
    lambda value: [value],
    lambda value: 3 + 4j,
    lambda value: {1, 2},
    lambda value: bytearray(10),
    lambda value: Path("somewhere"),
    lambda value: argparse.Namespace(a=1),
    lambda value: shared_nest(),
    lambda value: endless(),
    lambda value: deep(),
    lambda value: torch.empty(like(value), device="meta"),
    lambda value: torch.zeros(like(value)).to_sparse(),
    lambda value: torch.zeros(like(value), dtype=torch.complex64),
    lambda value: torch.zeros(like(value), dtype=torch.bool),
    lambda value: torch.zeros(1).expand(10**10),
    lambda value: torch.zeros(0),
    lambda value: torch.nn.Parameter(torch.zeros(3)),
    as_numpy,
    not_a_number,
    shaped,
    whole_numbers,
)


def places(value, above: tuple = ()) -> list[tuple]:
    """The paths to all entries of nested data."""
    found = [above] if above else []
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return found
    return found + [place for key, inner in items for place in places(inner, (*above, key))]


def with_oddity(content, place: tuple, oddity):
    """A copy with another value at a place."""
    content = copy.deepcopy(content)
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    value = oddity(inner[place[-1]])
    if value is MISSING:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return content


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one epoch, and the weights that it has after two."""
    folder = tmp_path_factory.mktemp("one")
    settings = {"MODEL.EMA.ENABLE": True, "MODEL.EMA.DECAY": 0.5}
    assert run(folder, settings)["status"] == [0]
    saved = torch.load(folder / PLACE / "last.pth", weights_only=True)
    on = {**settings, "TRAIN.EPOCHS": 2, "MODEL.RESUME": folder / PLACE / "last.pth"}
    after = tmp_path_factory.mktemp("two")
    assert run(after, on)["status"] == [0]
    return saved, on, torch.load(after / PLACE / "last.pth", weights_only=True)["model"]


def try_structures(trained, folder, count: int, seed: int) -> int:
    """Runs that go on from `count` odd files; returns how many were refused."""
    saved, on, expected = trained
    draw = random.Random(seed)
    all_places, refused = places(saved), 0
    for number in range(count):
        top = draw.choice(list(saved))  # or the moments alone would be drawn
        place = draw.choice([place for place in all_places if place[0] == top])
        chosen = draw.randrange(len(ODDITIES))
        case = f"structure {number} of seed {seed}: oddity {chosen} at {place}"
        path = folder / f"{number}.pth"
        try:
            torch.save(with_oddity(saved, place, ODDITIES[chosen]), path)
        except RecursionError:
            continue
        left = run(folder / f"run{number}", {**on, "MODEL.RESUME": path})
        path.unlink()
        assert left["status"] in ([0], [2]), case
        if left["status"] == [2]:
            assert left["errors"].count("\n") == 1 and len(left["errors"]) < 2000, case
            refused += 1
        elif place[0] not in DESCRIBES:
            last = folder / f"run{number}" / PLACE / "last.pth"
            after = torch.load(last, weights_only=True)["model"]
            assert not differences(after, expected), case
    return refused


@pytest.mark.parametrize(
    "count",
    [
        pytest.param(STRUCTURES // 10, marks=pytest.mark.slow),
        pytest.param(STRUCTURES, marks=pytest.mark.long),
    ],
)
def test_a_checkpoint_of_another_structure_is_refused_or_changes_nothing(trained, tmp_path, count):
    assert sys.getrecursionlimit() <= 1000
    assert try_structures(trained, tmp_path, count, SEED + count) > count // 2


@pytest.mark.parametrize(
    "count",
    [
        pytest.param(STRUCTURES // 10, marks=pytest.mark.slow),
        pytest.param(STRUCTURES, marks=pytest.mark.long),
    ],
)
def test_a_weights_file_of_another_structure_is_refused_or_changes_nothing(
    trained, tmp_path, count
):
    saved, on, _ = trained
    evaluation = {key: value for key, value in on.items() if key.startswith("MODEL.EMA")}
    evaluation |= {"EVAL_MODE": True}
    content = {"state_dict": saved["model"], "epoch": 1, "config": saved["config"]}
    right = tmp_path / "right.pth"
    torch.save(content, right)

    def said(path) -> dict:
        folder = tmp_path / path.stem
        return run(folder, {**evaluation, "MODEL.PRETRAINED": path}, numbers=True)

    expected = [line for line in said(right)["log"] if line.startswith("Accuracy")]
    draw = random.Random(SEED + count)
    weights = [place for place in places(content) if place[0] == "state_dict"]
    others = [place for place in places(content) if place[0] != "state_dict"]
    for number in range(count):
        place = draw.choice(draw.choice([weights, others]))
        chosen = draw.randrange(len(ODDITIES))
        path = tmp_path / f"{number}.pth"
        torch.save(with_oddity(content, place, ODDITIES[chosen]), path)
        left = said(path)
        path.unlink()
        case = f"structure {number}: oddity {chosen} at {place}"
        assert left["status"] in ([0], [2]), case
        if left["status"] == [2]:
            assert left["errors"].count("\n") == 1 and len(left["errors"]) < 2000, case
        else:
            accuracy = [line for line in left["log"] if line.startswith("Accuracy")]
            assert accuracy == expected, case
