"""Street View House Numbers, cropped: 73 257 training and 26 032 test images of 32x32.

Source: Netzer et al., Reading Digits in Natural Images with Unsupervised Feature Learning, 2011.
"""

import numpy as np

from data.catalogue import Request, data_set
from data.downloads import read_split
from data.sources import ArraySource, Sources

LAYOUT = "train_32x32.mat and test_32x32.mat"


@data_set(
    "svhn",
    num_classes=10,
    mean=(0.4377, 0.4438, 0.4728),
    std=(0.1980, 0.2010, 0.1970),
    layout=LAYOUT,
    download=True,
)
def svhn(request: Request) -> Sources:
    """torchvision's reader; label 0 is the digit 0."""
    train = _split(request, "train") if request.train else None
    return Sources(train, _split(request, "test"), [str(digit) for digit in range(10)])


def _split(request: Request, name: str) -> ArraySource:
    split = read_split("SVHN", request, LAYOUT, split=name)
    images = split.data.transpose(0, 2, 3, 1)  # (N, 3, 32, 32) -> (N, 32, 32, 3)
    return ArraySource(f"svhn ({name})", np.ascontiguousarray(images), split.labels)
