"""From bytes to an RGB image, with one reason for every way in which that fails."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image, UnidentifiedImageError

from data.errors import DataError

# What Pillow's decoders raise on damaged files (SyntaxError: broken PNG chunks).
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class UnreadableImage(Exception):
    """One image cannot be read; the text is the reason, without the file's name."""


def decode(content: bytes) -> Image.Image:
    """The image as 8-bit RGB, whatever its container, name or mode (grey, CMYK, palette, 16 bit).

    Orientation tags are ignored, as in Swin, whose released weights were trained and scored that
    way.

    Raises: UnreadableImage.
    """
    if not content:
        raise UnreadableImage("empty file (0 bytes)")
    try:
        with Image.open(io.BytesIO(content)) as image:
            return _to_rgb(image)
    except UnidentifiedImageError:
        raise UnreadableImage(f"not an image (begins with {content[:16]!r})") from None
    except _DECODER_ERRORS as error:
        raise UnreadableImage(f"damaged image ({_first_line(error)})") from None


def check_channels(key: str, channels: int) -> int:
    """`channels`, the value of `key`, if images can have that number. Raises: DataError."""
    if channels not in (1, 3):
        raise DataError(f"{key} {channels}: images are read as grey (1) or RGB (3)")
    return channels


def read_file(path: str) -> bytes:
    """The bytes of a file. Raises: UnreadableImage if the system cannot deliver them."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise UnreadableImage(error.strerror or str(error)) from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255, which turns 16-bit images white
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
