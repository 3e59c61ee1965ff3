"""Random affine maps of whole batches: an epoch of the digits costs about 0.1 s on one core."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from data.datasets import Batch
from data.randomness import AFFINE, Key, preserved_rng, seed_sample, stream
from data.sources import ArraySource


@dataclass(frozen=True)
class Affine:
    """Ranges, each uniform in +-value: rotation in rad, relative scale, shear (x per y), shift in
    half image sides.
    """

    rotation: float = 0.2
    scale: float = 0.12
    shear: float = 0.15
    shift: float = 0.15

    def matrices(self, draws: np.ndarray, size: tuple[int, int], hflip: float = 0.0) -> Tensor:
        """Output -> input coordinates, both in [-1, 1], of N images.

        draws: (N, 6), uniform in [-1, 1): rotation, scale, shear, shift x, shift y, flip.
        hflip: probability of mirroring.

        Returns (N, 2, 3) float32, rows x and y. Computed for a whole epoch at once, so independent
        of the batches.
        """
        angle = draws[:, 0] * self.rotation
        scale = 1 + draws[:, 1] * self.scale
        shear = draws[:, 2] * self.shear
        cos, sin = scale * np.cos(angle), scale * np.sin(angle)
        aspect = size[0] / size[1]
        mirror = np.where((draws[:, 5] + 1) / 2 < hflip, -1.0, 1.0)
        rows = [
            [cos * mirror, (cos * shear - sin) * aspect, draws[:, 3] * self.shift],
            [sin * mirror / aspect, sin * shear + cos, draws[:, 4] * self.shift],
        ]
        return torch.from_numpy(np.array(rows).transpose(2, 0, 1).astype(np.float32))


class ArrayBatches(Dataset):
    """Grey images of one size in memory, normalised and perhaps mapped, a batch at a time.

    Args:
        source: images (N, h, w) uint8.
        channels: how often the grey channel is repeated.
        mean, std: per channel, of values in [0, 1].
        affine: None for evaluation.
        hflip: probability of mirroring.
        erasing: timm's RandomErasing or None.
        copies: repetitions of an image in an epoch.
    """

    def __init__(
        self,
        source: ArraySource,
        *,
        channels: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        affine: Affine | None = None,
        hflip: float = 0.0,
        erasing=None,
        seed: int = 0,
        copies: int = 1,
    ):
        self.source = source
        self.channels = channels
        self.affine = affine
        self.hflip = hflip
        self.erasing = erasing
        self.seed = seed
        self.copies = copies
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)
        self.reading: Tensor | None = None  # the loader's; unused, as memory never stalls
        self.may_stall = False
        self._images = torch.from_numpy(source.images)[:, None]  # (N, 1, h, w)
        self._labels = torch.from_numpy(source.labels)
        self._epoch = -1  # the epoch of _matrices
        self._matrices: Tensor | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        batch = self.__getitems__([Key(0, index)])
        return batch.images[0], int(batch.targets[0])

    def __getitems__(self, keys: list[Key]) -> Batch:
        indices = torch.tensor([key.index for key in keys])
        images = self._images[indices].float() / 255  # (B, 1, h, w)
        if self.affine is not None:
            rows = indices + len(self) * torch.tensor([key.copy for key in keys])
            images = warp(images, self._matrices_of(keys[0].epoch)[rows])
        images = (images.expand(-1, self.channels, -1, -1) - self.mean) / self.std
        if self.erasing is not None:
            self._erase(images, keys)
        return Batch(images, self._labels[indices])

    def _matrices_of(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            draws = stream(AFFINE, self.seed, epoch).uniform(-1, 1, (self.copies * len(self), 6))
            size = tuple(self._images.shape[-2:])
            self._matrices = self.affine.matrices(draws, size, self.hflip)
            self._epoch = epoch
        return self._matrices

    def _erase(self, images: Tensor, keys: list[Key]) -> None:
        with preserved_rng():
            for image, key in zip(images, keys):
                seed_sample(self.seed, key)
                self.erasing(image)


def warp(images: Tensor, matrices: Tensor) -> Tensor:
    """Bilinear samples of images (B, C, h, w) at matrices (B, 2, 3) times the output's coordinates;
    0 outside.

    The grid is formed by products and sums of one rounding each, not by a matrix product, whose
    rounding may depend on the number of threads and so on the number of workers.
    """
    height, width = images.shape[-2:]
    x = torch.arange(1 - width, width, 2, dtype=torch.float32) / width
    y = torch.arange(1 - height, height, 2, dtype=torch.float32) / height
    a = matrices[..., None, None]  # (B, 2, 3, 1, 1)
    grid = a[:, :, 0] * x + a[:, :, 1] * y[:, None] + a[:, :, 2]  # (B, 2, h, w)
    return F.grid_sample(
        images,
        grid.permute(0, 2, 3, 1),
        mode="bilinear",
        padding_mode="zeros",
        align_corners=False,
    )
