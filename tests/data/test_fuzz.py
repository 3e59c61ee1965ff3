"""Damaged images and archives: read, or refused in one line; never a traceback, and never with more
memory or time than an image may take.
"""

import resource
import time
import warnings

import pytest

from data import layouts
from data.datasets import ImageDataset
from data.errors import DataError
from data.images import UnreadableImage, decode
from data.randomness import Key
from data.transforms import eval_transform
from tests.data.mutants import archive_mutants, image_mutants

EVAL = eval_transform((16, 16), mean=(0.5,) * 3, std=(0.5,) * 3)
IMAGES, ARCHIVES = 12_000, 2_500
MIB = 2**20


def counted(whole: int) -> list:
    """The full count, which takes minutes, and a tenth of it with another seed."""
    return [
        pytest.param(whole // 10, 1, marks=pytest.mark.slow, id="tenth"),
        pytest.param(whole, 2, marks=pytest.mark.long, id="all"),
    ]


@pytest.fixture(autouse=True)
def bounded():
    """Time and the largest size of the process are those of ordinary images."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, about damaged tags
        yield
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * 1024 < 2048 * MIB


def one_line(error: Exception, *words: str) -> None:
    text = str(error)
    assert text and text.isprintable() and len(text) < 1000, text
    assert all(word in text for word in words), text


@pytest.mark.parametrize("count, seed", counted(IMAGES))
def test_damaged_images_are_read_or_named_in_one_line(count, seed):
    read = refused = 0
    slowest = 0.0
    for number, content in enumerate(image_mutants(count, seed)):
        begun = time.perf_counter()
        try:
            assert decode(content).mode == "RGB"
            read += 1
        except UnreadableImage as reason:
            one_line(reason)
            refused += 1
        except Exception as error:
            raise AssertionError(f"mutant {number} of seed {seed}") from error
        slowest = max(slowest, time.perf_counter() - begun)
    assert read > count / 10 and refused > count / 10
    assert slowest < 20


@pytest.mark.parametrize("count, seed", counted(ARCHIVES))
def test_damaged_archives_are_read_or_named_in_one_line(count, seed, tmp_path):
    archive, listing = tmp_path / "val.zip", tmp_path / "val_map.txt"
    opened = refused = 0
    for number, (content, lines) in enumerate(archive_mutants(count, seed)):
        archive.write_bytes(content)
        listing.unlink(missing_ok=True)
        if lines is not None:
            listing.write_bytes(lines)
        try:
            source = layouts.zip_folder(tmp_path, train=False, cache=("no", "full")[number % 2]).val
            dataset = ImageDataset(source, EVAL)
            for index in range(len(source)):
                batch = dataset.__getitems__([Key(0, index)])
                if batch.error:
                    one_line(DataError(batch.error), "val.zip@/")
            opened += 1
        except DataError as error:
            one_line(error, str(tmp_path))
            refused += 1
        except Exception as error:
            raise AssertionError(f"mutant {number} of seed {seed}") from error
    assert opened > count / 10 and refused > count / 10
