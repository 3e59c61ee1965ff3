"""CIFAR-10 and CIFAR-100: 50 000 training and 10 000 test images of 32x32.

Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
"""

from data.catalogue import Request, data_set
from data.downloads import read_split
from data.sources import ArraySource, Sources

LAYOUT_10 = "cifar-10-batches-py/ (data_batch_1 ... data_batch_5, test_batch, batches.meta)"
LAYOUT_100 = "cifar-100-python/ (train, test, meta)"


@data_set(
    "cifar10",
    num_classes=10,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    layout=LAYOUT_10,
    download=True,
)
def cifar10(request: Request) -> Sources:
    """torchvision's reader."""
    return _cifar(request, "CIFAR10", LAYOUT_10)


@data_set(
    "cifar100",
    num_classes=100,
    mean=(0.5070, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
    layout=LAYOUT_100,
    download=True,
)
def cifar100(request: Request) -> Sources:
    """torchvision's reader; the fine labels."""
    return _cifar(request, "CIFAR100", LAYOUT_100)


def _cifar(request: Request, reader: str, layout: str) -> Sources:
    test = read_split(reader, request, layout, train=False)
    train = None
    if request.train:
        split = read_split(reader, request, layout, train=True)
        train = ArraySource(f"{request.dataset} (train)", split.data, split.targets)
    val = ArraySource(f"{request.dataset} (test)", test.data, test.targets)
    return Sources(train, val, list(test.classes))
