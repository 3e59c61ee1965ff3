"""Mixup and CutMix through timm."""

from __future__ import annotations

from collections.abc import Callable

from data.errors import DataError


def build_mixup(
    num_classes: int,
    batch_size: int,
    *,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    cutmix_minmax: tuple[float, float] | None = None,
    prob: float = 1.0,
    switch_prob: float = 0.5,
    mode: str = "batch",
    smoothing: float = 0.0,
) -> Callable | None:
    """(images, targets) -> (mixed images, soft targets (B, K)), or None when mixup, cutmix and
    cutmix_minmax are all off.

    Label smoothing is part of the soft targets. The randomness is that of the process's NumPy
    generator, so a resumed run restores it; images are changed in place.
    Raises: DataError for an odd batch (partners are pairs of the batch) or an unknown mode.
    """
    if not is_mixed(mixup, cutmix, cutmix_minmax):
        return None
    if mode not in ("batch", "pair", "elem"):
        raise DataError(f"AUG.MIXUP_MODE '{mode}' is unknown; allowed: batch, pair, elem")
    check_pairs(batch_size, mixup, cutmix, cutmix_minmax)
    from timm.data import Mixup  # here: importing timm takes seconds

    return Mixup(
        mixup,
        cutmix,
        tuple(cutmix_minmax) if cutmix_minmax else None,
        prob,
        switch_prob,
        mode,
        label_smoothing=smoothing,
        num_classes=num_classes,
    )


def is_mixed(mixup: float, cutmix: float, cutmix_minmax: tuple[float, float] | None) -> bool:
    """Whether any kind of mixing is on."""
    return mixup > 0 or cutmix > 0 or bool(cutmix_minmax)


def check_pairs(
    batch_size: int, mixup: float, cutmix: float, cutmix_minmax: tuple[float, float] | None
) -> None:
    """Mixing pairs each image with another of the batch. Raises: DataError for an odd batch."""
    if is_mixed(mixup, cutmix, cutmix_minmax) and batch_size % 2:
        raise DataError(
            f"DATA.BATCH_SIZE {batch_size} is odd; mixup and cutmix pair the images of a batch:"
            " choose an even one, or set AUG.MIXUP 0, AUG.CUTMIX 0 and AUG.CUTMIX_MINMAX None"
        )
