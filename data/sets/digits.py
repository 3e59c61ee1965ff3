"""scikit-learn's bundled handwritten digits: 1 797 real 8x8 images, the data set that needs no
download.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
    Repository, 1998.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from data.catalogue import Request, data_set
from data.errors import DataError
from data.sources import ArraySource, Sources

# Every TEST_EVERY-th image of each class, from its first on, is a test image: 1 433 training and
# 364 test images.
TEST_EVERY = 5
IMAGES, LARGEST = 1797, 2**33


@data_set(
    "digits",
    num_classes=10,
    mean=(0.305,),
    std=(0.376,),
    layout="nothing: the images come with scikit-learn",
    needs_path=False,
    model_sized=True,
)
def digits(request: Request) -> Sources:
    """The digits enlarged to the model's size, grey, by bilinear or bicubic interpolation."""
    check_size(request.size)
    images, labels = load()
    test = is_test(labels)

    def part(title: str, chosen: np.ndarray) -> ArraySource:
        enlarged = enlarge(images[chosen], request.size, request.interpolation)
        return ArraySource(title, enlarged, labels[chosen])

    train = part("digits (train)", ~test) if request.train else None
    return Sources(train, part("digits (test)", test), [str(digit) for digit in range(10)])


def load() -> tuple[np.ndarray, np.ndarray]:
    """Images (1797, 8, 8) with values 0..16 and labels (1797,). Raises: DataError without
    scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits  # here: it takes a second to import
    except ImportError:
        raise DataError(
            "DATA.DATASET digits needs scikit-learn, for its images: pip install scikit-learn"
        ) from None
    bundle = load_digits()
    return bundle.images, bundle.target.astype(np.int64)


def is_test(labels: np.ndarray) -> np.ndarray:
    """(N,) bool: which images form the test split."""
    test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        test[np.flatnonzero(labels == label)[::TEST_EVERY]] = True
    return test


def check_size(size: tuple[int, int]) -> None:
    """Refuses a size at which all digits, as float32, would take more than LARGEST bytes."""
    needed = 4 * IMAGES * size[0] * size[1]
    if needed > LARGEST:
        raise DataError(
            f"DATA.IMG_SIZE {size[0]} x {size[1]}: the digits would take {needed / 2**30:.0f} GiB,"
            f" more than {LARGEST / 2**30:.0f}; they are 8 x 8 pixels, choose a smaller size"
        )


def enlarge(images: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """(N, 8, 8) in 0..16 -> (N, h, w) uint8. Interpolations other than bicubic mean bilinear."""
    levels = torch.from_numpy(images).float()[:, None] * (255 / 16)
    if levels.shape[-2:] != tuple(size):
        mode = "bicubic" if interpolation == "bicubic" else "bilinear"
        levels = F.interpolate(levels, size, mode=mode, align_corners=False)
    return levels[:, 0].round().clamp(0, 255).to(torch.uint8).numpy()
