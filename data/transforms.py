"""Training and evaluation transforms: RGB image -> normalised (C, h, w) tensor. Training follows
timm's recipe.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import torch
from PIL import Image
from torchvision import transforms as T
from torchvision.transforms import functional as TF
from torchvision.transforms.functional import InterpolationMode

from data.errors import DataError
from data.images import UnreadableImage, as_rgb
from registry import did_you_mean

# Images of this side or less (CIFAR) are not resized by a random or enlarged crop, as in Swin.
SMALL = 32
SMALL_PADDING = 4
LONGEST = 64  # times the shorter side: what of an image is enlarged before its centre is cut out
# AutoAugment's learned policies, by the data set they were learned on; torchvision has all three,
# timm only ImageNet's.
LEARNED_POLICIES = {
    "cifar10": T.AutoAugmentPolicy.CIFAR10,
    "svhn": T.AutoAugmentPolicy.SVHN,
    "imagenet": T.AutoAugmentPolicy.IMAGENET,
}
# timm's policies and the settings of each, letters before a number; "t" takes a name.
_POLICIES = {
    "rand": ("m", "n", "p", "mstd", "mmax", "inc", "t"),
    "augmix": ("m", "w", "d", "a", "b", "mstd"),
    **dict.fromkeys(("original", "originalr", "v0", "v0r", "3a"), ("mstd",)),
}
_TRANSFORM_SETS = ("tweights", "t3a", "t3aw")
INTERPOLATIONS = ("random", "bilinear", "bicubic", "lanczos", "hamming")
RESIZING_ONLY = ("lanczos", "hamming")  # Pillow cannot rotate or shear with these filters
_EVAL_MODES = {
    "bicubic": InterpolationMode.BICUBIC,
    "lanczos": InterpolationMode.LANCZOS,
    "hamming": InterpolationMode.HAMMING,
}


def train_transform(
    size: tuple[int, int],
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    interpolation: str = "bicubic",
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
    color_jitter: float = 0.4,
    auto_augment: str = "none",
    erase_prob: float = 0.0,
    erase_mode: str = "pixel",
    erase_count: int = 1,
    erase_area: tuple[float, float] = (0.02, 1 / 3),
    crop_padding: int = -1,
) -> T.Compose:
    """Crop, mirror, a policy or colour jitter, normalise, random erasing; the channels are those of
    `mean`: 1 (grey) or 3.

    Args:
        size: (h, w).
        scale, ratio: area and aspect ratio of RandomResizedCrop.
        color_jitter: strength, 0 for none; without effect beside `auto_augment`, as in the Swin.
        auto_augment: cifar10, svhn or imagenet (AutoAugment's policies, arXiv:1805.09501, as
            torchvision has them), timm's policy string, or 'none'. The policies fill what they
            uncover with the mean colour.
        erase_mode: pixel (noise), rand (one random colour) or const (0, which is the mean).
        erase_area: least and most share of the image's area that one erased region takes.
        crop_padding: >= 0 takes a random crop of the padded image instead of RandomResizedCrop; -1:
            only for images up to SMALL pixels, with SMALL_PADDING. The image is first brought to
            `size` where it has another.
    Raises: DataError naming the key of a value that timm does not know.
    """
    _check_interpolation(interpolation)
    learned = auto_augment in LEARNED_POLICIES
    if not learned and auto_augment not in ("", "none", None):
        _check_policy(auto_augment)
    options = dict(
        input_size=size,
        is_training=True,
        separate=True,
        scale=tuple(scale),
        ratio=tuple(ratio),
        hflip=hflip,
        color_jitter=None if learned else color_jitter or None,
        auto_augment=None if learned or auto_augment in ("", "none", None) else auto_augment,
        interpolation=interpolation,
        re_prob=erase_prob,
        re_mode=erase_mode,
        re_count=erase_count,
    )
    shape, colour, final = _timm_steps(options, mean, std)
    if crop_padding < 0 and max(size) <= SMALL:
        crop_padding = SMALL_PADDING
    if crop_padding >= 0:
        resize = T.Resize(size, _eval_mode(interpolation))
        shape = [resize, T.RandomCrop(size, padding=crop_padding), *shape[1:]]
    keep_one_bit(colour)
    if learned:
        colour = [_learned_policy(auto_augment, mean), *colour]
    for step in final:
        if type(step).__name__ == "RandomErasing":
            step.min_area, step.max_area = erase_area
    return T.Compose([*shape, *colour, *final])


def _learned_policy(name: str, mean: tuple[float, ...]) -> T.AutoAugment:
    fill = [round(255 * value) for value in _rgb(mean)]
    return T.AutoAugment(LEARNED_POLICIES[name], InterpolationMode.BILINEAR, fill=fill)


def _rgb(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(values) if len(values) == 3 else tuple(values) * 3


def _timm_steps(
    options: dict, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[list, list, list]:
    """timm's three groups of steps: crop and mirror; colours; to a normalised tensor. Grey images
    turn grey after the second.
    """
    from timm.data import create_transform  # here: importing timm takes seconds

    def steps(**changes) -> list[list]:
        return [group.transforms for group in create_transform(**{**options, **changes})]

    rgb = dict(mean=_rgb(mean), std=_rgb(std))  # policies fill RGB images with the mean
    try:
        shape, colour, final = steps(**rgb)
        if options["interpolation"] in RESIZING_ONLY:
            colour = steps(**rgb, interpolation="bicubic")[1]
    except (AssertionError, KeyError, ValueError, IndexError) as error:
        raise DataError(
            f"timm refuses AUG.AUTO_AUGMENT '{options['auto_augment']}' or AUG.REMODE"
            f" '{options['re_mode']}' ({type(error).__name__}: {error}); examples:"
            " rand-m9-mstd0.5-inc1, augmix-m5-w4-d2, v0, original, 3a, none; REMODE pixel, rand or"
            " const"
        ) from None
    if len(mean) == 1:
        colour = [*colour, T.Grayscale()]
        final = steps(mean=mean, std=std)[2]
    return shape, colour, final


def eval_transform(
    size: tuple[int, int],
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    interpolation: str = "bicubic",
    crop: bool = True,
    crop_ratio: float = 224 / 256,
) -> T.Compose:
    """Resize and centre crop, or (crop False, or size <= SMALL) a plain resize to `size` (h, w);
    then normalise. Takes an image of any mode that data.images.as_rgb reads.

    With crop, the image is resized, its shape kept, until it just covers int(h / crop_ratio) x
    int(w / crop_ratio);
    for a square that is: the shorter side becomes int(side / crop_ratio).
    """
    _check_interpolation(interpolation)
    mode = _eval_mode(interpolation)
    if crop and max(size) > SMALL:
        steps = [Cover(tuple(int(side / crop_ratio) for side in size), mode), T.CenterCrop(size)]
    else:
        steps = [T.Resize(size, mode)]
    grey = [T.Grayscale()] if len(mean) == 1 else []
    return OfAnyMode(
        [*steps, *grey, T.ToTensor(), T.Normalize(torch.tensor(mean), torch.tensor(std))]
    )


class OfAnyMode(T.Compose):
    """Steps that are given RGB whatever the image's mode, as training and validation read it; the
    loader's own images are RGB already. Raises: DataError.
    """

    def __call__(self, image: Image.Image) -> torch.Tensor:
        try:
            return super().__call__(as_rgb(image))
        except UnreadableImage as reason:
            raise DataError(f"image cannot be used: {reason}") from None


class Cover:
    """Resizes an image, its shape kept, to the least size that covers `size` (h, w) pixels."""

    def __init__(self, size: tuple[int, int], mode: InterpolationMode):
        self.size, self.mode = size, mode

    def __call__(self, image: Image.Image) -> Image.Image:
        image = self._middle(image)
        width, height = image.size
        rows, columns = self.size
        if rows * width >= columns * height:  # the height decides
            target = rows, rows * width // height
        else:
            target = columns * height // width, columns
        return TF.resize(image, target, self.mode)

    def _middle(self, image: Image.Image) -> Image.Image:
        """The middle of an image that is very much longer than wide: all of it, enlarged until its
        shorter side covers, could take any amount of memory.
        """
        width, height = image.size
        most = LONGEST * -(-max(self.size) // min(self.size)) * min(width, height)
        if max(width, height) <= most:
            return image
        left, top = max(width - most, 0) // 2, max(height - most, 0) // 2
        return image.crop((left, top, left + min(width, most), top + min(height, most)))

    def __repr__(self) -> str:
        return f"Cover(size={self.size}, interpolation={self.mode.value})"


class AtLeastOneBit:
    """timm's level function of a posterize operation, with the number of bits raised to 1 where it
    is 0.

    At its highest level timm asks Pillow to keep 0 bits; Pillow 13 refuses, which stops about 0.16
    % of the images of the stock recipe.
    """

    def __init__(self, level_fn: Callable):
        self.level_fn = level_fn

    def __call__(self, level: float, hparams: dict) -> tuple[int]:
        return (max(1, self.level_fn(level, hparams)[0]),)


def keep_one_bit(steps: list) -> None:
    """Puts AtLeastOneBit around every posterize operation of timm's policies among `steps`."""
    for operation in _operations(steps):
        if operation.name.startswith("Posterize"):
            operation.level_fn = AtLeastOneBit(operation.level_fn)


