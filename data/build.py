"""Config -> loaders. The only module of this package that reads config nodes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data import layouts, names
from data.affine import Affine, ArrayBatches
from data.datasets import ImageDataset
from data.digits import digits
from data.errors import DataError
from data.loader import Loader, TrainLoader
from data.mixing import build_mixup
from data.samplers import EvalBatches, TrainBatches
from data.sources import Sources
from data.transforms import eval_transform, train_transform

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """Everything training and evaluation need to know of the data.

    train_loader: len() batches an epoch on this rank; .epoch(epoch, start_batch=0) yields (images,
        targets) from that batch on.
    val_loader: iterate it for (images, targets); every image once over all ranks. images (B, C, h,
    w) float32, normalised; targets (B,) int64. mixup: (images, targets) -> (images, soft targets),
    or None. mean, std: per channel, as applied.
    """

    train_loader: TrainLoader | None
    val_loader: Loader
    mixup: Callable | None
    num_classes: int
    class_names: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def close(self) -> None:
        """Ends the loading processes of both loaders."""
        for loader in (self.train_loader, self.val_loader):
            if loader is not None:
                loader.close()

    @property
    def soft_targets(self) -> bool:
        """Whether training targets are distributions with label smoothing already in them; this,
        not AUG.MIXUP, selects the loss.
        """
        return self.mixup is not None


def build_data(config: Any, *, rank: int = 0, world_size: int = 1, train: bool = True) -> Data:
    """Finds the configured data set, checks its layout and class count, and builds this rank's
    loaders.

    Args:
        train: False builds what an evaluation needs; training images may then be absent.
    Raises: DataError, one line.
    """
    sources = find_sources(config, rank, world_size, train)
    count = check_class_count(config, len(sources.classes))
    mean, std = _statistics(config)
    mixup = _mixup(config, count) if train else None
    train_loader = _train_loader(config, sources, mean, std, rank, world_size) if train else None
    val_loader = _val_loader(config, sources, mean, std, rank, world_size)
    logger.info(
        "data: %s, %s training and %d validation images, %d classes",
        config.DATA.DATASET,
        len(sources.train) if train else "no",
        len(sources.val),
        count,
    )
    return Data(
        train_loader,
        val_loader,
        mixup,
        count,
        class_names(config.DATA.DATASET, sources.classes),
        mean,
        std,
    )


def find_sources(config: Any, rank: int = 0, world_size: int = 1, train: bool = True) -> Sources:
    """The images of DATA.DATASET, undecoded. Raises: DataError for a missing or wrong layout."""
    dataset, root = config.DATA.DATASET, Path(config.DATA.DATA_PATH).expanduser()
    if dataset != "digits" and not config.DATA.DATA_PATH:
        raise DataError(
            f"DATA.DATASET {dataset} needs DATA.DATA_PATH (--data-path), the folder that holds it; "
            "to try without data use DATA.DATASET digits"
        )
    if dataset in ("imagenet", "folder"):
        return _class_folders(config, dataset, root, rank, world_size, train)
    if dataset == "digits":
        return digits(_size(config), config.DATA.INTERPOLATION, train)
    if dataset == "imagenet22K":
        return layouts.imagenet22k(root, train)
    if dataset == "tiny_imagenet":
        return layouts.tiny_imagenet(root, train)
    if dataset in ("cifar10", "cifar100", "svhn"):
        from data.torchvision_sets import cifar, svhn  # here: SVHN's reader loads SciPy

        return (
            svhn(root, train, config.DATA.DOWNLOAD)
            if dataset == "svhn"
            else cifar(root, train, config.DATA.DOWNLOAD, dataset)
        )
    raise DataError(
        f"DATA.DATASET '{dataset}' is unknown; allowed: {', '.join(sorted(names.STATISTICS))}"
    )


def check_class_count(config: Any, found: int) -> int:
    """The number of classes. Raises: DataError if MODEL.NUM_CLASSES is neither 0 (inferred) nor
    that number.
    """
    declared = config.MODEL.NUM_CLASSES
    if declared not in (0, found):
        raise DataError(
            f"MODEL.NUM_CLASSES is {declared}, but DATA.DATASET {config.DATA.DATASET} in"
            f" '{config.DATA.DATA_PATH}' has {found} classes; leave MODEL.NUM_CLASSES out or set it"
            f" to {found}"
        )
    return found


def class_names(dataset: str, classes: list[str]) -> list[str]:
    """Readable names in label order: words for wnids, else what the data set itself calls them."""
    if dataset == "imagenet":
        return names.imagenet_classes(classes)
    if dataset == "imagenet22K":
        return names.words(names.imagenet22k_wnids())
    return names.words(classes) if dataset == "tiny_imagenet" else list(classes)


def _class_folders(
    config: Any, dataset: str, root: Path, rank: int, world_size: int, train: bool
) -> Sources:
    if config.DATA.ZIP_MODE:
        sources = layouts.zip_folder(root, train, dataset, config.DATA.CACHE_MODE, rank, world_size)
    else:
        sources = layouts.folder(root, train, dataset)
    if dataset == "imagenet" and len(sources.classes) != 1000:
        raise DataError(
            f"DATA.DATASET imagenet has 1000 classes, '{root}' has {len(sources.classes)}; "
            "for classes of your own set DATA.DATASET folder"
        )
    return sources


def _train_loader(
    config: Any, sources: Sources, mean: tuple, std: tuple, rank: int, world_size: int
) -> TrainLoader:
    batches = TrainBatches(
        len(sources.train),
        config.DATA.BATCH_SIZE,
        config.SEED,
        rank,
        world_size,
        config.DATA.REPEATED_AUG,
    )
    if config.AUG.AFFINE:
        dataset = _affine_dataset(config, sources, mean, std)
    else:
        dataset = ImageDataset(
            sources.train, _train_transform(config, mean, std), config.SEED, training=True
        )
    return TrainLoader(
        dataset, batches, corrupt_limit=config.DATA.CORRUPT_LIMIT, **_loading(config)
    )


def _val_loader(
    config: Any, sources: Sources, mean: tuple, std: tuple, rank: int, world_size: int
) -> Loader:
    if config.TEST.SEQUENTIAL:
        rank, world_size = 0, 1
    batches = EvalBatches(
        len(sources.val), config.DATA.BATCH_SIZE, rank, world_size, config.TEST.SHUFFLE, config.SEED
    )
    if config.DATA.DATASET == "digits":  # already of the model's size
        dataset = ArrayBatches(sources.val, channels=_channels(config), mean=mean, std=std)
    else:
        transform = eval_transform(
            _size(config),
            mean=mean,
            std=std,
            interpolation=config.DATA.INTERPOLATION,
            crop=config.TEST.CROP,
            crop_ratio=config.DATA.CROP_RATIO,
        )
        dataset = ImageDataset(sources.val, transform)
    return Loader(dataset, batches, **_loading(config))


def _affine_dataset(config: Any, sources: Sources, mean: tuple, std: tuple) -> ArrayBatches:
    aug, dataset = config.AUG, config.DATA.DATASET
    if dataset != "digits":
        raise DataError(
            f"AUG.AFFINE True is made for DATA.DATASET digits, not {dataset}; set AUG.AFFINE False"
            " and choose AUG.AUTO_AUGMENT"
        )
    if aug.AUTO_AUGMENT not in ("none", ""):
        raise DataError(
            "AUG.AFFINE True takes the place of crop, colour jitter and AUG.AUTO_AUGMENT"
            f" '{aug.AUTO_AUGMENT}'; set AUG.AUTO_AUGMENT none"
        )
    erasing = None
    if aug.REPROB > 0:
        from timm.data.random_erasing import RandomErasing  # here: importing timm takes seconds

        erasing = RandomErasing(
            aug.REPROB, *aug.REAREA, mode=aug.REMODE, max_count=aug.RECOUNT, device="cpu"
        )
    return ArrayBatches(
        sources.train,
        channels=_channels(config),
        mean=mean,
        std=std,
        affine=Affine(),
        hflip=aug.HFLIP,
        erasing=erasing,
        seed=config.SEED,
        copies=config.DATA.REPEATED_AUG,
    )


def _train_transform(config: Any, mean: tuple, std: tuple) -> Callable:
    aug = config.AUG
    return train_transform(
        _size(config),
        mean=mean,
        std=std,
        interpolation=config.DATA.INTERPOLATION,
        scale=aug.SCALE,
        ratio=aug.RATIO,
        hflip=aug.HFLIP,
        color_jitter=aug.COLOR_JITTER,
        auto_augment=aug.AUTO_AUGMENT,
        erase_prob=aug.REPROB,
        erase_mode=aug.REMODE,
        erase_count=aug.RECOUNT,
        erase_area=aug.REAREA,
        crop_padding=aug.RANDOM_CROP_PADDING,
    )


def _mixup(config: Any, num_classes: int) -> Callable | None:
    aug = config.AUG
    return build_mixup(
        num_classes,
        config.DATA.BATCH_SIZE,
        mixup=aug.MIXUP,
        cutmix=aug.CUTMIX,
        cutmix_minmax=aug.CUTMIX_MINMAX,
        prob=aug.MIXUP_PROB,
        switch_prob=aug.MIXUP_SWITCH_PROB,
        mode=aug.MIXUP_MODE,
        smoothing=config.MODEL.LABEL_SMOOTHING,
    )


def _loading(config: Any) -> dict:
    on_cuda = config.DEVICE in ("auto", "cuda") and torch.cuda.is_available()
    return dict(
        num_workers=config.DATA.NUM_WORKERS,
        pin_memory=config.DATA.PIN_MEMORY and on_cuda,
        timeout=config.DATA.TIMEOUT,
    )


def _statistics(config: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return names.statistics(
        config.DATA.DATASET, _channels(config), config.DATA.MEAN, config.DATA.STD
    )


def _channels(config: Any) -> int:
    family = config.MODEL.TYPE.upper()
    channels = config.MODEL[family].IN_CHANS
    if channels not in (1, 3):
        raise DataError(
            f"MODEL.{family}.IN_CHANS {channels}: images are read as grey (1) or RGB (3)"
        )
    return channels


def _size(config: Any) -> tuple[int, int]:
    size = config.DATA.IMG_SIZE
    return (size, size) if isinstance(size, int) else tuple(size)
