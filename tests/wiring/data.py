"""A few images in three classes, one of them unreadable, or a few digits, and what is seen."""

import pickle
from contextlib import contextmanager
from itertools import islice
from typing import Any
from unittest.mock import patch

import torch

from config import ConfigError
from data import DataError, build_data
from tests.wiring.cases import Case, config_of
from tests.wiring.runs import few_digits, plain
from utils import seed_everything

FOLDER = {
    "DATA.DATASET": "folder",
    "DATA.DATA_PATH": "{folder}",
    "DATA.IMG_SIZE": 40,
    "DATA.BATCH_SIZE": 4,
    "DATA.NUM_WORKERS": 0,
    "DEVICE": "cpu",
}
DIGITS = FOLDER | {
    "DATA.DATASET": "digits",
    "DATA.DATA_PATH": "",
    "DATA.IMG_SIZE": 16,
    "AUG.AUTO_AUGMENT": "none",
    "AUG.AFFINE": True,
}
ALWAYS_ERASED = {"AUG.REPROB": 1.0}
BY_CUDA = {"DEVICE": "auto"}
ZIPPED = {"DATA.DATASET": "imagenet", "DATA.DATA_PATH": "{zip}", "DATA.ZIP_MODE": True}
UNMIXED = {"AUG.MIXUP": 0.0, "AUG.CUTMIX": 0.0}
DATA_CASES = (
    Case("DATA.BATCH_SIZE", 2),
    Case("DATA.BATCH_SIZE", 2, DIGITS),
    Case("DATA.BATCH_SIZE", 3),
    Case("DATA.DATA_PATH", "{other}"),
    Case("DATA.DATA_PATH", ""),
    Case("DATA.DATASET", "digits"),
    Case("DATA.DOWNLOAD", True, {"DATA.DATASET": "cifar10"}),
    Case("DATA.DOWNLOAD", True, {"DATA.DATASET": "svhn"}),
    Case("DATA.IMG_SIZE", 48),
    Case("DATA.IMG_SIZE", (40, 48)),
    Case("DATA.IMG_SIZE", 8, DIGITS),
    *(
        Case("DATA.INTERPOLATION", name, {"AUG.AUTO_AUGMENT": "none"})
        for name in ("random", "bilinear", "lanczos", "hamming")
    ),
    Case("DATA.INTERPOLATION", "bilinear", DIGITS),
    Case("DATA.CROP_RATIO", 0.5),
    *(
        Case(
            f"DATA.{leaf}",
            (0.1, 0.2, 0.3),
            base | {"DATA.MEAN": (0.5,) * 3, "DATA.STD": (0.5,) * 3},
        )
        for leaf in ("MEAN", "STD")
        for base in ({}, DIGITS)
    ),
    Case("DATA.ZIP_MODE", False, ZIPPED),
    Case("DATA.CACHE_MODE", "no", ZIPPED),
    Case("DATA.CACHE_MODE", "full", ZIPPED),
    Case("DATA.PIN_MEMORY", False, BY_CUDA),
    Case("DATA.PIN_MEMORY", False, DIGITS | BY_CUDA),
    Case("DEVICE", "cpu", BY_CUDA),
    Case("DATA.NUM_WORKERS", 2),
    Case("DATA.NUM_WORKERS", 2, DIGITS),
    Case("DATA.TIMEOUT", 7.0),
    Case("DATA.TIMEOUT", 7.0, {"DATA.NUM_WORKERS": 2}),
    Case("DATA.REPEATED_AUG", 2),
    Case("DATA.REPEATED_AUG", 2, DIGITS),
    Case("DATA.CORRUPT_LIMIT", 0),
    Case("MODEL.SWIN.IN_CHANS", 1),
    Case("MODEL.SWIN.IN_CHANS", 1, DIGITS),
    Case("MODEL.LABEL_SMOOTHING", 0.0),
    Case("MODEL.NUM_CLASSES", 4),
    Case("SEED", 1),
    Case("SEED", 1, DIGITS),
    Case("SEED", 1, {"TEST.SHUFFLE": True}),
    Case("AUG.COLOR_JITTER", 0.9, {"AUG.AUTO_AUGMENT": "none"}),
    Case("AUG.AUTO_AUGMENT", "none"),
    Case("AUG.AUTO_AUGMENT", "imagenet"),
    Case("AUG.AUTO_AUGMENT", "rand-m3", DIGITS),
    Case("AUG.SCALE", (0.5, 1.0)),
    Case("AUG.SCALE", (0.08, 0.2)),
    Case("AUG.RATIO", (1.0, 1.3333)),
    Case("AUG.RATIO", (0.75, 1.0)),
    Case("AUG.RANDOM_CROP_PADDING", 4),
    Case("AUG.HFLIP", 0.0),
    Case("AUG.HFLIP", 0.0, DIGITS),
    Case("AUG.AFFINE", True),
    Case("AUG.AFFINE", False, DIGITS),
    *(
        case
        for base in ({}, DIGITS)
        for case in (
            Case("AUG.REPROB", 0.0, base),
            Case("AUG.REMODE", "const", base | ALWAYS_ERASED),
            Case("AUG.REMODE", "rand", base | ALWAYS_ERASED),
            Case("AUG.RECOUNT", 4, base | ALWAYS_ERASED),
            Case("AUG.REAREA", (0.2, 0.3333), base | ALWAYS_ERASED),
            Case("AUG.REAREA", (0.02, 0.1), base | ALWAYS_ERASED),
        )
    ),
    Case("AUG.MIXUP", 0.0),
    Case("AUG.MIXUP", 0.1),
    Case("AUG.CUTMIX", 0.0),
    Case("AUG.CUTMIX", 0.1),
    Case("AUG.CUTMIX_MINMAX", (0.2, 0.3)),
    Case("AUG.CUTMIX_MINMAX", (0.2, 0.3), UNMIXED),
    Case("AUG.MIXUP_PROB", 0.5),
    Case("AUG.MIXUP_SWITCH_PROB", 0.1),
    Case("AUG.MIXUP_MODE", "pair"),
    Case("AUG.MIXUP_MODE", "elem"),
    Case("TEST.CROP", False),
    Case("TEST.SEQUENTIAL", True),
    Case("TEST.SHUFFLE", True),
    Case("TEST.SHUFFLE", True, DIGITS),
)


