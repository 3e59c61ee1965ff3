"""The bundled digits and their batched affine augmentation."""

import time

import numpy as np
import pytest
import torch

from data.affine import Affine, ArrayBatches, warp
from data.catalogue import DATASETS
from data.errors import DataError
from data.randomness import Key
from data.sets.digits import enlarge, is_test, load
from data.sources import Sources
from tests.data.fakes import read

STATS = {"mean": (0.3,), "std": (0.4,)}


AFFINE = Affine()


def digits(size: tuple[int, int]) -> Sources:
    return read("digits", size=size, interpolation="bilinear")


def batches(affine=AFFINE, **options) -> ArrayBatches:
    return ArrayBatches(digits((16, 16)).train, channels=1, **STATS, affine=affine, **options)


def test_the_split_is_1433_and_364_stratified_and_fixed():
    images, labels = load()
    test = is_test(labels)
    assert ((~test).sum(), test.sum()) == (1433, 364)
    assert np.bincount(labels[test]).tolist() == [-(-count // 5) for count in np.bincount(labels)]
    assert test[:10].all() and not test[10:20].any()  # the file begins 0 1 ... 9 0 1 ... 9
    sources = digits((8, 8))
    assert np.array_equal(sources.val.images, np.round(images[test] * 255 / 16).astype(np.uint8))


def test_the_statistics_are_those_of_the_training_images():
    images, labels = load()
    levels = images[~is_test(labels)] / 16
    assert np.allclose(
        [levels.mean(), levels.std()], np.ravel(DATASETS["digits"].statistics(1)), atol=1e-3
    )


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_enlarging_keeps_the_picture(interpolation):
    images, _ = load()
    large = enlarge(images[:20], (32, 48), interpolation)
    assert large.shape == (20, 32, 48) and large.dtype == np.uint8
    blocks = large.reshape(20, 8, 4, 8, 6).mean((2, 4))
    assert all(
        np.corrcoef(block.ravel(), image.ravel())[0, 1] > 0.93
        for block, image in zip(blocks, images)
    )


def matrix(rows) -> torch.Tensor:
    return torch.tensor([rows], dtype=torch.float32)


def test_warping_by_the_identity_a_mirror_a_shift_and_a_quarter_turn():
    image = torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    cases = {
        "identity": ([[1, 0, 0], [0, 1, 0]], image),
        "mirror": ([[-1, 0, 0], [0, 1, 0]], image.flip(3)),
        "quarter turn": ([[0, -1, 0], [1, 0, 0]], image.rot90(1, (2, 3))),
        "one pixel": (
            [[1, 0, 2 / 6], [0, 1, 0]],
            torch.cat([image[..., 1:], torch.zeros(1, 1, 6, 1)], 3),
        ),
    }
    for name, (rows, expected) in cases.items():
        assert torch.allclose(warp(image, matrix(rows)), expected, atol=1e-5), name


def test_drawn_matrices_have_the_stated_ranges():
    draws = np.random.RandomState(0).uniform(-1, 1, (5000, 6))
    maps = Affine(shear=0.0).matrices(draws, (16, 16)).double()
    scale = maps[:, :, :2].det().sqrt()
    angle = torch.atan2(maps[:, 1, 0], maps[:, 0, 0])
    for value, low, high in (
        (scale, 0.88, 1.12),
        (angle, -0.2, 0.2),
        (maps[:, 0, 2], -0.15, 0.15),
        (maps[:, 1, 2], -0.15, 0.15),
    ):
        assert low - 1e-6 <= value.min() < low + 0.01 and high - 0.01 < value.max() <= high + 1e-6


def test_rotation_keeps_shapes_on_non_square_images():
    draws = np.zeros((1, 6))
    draws[0, 0] = 1
    a = Affine(rotation=np.pi / 2).matrices(draws, (10, 20))[0]  # pixels: x' = -y, y' = x
    point = torch.tensor([0.5, 0.0])  # 5 pixels to the right of the centre
    assert torch.allclose(
        a[:, :2] @ point, torch.tensor([0.0, 1.0]), atol=1e-6
    )  # 5 pixels below it


def test_a_sample_depends_on_seed_epoch_and_index_but_not_on_its_batch():
    data, other = batches(seed=1), batches(seed=2)
    keys = [Key(3, index) for index in (5, 900, 17, 3)]
    whole = data.__getitems__(keys).images
    for position, key in enumerate(keys):
        assert torch.equal(data.__getitems__([key]).images[0], whole[position])
    assert not torch.equal(whole, data.__getitems__([Key(4, key.index) for key in keys]).images)
    assert not torch.equal(whole, other.__getitems__(keys).images)


def test_copies_of_an_image_differ_and_grey_is_repeated_over_channels():
    data = ArrayBatches(
        digits((16, 16)).train,
        channels=3,
        mean=(0.3,) * 3,
        std=(0.4,) * 3,
        affine=Affine(),
        copies=2,
    )
    images = data.__getitems__([Key(0, 7, 0), Key(0, 7, 1)]).images
    assert (
        images.shape == (2, 3, 16, 16)
        and not torch.equal(images[0], images[1])
        and torch.equal(images[:, 0], images[:, 2])
    )


def test_mirroring_happens_with_its_probability():
    data = batches(Affine(0, 0, 0, 0), hflip=0.25)
    plain = batches(None)
    keys = [Key(0, index) for index in range(1433)]
    mirrored = (
        data.__getitems__(keys).images - plain.__getitems__(keys).images.flip(3)
    ).abs().amax((1, 2, 3)) < 1e-3
    assert 0.2 < mirrored.float().mean() < 0.3


def test_erasing_is_a_function_of_the_key():
    from timm.data.random_erasing import RandomErasing

    erasing = RandomErasing(1.0, mode="pixel", device="cpu")
    data = batches(None, erasing=erasing)
    other = batches(None, erasing=erasing, seed=1)
    assert not torch.equal(data[4][0], other[4][0])
    state = torch.get_rng_state()
    first, second = (
        data.__getitems__([Key(0, 4), Key(0, 9)]).images,
        data.__getitems__([Key(0, 9)]).images,
    )
    assert torch.equal(first[1], second[0]) and not torch.equal(first[1], batches(None)[9][0])
    assert torch.equal(torch.get_rng_state(), state)


def test_an_epoch_is_cheap():
    data = ArrayBatches(
        digits((32, 32)).train, channels=3, mean=(0.3,) * 3, std=(0.4,) * 3, affine=Affine()
    )
    started = time.process_time()
    for first in range(0, 1433, 64):
        data.__getitems__([Key(0, index) for index in range(first, min(first + 64, 1433))])
    assert time.process_time() - started < 1.0  # about 0.1 s; the rest is room for a busy machine


def test_digits_of_a_size_that_no_machine_holds_are_refused():
    with pytest.raises(DataError, match="4096 x 4096: the digits would take 112 GiB"):
        read("digits", size=(4096, 4096))


def test_an_evaluation_enlarges_no_training_digits(monkeypatch):
    enlarged = []

    def record(images, *_):
        enlarged.append(len(images))
        return images

    monkeypatch.setattr("data.sets.digits.enlarge", record)
    assert read("digits", train=False).train is None and enlarged == [364]
