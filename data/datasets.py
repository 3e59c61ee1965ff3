"""Data sets that answer a list of keys with one batch, errors included: an error crosses processes
as a value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate, get_worker_info

from data.errors import DataError
from data.images import UnreadableImage
from data.randomness import REPLACEMENT, Key, preserved_rng, seed_sample, stream
from data.sources import ArraySource, Source

# Unreadable images in a row after which replacing one more is no longer sensible: the storage is
# gone.
_ATTEMPTS = 10


class Batch(NamedTuple):
    """The result of a worker. `replaced`: "path: reason" of each unreadable image; `error`: text
    of a DataError, or ''.
    """

    images: Tensor | None = None  # (B, C, H, W) float32, normalised
    targets: Tensor | None = None  # (B,) int64
    replaced: tuple[str, ...] = ()
    error: str = ""


class ImageDataset(Dataset):
    """Reads and transforms the images of a source.

    A training image that cannot be read is replaced by another, a function of (seed, key), and
    reported in the batch; a validation image that cannot be read is an error, since a score over
    other images is another score.

    Args:
        transform: RGB image -> (C, H, W) tensor; draws from the global generators, which are seeded
            per sample.
    """

    def __init__(
        self,
        source: Source,
        transform: Callable[[Image.Image], Tensor],
        seed: int = 0,
        training: bool = False,
    ):
        self.source = source
        self.transform = transform
        self.seed = seed
        self.training = training
        # (workers or 1,) int64, shared: the image each worker is at; set by the loader
        self.reading: Tensor | None = None
        self.may_stall = not isinstance(source, ArraySource)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Sample `index` of epoch 0, for looking at data. Raises: DataError."""
        batch = self.__getitems__([Key(0, index)])
        if batch.error:
            raise DataError(batch.error)
        return batch.images[0], int(batch.targets[0])

    def __getitems__(self, keys: list[Key]) -> Batch:
        replaced: list[str] = []
        try:
            with preserved_rng():
                samples = [self._sample(key, replaced) for key in keys]
        except DataError as error:
            return Batch(error=str(error))
        finally:
            self._announce(-1)
        images, targets = zip(*samples)
        return Batch(
            images=default_collate(list(images)),
            targets=torch.tensor(targets, dtype=torch.int64),
            replaced=tuple(replaced),
        )

    def _sample(self, key: Key, replaced: list[str]) -> tuple[Tensor, int]:
        index, image = self._read(key, replaced)
        seed_sample(self.seed, key)
        return self.transform(image), int(self.source.labels[index])

    def _read(self, key: Key, replaced: list[str]) -> tuple[int, Image.Image]:
        others = stream(REPLACEMENT, self.seed, *key) if self.training else None
        index = key.index
        for _ in range(_ATTEMPTS):
            self._announce(index)
            try:
                return index, self.source.read(index)
            except UnreadableImage as reason:
                note = f"{self.source.name(index)}: {reason}"
            if others is None:
                raise DataError(
                    f"validation image cannot be read: {note}; restore the file, an evaluation"
                    " leaves no image out"
                )
            replaced.append(note)
            index = int(others.randint(len(self)))
        raise DataError(f"{_ATTEMPTS} training images in a row cannot be read, the last: {note}")

    def _announce(self, index: int) -> None:
        if self.reading is not None:
            worker = get_worker_info()
            self.reading[worker.id if worker is not None else 0] = index