@contextmanager
def loaders_without_workers():
    """What DataLoaders are asked for, in a list; they load in this process and in plain memory."""
    asked, build = [], torch.utils.data.DataLoader.__init__
    plain = {"num_workers": 0, "pin_memory": False, "timeout": 0}

    def record(loader, *args, **options):
        asked.append({key: options.get(key) for key in (*plain, "persistent_workers")})
        for key in ("persistent_workers", "prefetch_factor"):
            options.pop(key, None)
        build(loader, *args, **options | plain)

    def no_network(*args, download=False, **options):
        raise RuntimeError(f"no files, download {download}")

    with (
        patch("torch.utils.data.DataLoader.__init__", record),
        patch("torch.cuda.is_available", lambda: True),
        patch("torchvision.datasets.CIFAR10", no_network),
        patch("torchvision.datasets.SVHN", no_network),
        patch("sklearn.datasets.load_digits", few_digits),
    ):
        yield asked


def mixed(mixup, images: torch.Tensor, targets: torch.Tensor) -> list:
    """Digests of twenty mixtures of one batch."""
    seed_everything(0)
    return plain([mixup(images.clone(), targets) for _ in range(20)])


def data_seen(settings: dict[str, Any]) -> dict[str, Any] | str:
    """An epoch of training batches, mixed, and the validation batches of both ranks of two, as
    digests, with all that the loaders were asked for; or the error that refuses it.
    """
    try:
        config = config_of(settings)
        with loaders_without_workers() as asked:
            data = build_data(config)
            second = build_data(config, rank=1, world_size=2)
            batches = list(islice(data.train_loader.epoch(0), 4))
            seen = {
                "train": plain(batches),
                "mixed": data.mixup and mixed(data.mixup, *batches[0]),
                "val": plain(list(islice(data.val_loader, 4))),
                "second": plain(list(islice(second.val_loader, 4))),
                "about": [data.num_classes, data.class_names, data.mean, data.std],
                "patience": [data.train_loader.timeout, data.val_loader.timeout],
                "memory": len(pickle.dumps(second.train_loader.dataset)),
            }
        return seen | {"asked": asked}
    except (ConfigError, DataError) as error:
        return str(error)
