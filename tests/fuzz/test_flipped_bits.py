"""A single flipped bit in a file of weights or a checkpoint: refused in one line, or nothing has
changed.
"""

import random

import pytest

from checkpoint import CheckpointError, read_checkpoint
from engine.state import CheckpointFolder
from tests.checkpoint.states import training_state
from tests.engine.runs import differences

FLIPS = 150  # in each file


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """last.pth and model.safetensors as a run leaves them."""
    folder = CheckpointFolder(tmp_path_factory.mktemp("run"))
    state = training_state()
    folder.save(state)
    names = '["cat", "dog"]'
    folder.keep_best(state["model"], epoch=1, accuracy=50.0, qk_residual="both", classes=names)
    return folder.folder


def content(path):
    """Tensors and plain data of a file."""
    checkpoint = read_checkpoint(path)
    weights = checkpoint.weights()
    return checkpoint.content, weights.metadata if weights.checked else None


def flip_bits(path, target, count: int, seed: int) -> int:
    """Flips `count` bits, one at a time; returns how many were refused."""
    data, before = path.read_bytes(), content(path)
    draw = random.Random(seed)
    refused = 0
    for _ in range(count):
        place = draw.randrange(8 * len(data))
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        target.write_bytes(flipped)
        try:
            after = content(target)
        except CheckpointError as error:
            assert "\n" not in str(error)
            refused += 1
            continue
        assert not differences(before[0], after[0]), f"bit {place} changes a value unnoticed"
        assert after[1] in (before[1], None)  # None: the checksum's own name has changed
    return refused


@pytest.mark.parametrize("name", ["model.safetensors", "last.pth"])
@pytest.mark.parametrize(
    "count",
    [
        10,
        pytest.param(FLIPS // 10, marks=pytest.mark.slow),
        pytest.param(FLIPS, marks=pytest.mark.long),
    ],
)
def test_a_flipped_bit_is_noticed_or_changes_nothing(files, tmp_path, name, count):
    refused = flip_bits(files / name, tmp_path / name, count, seed=count)
    assert refused > 0.6 * count


@pytest.mark.parametrize(("part", "word"), [("header", "dog"), ("tensor", None)])
def test_a_changed_name_in_the_header_and_a_changed_weight_are_refused(files, tmp_path, part, word):
    data = bytearray((files / "model.safetensors").read_bytes())
    place = data.index(word.encode()) if word else len(data) - 3
    data[place] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum does not hold"):
        read_checkpoint(tmp_path / "model.safetensors")
