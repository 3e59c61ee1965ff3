"""CIFAR and SVHN from files in their own formats."""

import numpy as np
import pytest
from torchvision import datasets

from data.errors import DataError
from tests.data import fakes
from tests.data.fakes import read


@pytest.mark.parametrize(
    "name, reader, train, classes",
    [("cifar10", datasets.CIFAR10, 20, 10), ("cifar100", datasets.CIFAR100, 4, 100)],
)
def test_cifar_is_read_as_by_torchvision(tmp_path, monkeypatch, name, reader, train, classes):
    fakes.cifar(tmp_path, reader, monkeypatch)
    sources = read(name, tmp_path)
    assert (len(sources.train), len(sources.val), len(sources.classes)) == (train, 4, classes)
    image, label = reader(tmp_path, train=False)[2]
    assert (
        np.array_equal(np.asarray(sources.val.read(2)), np.asarray(image))
        and sources.val.labels[2] == label
    )
    assert read(name, tmp_path, train=False).train is None


def test_svhn_is_read_as_by_torchvision_and_ten_means_zero(tmp_path, monkeypatch):
    fakes.svhn(tmp_path, datasets.SVHN, monkeypatch)
    sources = read("svhn", tmp_path)
    assert sources.val.labels.tolist() == [1, 2, 3, 4, 5, 0]
    assert np.array_equal(
        np.asarray(sources.train.read(3)), np.asarray(datasets.SVHN(tmp_path, split="train")[3][0])
    )


@pytest.mark.parametrize(
    "name, expected", [("cifar10", "cifar-10-batches-py/"), ("svhn", "train_32x32.mat")]
)
def test_a_missing_or_damaged_set_is_one_line_that_names_the_files(tmp_path, name, expected):
    for root in (tmp_path, tmp_path / "gone"):
        with pytest.raises(
            DataError, match=f"must hold {expected}.*found: .*DATA.DOWNLOAD True"
        ) as caught:
            read(name, root)
        assert "\n" not in str(caught.value)


def test_a_failed_download_says_what_to_fetch(tmp_path, monkeypatch):
    def offline(self):
        raise OSError("network is unreachable")

    monkeypatch.setattr(datasets.CIFAR10, "download", offline)
    with pytest.raises(
        DataError, match="download into .* failed .network is unreachable.*cifar-10-batches-py"
    ):
        read("cifar10", tmp_path / "new", download=True)


def test_a_download_that_is_already_there_fetches_nothing(tmp_path, monkeypatch):
    fakes.cifar(tmp_path, datasets.CIFAR10, monkeypatch)
    assert len(read("cifar10", tmp_path, download=True).train) == 20
