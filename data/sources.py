"""Where images come from. A source has a length, labels, a name for messages, and read(index) ->
RGB image.

source.labels         (N,) int64
source.name(index)    what to call image `index` in a message
source.read(index)    PIL image, RGB; raises UnreadableImage
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from data.errors import printable
from data.files import FileList
from data.images import decode, read_file


class Source(Protocol):
    """What the data set classes ask of a source."""

    labels: np.ndarray

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def read(self, index: int) -> Image.Image: ...


class FileSource:
    """Images in files below one root."""

    def __init__(self, root: str | os.PathLike, files: FileList):
        self.root = os.fspath(root)
        self.files = files
        self.labels = files.labels

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        """Where the system finds image `index`."""
        return os.path.join(self.root, self.files[index])

    def name(self, index: int) -> str:
        return printable(self.path(index))

    def read(self, index: int) -> Image.Image:
        return decode(read_file(self.path(index)))


class ArraySource:
    """Images held in memory. images: (N, H, W) or (N, H, W, 3) uint8; labels: (N,)."""

    def __init__(self, title: str, images: np.ndarray, labels: np.ndarray):
        self.title = title
        self.images = images
        self.labels = np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"{self.title}, image {index}"

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index]).convert("RGB")


@dataclass(frozen=True)
class Sources:
    """The two splits of a data set. train is None when only the evaluation was asked for."""

    train: Source | None
    val: Source
    classes: list[str]  # as the data set itself calls them: folder names, wnids, words
