"""Lists of image files in compact buffers, and the scan of class folders."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class FileList:
    """Names and labels of N images as two buffers, one offset array and no Python object per image.

    Workers are forked: a list of str would be copied page by page as reference counts change; these
    buffers never are.

    Args:
        pairs: (name, label) of each image; names are relative to whatever root the reader adds.
    """

    def __init__(self, pairs: Iterable[tuple[str, int]]):
        names, ends, labels = bytearray(), array("q", [0]), array("q")
        for name, label in pairs:
            names += os.fsencode(name)
            ends.append(len(names))
            labels.append(label)
        self._names = bytes(names)
        self._ends = np.array(ends, dtype=np.int64)
        self.labels = np.array(labels, dtype=np.int64)  # (N,)

    def __len__(self) -> int:
        return len(self.labels)

    def add_to(self, digest: Any) -> None:
        """Feeds the names, in order, to a hashlib object."""
        digest.update(self._ends.astype("<i8").tobytes())
        digest.update(self._names)

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self._names[self._ends[index] : self._ends[index + 1]])


def class_folders(folder: str | os.PathLike) -> list[str]:
    """Sorted names of the sub-folders; hidden ones (.ipynb_checkpoints) are no classes. [] where
    `folder` is none.
    """
    if not os.path.isdir(folder):
        return []
    with os.scandir(folder) as entries:
        return sorted(
            entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")
        )


def is_image(name: str) -> bool:
    """Whether the extension is one of EXTENSIONS and the file is not hidden (macOS leaves ._x.jpg
    beside x.jpg).
    """
    return name.lower().endswith(EXTENSIONS) and not os.path.basename(name).startswith(".")


def images_below(root: Path, folder: str) -> Iterator[str]:
    """Paths, relative to `root`, of the images below root/folder at any depth, in torchvision's
    ImageFolder order.
    """
    for parent, _, names in sorted(os.walk(root / folder, followlinks=True)):
        for name in sorted(names):
            if is_image(name):
                yield os.path.relpath(os.path.join(parent, name), root)


def scan_classes(root: str | os.PathLike, classes: list[str]) -> FileList:
    """All images of root/<class>/; the label is the position in `classes`."""
    root = Path(root)
    return FileList(
        (path, label) for label, name in enumerate(classes) for path in images_below(root, name)
    )
