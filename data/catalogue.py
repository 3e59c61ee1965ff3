"""What a data set is: a description and a reader, one entry of DATASETS, one file of data/sets.

    @data_set(
        "flowers",
        num_classes=102,
        mean=(0.433, 0.382, 0.296),
        std=(0.295, 0.246, 0.273),
        layout="train/<flower>/<image> and val/<flower>/<image>",
    )
    def flowers(request: Request) -> Sources: ...

The key DATA.DATASET, the number of outputs, the normalisation and the rules of the other DATA keys
all follow from the entry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data.sources import Sources
from registry import Registry

DATASETS = Registry("data set")
Values = tuple[float, ...]  # one per channel
_LUMA = (0.299, 0.587, 0.114)  # weights of R, G, B in a grey image


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a run asks of a reader; a reader uses what concerns it.

    dataset: DATA.DATASET, for messages.
    root: DATA.DATA_PATH.
    train: whether the training images are wanted.
    size: (h, w) of the model's input, pixels.
    interpolation: how to get there. Both are for readers of `model_sized` arrays.
    download: fetch what is missing.
    zipped, cache: read archives, and how much of them to keep in memory (no, full, part).
    rank, world_size: whose part.
    """

    dataset: str
    root: Path
    train: bool = True
    size: tuple[int, int] = (224, 224)
    interpolation: str = "bicubic"
    download: bool = False
    zipped: bool = False
    cache: str = "no"
    rank: int = 0
    world_size: int = 1


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """One data set.

    Args:
        name: as in DATA.DATASET.
        num_classes: None where they are counted in what the reader finds.
        mean, std: of the training images' values in [0, 1]; one number, or one per R, G and B.
        layout: what DATA.DATA_PATH must hold, in words.
        read: Request -> Sources. Raises: DataError, one line.
        class_names: readable names for the reader's `Sources.classes`, in label order.
        needs_path: False where the images come with a package.
        zip: whether the reader knows DATA.ZIP_MODE.
        download: whether the reader knows DATA.DOWNLOAD.
        model_sized: the reader's images are grey arrays (N, h, w) of the requested size: they are
            batched as they are, and AUG.AFFINE applies to them.
    Raises: ValueError for a field that cannot be right.
    """

    name: str
    num_classes: int | None
    mean: Values
    std: Values
    layout: str
    read: Callable[[Request], Sources]
    class_names: Callable[[list[str]], list[str]] = list
    needs_path: bool = True
    zip: bool = False
    download: bool = False
    model_sized: bool = False

    def __post_init__(self):
        problems = {
            "num_classes": self.num_classes is not None and self.num_classes < 1,
            "mean": len(self.mean) not in (1, 3),
            "std": len(self.std) != len(self.mean) or min(self.std) <= 0,
            "layout": not self.layout.strip(),
        }
        for field, wrong in problems.items():
            if wrong:
                raise ValueError(
                    f"data set {self.name!r}: {field} is {getattr(self, field)!r}; see the"
                    " docstring of data.catalogue.DataSet"
                )

    def statistics(
        self, channels: int, mean: Values = (), std: Values = ()
    ) -> tuple[Values, Values]:
        """Mean and std for `channels` (1 or 3) channels: the given ones where not empty, else the
        data set's own.
        """
        return _fit(tuple(mean) or self.mean, channels), _fit(tuple(std) or self.std, channels)


def data_set(name: str, **description) -> Callable:
    """Decorator of a reader: registers `DataSet(name=name, read=reader, **description)`.

    Raises: TypeError for a field left out, ValueError for a name taken or a field that is wrong.
    """

    def register(read: Callable[[Request], Sources]) -> Callable[[Request], Sources]:
        DATASETS.register(name, DataSet(name=name, read=read, **description))
        return read

    return register


def _fit(values: Values, channels: int) -> Values:
    if len(values) == channels:
        return tuple(values)
    if len(values) == 1:
        return tuple(values) * channels
    return (sum(weight * value for weight, value in zip(_LUMA, values)),)
