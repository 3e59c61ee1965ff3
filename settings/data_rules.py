"""What the settings of the data must agree on; told before any file is opened."""

from __future__ import annotations

from typing import Any

from data.images import check_channels
from data.mixing import check_pairs
from data.sets import DATASETS
from settings.kinds import ConfigError


def check_data(config: Any) -> None:
    """The settings of reading and normalising, for training and evaluation.

    Raises: ConfigError, or DataError where the rule is one of `data`.
    """
    _check_class_count(config)
    _check_reader(config, "ZIP_MODE", "zip", "unpack the archive")
    _check_reader(config, "DOWNLOAD", "download", "fetch the data set and set it to False")
    _check_statistics(config)


def check_augmentation(config: Any) -> None:
    """The settings of training images. Raises as `check_data`."""
    aug = config.AUG
    check_pairs(config.DATA.BATCH_SIZE, aug.MIXUP, aug.CUTMIX, aug.CUTMIX_MINMAX)
    if not aug.AFFINE:
        return
    if not DATASETS[config.DATA.DATASET].model_sized:
        raise ConfigError(
            f"AUG.AFFINE True is made for DATA.DATASET {_names('model_sized')}, not"
            f" {config.DATA.DATASET}; set AUG.AFFINE False and choose AUG.AUTO_AUGMENT"
        )
    if aug.AUTO_AUGMENT not in ("none", ""):
        raise ConfigError(
            "AUG.AFFINE True replaces crop, colour jitter and AUG.AUTO_AUGMENT"
            f" '{aug.AUTO_AUGMENT}'; set AUG.AUTO_AUGMENT none"
        )


def check_image_channels(config: Any) -> None:
    """Images have 1 channel (grey) or 3 (RGB). Raises: DataError for another number."""
    check_channels(*_channels(config))


def _channels(config: Any) -> tuple[str, int]:
    family = config.MODEL.TYPE.upper()
    return f"MODEL.{family}.IN_CHANS", config.MODEL[family].IN_CHANS


def _check_class_count(config: Any) -> None:
    """0 stands for as many as are found; only a data set with a fixed number has no such thing."""
    entry, declared = DATASETS[config.DATA.DATASET], config.MODEL.NUM_CLASSES
    if entry.num_classes not in (None, declared):
        raise ConfigError(
            f"MODEL.NUM_CLASSES {declared} contradicts DATA.DATASET '{entry.name}', which has"
            f" {entry.num_classes} classes; leave MODEL.NUM_CLASSES out, or use DATA.DATASET"
            " 'folder' for classes of your own"
        )


def _check_reader(config: Any, key: str, ability: str, remedy: str) -> None:
    entry = DATASETS[config.DATA.DATASET]
    if config.DATA[key] and not getattr(entry, ability):
        raise ConfigError(
            f"DATA.{key} True needs DATA.DATASET {_names(ability)}, not '{entry.name}'; {remedy}"
        )


def _check_statistics(config: Any) -> None:
    key, channels = _channels(config)
    mean, std = config.DATA.MEAN, config.DATA.STD
    for name, given in (("MEAN", mean), ("STD", std)):
        if len(given) not in (0, channels) or len(mean) != len(std):
            raise ConfigError(
                f"DATA.{name} {given} has {len(given)} numbers; give DATA.MEAN and DATA.STD"
                f" together, {channels} numbers each ({key}), or () for the data set's own"
            )


def _names(ability: str) -> str:
    """The data sets that have an ability, as words."""
    return " or ".join(f"'{name}'" for name in DATASETS if getattr(DATASETS[name], ability))
