"""Names of ImageNet's classes: wnids and WordNet words, by timm's lists."""

from __future__ import annotations

import logging
from functools import lru_cache

logger = logging.getLogger(__name__)


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
    """The 21 841 wnids in the label order of the 22K data of Swin.

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