def _operations(steps: list) -> Iterator:
    for step in steps:
        yield from getattr(step, "ops", ())  # RandAugment, AugMix
        for sub_policy in getattr(step, "policy", ()):  # AutoAugment
            yield from sub_policy


def _check_policy(text: str) -> None:
    """Refuses what timm would leave out without a word: a part without a number."""
    name, *parts = text.split("-")
    if name not in _POLICIES:
        hint = did_you_mean(name, [*_POLICIES, *LEARNED_POLICIES, "none"])
        raise DataError(
            f"AUG.AUTO_AUGMENT '{text}' is unknown; allowed: {', '.join(LEARNED_POLICIES)}, none,"
            f" or one of timm's {', '.join(_POLICIES)} with settings, as in"
            f" rand-m9-mstd0.5-inc1{hint}"
        )
    given = [_setting(part) for part in parts]
    for part, setting in zip(parts, given, strict=True):
        if setting not in _POLICIES[name]:
            raise DataError(
                f"AUG.AUTO_AUGMENT '{text}': '{part}' is no setting of {name}; allowed:"
                f" {', '.join(_POLICIES[name])}, each followed by a number"
                f" ({', '.join(_TRANSFORM_SETS)} for t)"
            )
        if given.count(setting) > 1:
            raise DataError(f"AUG.AUTO_AUGMENT '{text}' sets {setting} twice; give it once")


def _setting(part: str) -> str:
    """The letters of "mstd0.5"; "" where no number follows them."""
    if part in _TRANSFORM_SETS:
        return "t"
    match = re.fullmatch(r"([a-z]+)\d+(\.\d+)?(e-?\d+)?", part)
    return match[1] if match else ""


def _check_interpolation(name: str) -> None:
    if name not in INTERPOLATIONS:
        raise DataError(
            f"DATA.INTERPOLATION '{name}' is unknown; allowed: {', '.join(INTERPOLATIONS)}"
        )


def _eval_mode(name: str) -> InterpolationMode:
    return _EVAL_MODES.get(name, InterpolationMode.BILINEAR)
