"""From bytes to an RGB image, with one reason for every way in which that fails."""

from __future__ import annotations

import io
import os
import stat

import numpy as np
from PIL import Image, UnidentifiedImageError

from data.errors import DataError, printable

# Bounds of what one image may cost: a file of a few bytes can announce any number of pixels.
MAX_PIXELS = 2**27  # 512 MiB as Pillow holds RGB
MAX_BYTES = 2**29  # of a file, or of an archive's member once unpacked
_BITS, _POLARITY = 258, 262  # TIFF tags: BitsPerSample, PhotometricInterpretation
_WHITE_IS_ZERO = 0


class UnreadableImage(Exception):
    """One image cannot be read; the text is the reason, without the file's name."""


def load_image(path: str | os.PathLike) -> Image.Image:
    """The image in a file as 8-bit RGB, read as training and validation read it.

    Raises: DataError naming the file.
    """
    try:
        return decode(read_file(os.fspath(path)))
    except UnreadableImage as reason:
        raise DataError(f"image cannot be read: {printable(path)}: {reason}") from None


def decode(content: bytes) -> Image.Image:
    """The image as 8-bit RGB, whatever its container, name or mode (see `as_rgb`).

    Orientation tags are ignored, as in Swin, whose released weights were trained and scored that
    way.

    Raises: UnreadableImage.
    """
    if not content:
        raise UnreadableImage("empty file (0 bytes)")
    try:
        with Image.open(io.BytesIO(content)) as image:
            _check_header(image)
            return as_rgb(image)
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage(
            f"not an image, or of a kind that Pillow does not read (begins with {content[:16]!r})"
        ) from None
    except Image.DecompressionBombError:
        raise UnreadableImage(f"more than {MAX_PIXELS} pixels") from None
    except Exception as error:  # a decoder may raise anything on damaged content
        raise UnreadableImage(f"damaged image ({_first_line(error)})") from None


def as_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as 8-bit RGB; one that is RGB is returned as it is.

    Transparency is dropped: the colours below it stay. Of 16-bit grey the upper byte is kept.

    Raises: UnreadableImage for floats and for values that are signed or wider than 16 bits, whose
        white is not known.
    """
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return _from_levels(image)
    if image.mode == "La":
        image = image.convert("LA")
    elif image.mode in ("P", "PA", "RGBa"):
        image = image.convert("RGBA")  # by way of it: else Pillow warns of transparent palettes
    return image.convert("RGB")


def check_channels(key: str, channels: int) -> int:
    """`channels`, the value of `key`, if images can have that number. Raises: DataError."""
    if channels not in (1, 3):
        raise DataError(f"{key} {channels}: images are read as grey (1) or RGB (3)")
    return channels


def read_file(path: str) -> bytes:
    """The bytes of a regular file: a pipe would be waited for, a device has no end.

    Raises: UnreadableImage if it is none, is too large, or the system cannot deliver it.
    """
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UnreadableImage("not a regular file")
            if status.st_size > MAX_BYTES:
                raise UnreadableImage(f"{status.st_size} bytes, more than {MAX_BYTES}")
            return file.read()
    except OSError as error:
        raise UnreadableImage(error.strerror or str(error)) from None
    except (ValueError, MemoryError) as error:  # ValueError: a zero byte in the name
        raise UnreadableImage(_first_line(error)) from None


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _check_header(image: Image.Image) -> None:
    """Refuses what should not even be decoded."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UnreadableImage(f"{width} x {height} pixels, more than {MAX_PIXELS}")
    if image.format == "EPS":
        raise UnreadableImage("PostScript, which is a program, not an image")


def _from_levels(image: Image.Image) -> Image.Image:
    """One channel of up to 16 bits."""
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    if image.mode == "F":
        raise UnreadableImage("floating-point values, whose white is not known; store 8 or 16 bits")
    # Pillow reads 16 bits as mode I from PGM and, before Pillow 11, from PNG
    signed_or_wide = image.mode == "I" and image.format not in ("PPM", "PNG")
    if signed_or_wide or image.format == "FITS":
        raise UnreadableImage(
            "signed values or more than 16 bits, whose white is not known; store 8 or 16 bits"
        )
    bits = tags.get(_BITS, 16)
    bits = bits[0] if isinstance(bits, tuple) else bits
    levels = (np.asarray(image) >> (bits - 8)).clip(0, 255).astype(np.uint8)
    if tags.get(_POLARITY) == _WHITE_IS_ZERO:
        levels = 255 - levels
    return Image.fromarray(levels).convert("RGB")


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
