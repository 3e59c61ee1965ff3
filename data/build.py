"""Config -> loaders. The only module of this package that reads config nodes."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.affine import Affine, ArrayBatches
from data.catalogue import Request
from data.datasets import ImageDataset
from data.errors import DataError
from data.fingerprint import fingerprint
from data.images import check_channels
from data.loader import Loader, TrainLoader
from data.mixing import build_mixup
from data.samplers import EvalBatches, TrainBatches
from data.sets import DATASETS
from data.sources import Source, Sources
from data.transforms import eval_transform, train_transform

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """Everything training and evaluation need to know of the data.

    Args:
        train_loader: len() batches an epoch on this rank; .epoch(epoch, start_batch=0) yields
            (images, targets) from that batch on. None where no training was asked for.
        val_loader: iterate it for (images, targets); every image once over all ranks. images (B, C,
            h, w) float32, normalised; targets (B,) int64.
        mixup: (images, targets) -> (images, soft targets), or None.
        classes: the classes by label, as folders or lists name them; class_names: as people do.
        mean, std: per channel, as applied.
        fingerprints: of the images trained on ("training") and of the "validation" images.
    """

    train_loader: TrainLoader | None
    val_loader: Loader
    mixup: Callable | None
    num_classes: int
    classes: list[str]
    class_names: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprints: dict[str, str]

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


@dataclass(frozen=True)
class Shard:
    """This process among those that share the images."""

    rank: int
    world_size: int


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation per channel, of values in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def build_data(config: Any, *, rank: int = 0, world_size: int = 1, train: bool = True) -> Data:
    """Finds the configured data set, checks its layout and class count, and builds this rank's
    loaders.

    Args:
        train: False builds what an evaluation needs; training images may then be absent.
    Raises: DataError, one line.
    """
    entry = DATASETS[config.DATA.DATASET]
    sources = find_sources(config, rank, world_size, train)
    num_classes = check_class_count(config, len(sources.classes))
    shard = Shard(rank, world_size)
    normalisation = _normalisation(config)
    mixup, train_loader = None, None
    if train:
        mixup = _mixup(config, num_classes)
        train_loader = _train_loader(config, sources.train, normalisation, shard)
    logger.info(
        "data: %s, %s training and %d validation images, %d classes",
        entry.name,
        len(sources.train) if train else "no",
        len(sources.val),
        num_classes,
    )
    return Data(
        train_loader=train_loader,
        val_loader=_val_loader(config, sources.val, normalisation, shard),
        mixup=mixup,
        num_classes=num_classes,
        classes=list(sources.classes),
        class_names=entry.class_names(sources.classes),
        mean=normalisation.mean,
        std=normalisation.std,
        fingerprints=_fingerprints(sources),
    )


def check_transforms(config: Any, train: bool = True) -> None:
    """Builds the transforms that a run would build, so that what they refuse is told without data.

    Raises: DataError, one line.
    """
    normalisation = _normalisation(config)
    _eval_transform(config, normalisation)
    if train and not config.AUG.AFFINE:
        _train_transform(config, normalisation)


def find_sources(config: Any, rank: int = 0, world_size: int = 1, train: bool = True) -> Sources:
    """The images of DATA.DATASET, undecoded. Raises: DataError for a missing or wrong layout."""
    entry, path = DATASETS[config.DATA.DATASET], config.DATA.DATA_PATH
    if entry.needs_path and not path:
        raise DataError(
            f"DATA.DATASET {entry.name} needs DATA.DATA_PATH (--data-path), the folder that holds"
            " it; to try without data use DATA.DATASET digits"
        )
    request = Request(
        dataset=entry.name,
        root=Path(os.path.expanduser(path)),  # leaves ~nobody as it is
        train=train,
        size=_size(config),
        interpolation=config.DATA.INTERPOLATION,
        download=config.DATA.DOWNLOAD,
        zipped=config.DATA.ZIP_MODE,
        cache=config.DATA.CACHE_MODE,
        rank=rank,
        world_size=world_size,
    )
    sources = entry.read(request)
    if entry.num_classes not in (None, len(sources.classes)):
        raise DataError(
            f"DATA.DATASET {entry.name} has {entry.num_classes} classes, '{path}' has"
            f" {len(sources.classes)}; for classes of your own set DATA.DATASET folder"
        )
    return sources


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


# ---- loaders


def _fingerprints(sources: Sources) -> dict[str, str]:
    used = {"training": sources.train, "validation": sources.val}
    return {split: fingerprint(source) for split, source in used.items() if source is not None}


def _train_loader(
    config: Any, source: Source, normalisation: Normalisation, shard: Shard
) -> TrainLoader:
    batches = TrainBatches(
        len(source),
        config.DATA.BATCH_SIZE,
        config.SEED,
        shard.rank,
        shard.world_size,
        config.DATA.REPEATED_AUG,
    )
    if config.AUG.AFFINE:
        dataset = _affine_dataset(config, source, normalisation)
    else:
        transform = _train_transform(config, normalisation)
        dataset = ImageDataset(source, transform, config.SEED, training=True)
    return TrainLoader(
        dataset,
        batches,
        corrupt_limit=config.DATA.CORRUPT_LIMIT,
        **_loading(config),
    )


def _val_loader(config: Any, source: Source, normalisation: Normalisation, shard: Shard) -> Loader:
    if config.TEST.SEQUENTIAL:
        shard = Shard(rank=0, world_size=1)
    batches = EvalBatches(
        len(source),
        config.DATA.BATCH_SIZE,
        shard.rank,
        shard.world_size,
        config.TEST.SHUFFLE,
        config.SEED,
    )
    if DATASETS[config.DATA.DATASET].model_sized:
        dataset = ArrayBatches(
            source,
            channels=_channels(config),
            mean=normalisation.mean,
            std=normalisation.std,
        )
    else:
        dataset = ImageDataset(source, _eval_transform(config, normalisation))
    return Loader(dataset, batches, **_loading(config))


def _loading(config: Any) -> dict:
    on_cuda = config.DEVICE in ("auto", "cuda") and torch.cuda.is_available()
    return dict(
        num_workers=config.DATA.NUM_WORKERS,
        pin_memory=config.DATA.PIN_MEMORY and on_cuda,
        timeout=config.DATA.TIMEOUT,
    )


# ---- augmentation


def _affine_dataset(config: Any, source: Source, normalisation: Normalisation) -> ArrayBatches:
    aug = config.AUG
    return ArrayBatches(
        source,
        channels=_channels(config),
        mean=normalisation.mean,
        std=normalisation.std,
        affine=Affine(),
        hflip=aug.HFLIP,
        erasing=_erasing(aug),
        seed=config.SEED,
        copies=config.DATA.REPEATED_AUG,
    )


def _erasing(aug: Any) -> Callable | None:
    if aug.REPROB == 0:
        return None
    from timm.data.random_erasing import RandomErasing  # here: importing timm takes seconds

    return RandomErasing(
        aug.REPROB,
        *aug.REAREA,
        mode=aug.REMODE,
        max_count=aug.RECOUNT,
        device="cpu",
    )


def _train_transform(config: Any, normalisation: Normalisation) -> Callable:
    aug = config.AUG
    return train_transform(
        _size(config),
        mean=normalisation.mean,
        std=normalisation.std,
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


def _eval_transform(config: Any, normalisation: Normalisation) -> Callable:
    return eval_transform(
        _size(config),
        mean=normalisation.mean,
        std=normalisation.std,
        interpolation=config.DATA.INTERPOLATION,
        crop=config.TEST.CROP,
        crop_ratio=config.DATA.CROP_RATIO,
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


# ---- plain values


def _normalisation(config: Any) -> Normalisation:
    entry = DATASETS[config.DATA.DATASET]
    mean, std = entry.statistics(_channels(config), config.DATA.MEAN, config.DATA.STD)
    return Normalisation(mean, std)


def _channels(config: Any) -> int:
    family = config.MODEL.TYPE.upper()
    return check_channels(f"MODEL.{family}.IN_CHANS", config.MODEL[family].IN_CHANS)


def _size(config: Any) -> tuple[int, int]:
    size = config.DATA.IMG_SIZE
    return (size, size) if isinstance(size, int) else tuple(size)
