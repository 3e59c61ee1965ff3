"""Names of classes and statistics of data sets."""

from __future__ import annotations

import logging
from functools import lru_cache

logger = logging.getLogger(__name__)
Values = tuple[float, ...]  # one per channel

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Mean and standard deviation per channel of the training images' values in [0, 1].
STATISTICS = {
    "imagenet": _IMAGENET,
    "imagenet22K": _IMAGENET,
    "folder": _IMAGENET,
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5070, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "tiny_imagenet": ((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)),
    "digits": ((0.305,), (0.376,)),
}
_LUMA = (0.299, 0.587, 0.114)  # weights of R, G, B in a grey image


def statistics(
    dataset: str, channels: int, mean: Values = (), std: Values = ()
) -> tuple[Values, Values]:
    """Mean and std for `channels` (1 or 3) channels: the given ones where not empty, else the data
    set's own.
    """
    own_mean, own_std = STATISTICS[dataset]
    return _fit(tuple(mean) or own_mean, channels), _fit(tuple(std) or own_std, channels)


def _fit(values: Values, channels: int) -> Values:
    if len(values) == channels:
        return tuple(values)
    return (
        tuple(values) * channels
        if len(values) == 1
        else (sum(weight * value for weight, value in zip(_LUMA, values)),)
    )


@lru_cache
def _imagenet(subset: str):
    from timm.data import ImageNetInfo  # here: importing timm takes seconds

    return ImageNetInfo(subset)


def words(wnids: list[str]) -> list[str]:
    """WordNet words for wnids ('n01440764' -> 'tench, Tinca tinca'); what is no known wnid stays as
    it is.
    """
    known = _imagenet("imagenet-21k-goog").label_descriptions(as_dict=True)
    return [known.get(wnid, wnid) for wnid in wnids]


def imagenet_wnids() -> list[str]:
    """The 1000 wnids of ImageNet-1K in label order."""
    return list(_imagenet("imagenet-1k").label_names())


def imagenet22k_wnids() -> list[str]:
    """The 21 841 wnids in the label order of the reference's 22K data.

    That is Google's sorted list of 21 843, whose two image-less classes 9205 and 15027 are taken by
    the last two.
    """
    wnids = list(_imagenet("imagenet-21k-goog").label_names())
    wnids[9205], wnids[15027] = wnids[21841], wnids[21842]
    return wnids[:21841]


def imagenet_classes(folders: list[str]) -> list[str]:
    """Words of ImageNet-1K's classes, given its folder names; warns where these are not ImageNet's:
    released heads would misjudge.
    """
    wnids = imagenet_wnids()
    if folders == [str(label) for label in range(len(wnids))]:  # a map file, which has labels alone
        folders = wnids
    if folders != wnids:
        first = next(label for label, pair in enumerate(zip(folders, wnids)) if pair[0] != pair[1])
        logger.warning(
            "class folder %d is '%s', ImageNet's is '%s': released classification heads expect"
            " ImageNet's order",
            first,
            folders[first],
            wnids[first],
        )
    return words(folders)
