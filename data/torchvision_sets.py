"""CIFAR-10, CIFAR-100 and SVHN through torchvision's readers, held in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torchvision import datasets

from data.errors import DataError, layout_error
from data.sources import ArraySource, Sources

_EXPECTED = {
    "cifar10": "cifar-10-batches-py/ (data_batch_1 ... data_batch_5, test_batch, batches.meta)",
    "cifar100": "cifar-100-python/ (train, test, meta)",
    "svhn": "train_32x32.mat and test_32x32.mat",
}


def cifar(
    root: Path, train: bool = True, download: bool = False, dataset: str = "cifar10"
) -> Sources:
    """CIFAR-10 or -100: 50 000 training and 10 000 test images of 32x32."""
    reader = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[dataset]
    splits = [
        _read(reader, dataset, root, download, train=flag)
        for flag in (True, False)
        if train or not flag
    ]
    sources = [
        ArraySource(f"{dataset} ({name})", split.data, split.targets)
        for name, split in zip(("test", "train"), reversed(splits))
    ]
    return Sources(sources[1] if train else None, sources[0], list(splits[-1].classes))


def svhn(root: Path, train: bool = True, download: bool = False) -> Sources:
    """Street View House Numbers, cropped: 73 257 training and 26 032 test images of 32x32; label 0
    is the digit 0.
    """
    sources = {}
    for name in ("train", "test") if train else ("test",):
        split = _read(datasets.SVHN, "svhn", root, download, split=name)
        images = np.ascontiguousarray(
            split.data.transpose(0, 2, 3, 1)
        )  # (N, 3, 32, 32) -> (N, 32, 32, 3)
        sources[name] = ArraySource(f"svhn ({name})", images, split.labels)
    return Sources(sources.get("train"), sources["test"], [str(digit) for digit in range(10)])


def _read(reader, dataset: str, root: Path, download: bool, **split):
    try:
        if not download:
            return reader(root, **split)
        from filelock import (
            FileLock,
        )  # comes with torch; only here, as the folder must be writable for it

        root.mkdir(parents=True, exist_ok=True)
        with FileLock(
            root / ".download.lock"
        ):  # one process of the machine downloads, the others find it done
            return reader(root, download=True, **split)
    except (RuntimeError, OSError) as error:
        if download:
            raise DataError(
                f"DATA.DATASET {dataset}: the download into '{root}' failed ({error}); fetch it"
                f" elsewhere and put there {_EXPECTED[dataset]}"
            ) from None
        hint = (
            "missing files or wrong checksums; DATA.DOWNLOAD True fetches them"
            if root.exists()
            else "DATA.DOWNLOAD True fetches them"
        )
        raise layout_error(dataset, root, _EXPECTED[dataset], hint=hint) from None
