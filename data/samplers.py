"""Which images form which batch, on which rank, in which epoch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from data.errors import DataError
from data.randomness import ORDER, Key, stream


class TrainBatches:
    """Batches of one rank, drawn from one global order per epoch that depends on (seed, epoch)
    alone.

    Global batch b is images [b G, (b + 1) G) of the order, G = batch_size * world_size; rank r
    takes every world_size-th of them. So all ranks have equally many batches, and runs with equal G
    see equal global batches whatever their world size. The last incomplete global batch is left
    out.

    Args:
        length: number of images N.
        batch_size: images per rank.
        copies: repeated augmentation; an epoch still has N samples, of N / copies images, each
            `copies` times.
    Raises: DataError if there is not one full global batch.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        copies: int = 1,
    ):
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.copies = copies
        self.epoch = 0
        self.start = 0
        if len(self) == 0:
            raise DataError(
                f"DATA.BATCH_SIZE {batch_size} x {world_size} process(es) exceeds the {length}"
                f" training images; at most {length // world_size} per process"
            )

    def __len__(self) -> int:
        return self.length // (self.batch_size * self.world_size)

    def order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices and copy numbers, (N,) each, of all ranks together."""
        images = stream(ORDER, self.seed, epoch).permutation(self.length)
        images = images[: -(-self.length // self.copies)]
        copies = np.tile(np.arange(self.copies), len(images))
        return np.repeat(images, self.copies)[: self.length], copies[: self.length]

    def __iter__(self) -> Iterator[list[Key]]:
        # bound now: an iterator does not follow later changes
        return self._batches(self.epoch, self.start)

    def _batches(self, epoch: int, start: int) -> Iterator[list[Key]]:
        indices, copies = (part[self.rank :: self.world_size] for part in self.order(epoch))
        for first in range(start * self.batch_size, len(self) * self.batch_size, self.batch_size):
            chosen = slice(first, first + self.batch_size)
            pairs = zip(indices[chosen].tolist(), copies[chosen].tolist())
            yield [Key(epoch, index, copy) for index, copy in pairs]


class EvalBatches:
    """Batches that show image i to rank i mod world_size, once: no padding, so ranks may differ by
    one image.

    Args:
        shuffle: a fixed random order instead of the file order; the result of an evaluation does
            not depend on it.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = False,
        seed: int = 0,
    ):
        order = stream(ORDER, seed, 0).permutation(length) if shuffle else np.arange(length)
        self.indices = order[rank::world_size]
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        for first in range(0, len(self.indices), self.batch_size):
            chosen = self.indices[first : first + self.batch_size]
            yield [Key(0, index) for index in chosen.tolist()]
