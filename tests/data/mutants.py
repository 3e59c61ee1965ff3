"""Damaged files: whole ones of many formats, and what bad disks, networks and programs make of
them.
"""

import io
import random
import warnings
import zipfile
from collections.abc import Iterator

import numpy as np
from PIL import Image, features

from tests.data.fakes import picture

# (Pillow's name, mode, options). What this build of Pillow cannot write is left out.
FORMATS = [
    ("JPEG", "RGB", {}),
    ("JPEG", "L", {"progressive": True}),
    ("JPEG", "CMYK", {}),
    ("MPO", "RGB", {}),
    ("PNG", "RGB", {}),
    ("PNG", "RGBA", {}),
    ("PNG", "P", {"transparency": bytes([0, 128])}),
    ("PNG", "1", {}),
    ("PNG", "I;16", {}),
    ("GIF", "P", {}),
    ("BMP", "RGB", {}),
    ("BMP", "P", {}),
    ("PPM", "RGB", {}),
    ("PPM", "I;16", {}),
    ("TIFF", "RGB", {}),
    ("TIFF", "I;16", {}),
    ("TIFF", "F", {}),
    ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    ("TIFF", "CMYK", {"compression": "jpeg"}),
    ("TIFF", "LAB", {}),
    ("WEBP", "RGB", {}),
    ("WEBP", "RGBA", {"lossless": True}),
    ("AVIF", "RGB", {}),
    ("JPEG2000", "RGB", {}),
    ("JPEG2000", "I;16", {}),
    ("DDS", "RGBA", {}),
    ("DDS", "RGBA", {"pixel_format": "DXT5"}),
    ("TGA", "RGB", {"compression": "tga_rle"}),
    ("ICO", "RGBA", {}),
    ("ICNS", "RGBA", {}),
    ("SGI", "RGB", {}),
    ("PCX", "P", {}),
    ("QOI", "RGB", {}),
]


def whole_images() -> list[bytes]:
    """One small file of each format."""
    found = []
    for number, (form, mode, options) in enumerate(FORMATS):
        image = picture(number, (30, 24))
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        elif mode == "LAB":
            image = Image.merge("LAB", image.split())
        else:
            image = image.convert(mode)
        buffer = io.BytesIO()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image.save(buffer, form, **options)
        except (KeyError, OSError, ValueError):
            if form in ("JPEG", "PNG", "GIF", "BMP", "PPM") or features.check(form.lower()):
                raise
            continue
        found.append(buffer.getvalue())
    return found


def damaged(content: bytes, draw: random.Random) -> bytes:
    """One kind of damage, once or a few times."""
    data = bytearray(content)
    return bytes(draw.choice(DAMAGES)(data, draw))


def flip(data: bytearray, draw: random.Random) -> bytearray:
    for _ in range(draw.choice((1, 1, 3, 10, 100))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return data


def flip_in_head(data: bytearray, draw: random.Random) -> bytearray:
    for _ in range(draw.choice((1, 2, 5))):
        data[draw.randrange(min(len(data), 120))] = draw.randrange(256)
    return data


def cut(data: bytearray, draw: random.Random) -> bytearray:
    return data[: draw.randrange(len(data))]


def extreme(data: bytearray, draw: random.Random) -> bytearray:
    """A number of the head becomes the least or most of its kind."""
    size = draw.choice((1, 2, 4, 8))
    at = draw.randrange(max(1, min(len(data), 200) - size))
    value = draw.choice((b"\0", b"\xff", b"\x7f" + b"\xff" * 7, b"\x80" + b"\0" * 7))
    data[at : at + size] = (value * 8)[:size]
    return data


def blank(data: bytearray, draw: random.Random) -> bytearray:
    begin = draw.randrange(len(data))
    end = min(len(data), begin + draw.choice((4, 64, 512)))
    data[begin:end] = bytes(end - begin)
    return data


def repeat(data: bytearray, draw: random.Random) -> bytearray:
    begin = draw.randrange(len(data))
    part = data[begin : begin + draw.choice((2, 32, 256))]
    return data[:begin] + part * draw.choice((2, 50)) + data[begin:]


def remove(data: bytearray, draw: random.Random) -> bytearray:
    begin = draw.randrange(len(data))
    del data[begin : begin + draw.choice((1, 4, 100))]
    return data


def swap(data: bytearray, draw: random.Random) -> bytearray:
    half = draw.randrange(len(data))
    return data[half:] + data[:half]


DAMAGES = (flip, flip_in_head, flip_in_head, cut, extreme, extreme, blank, repeat, remove, swap)


def image_mutants(count: int, seed: int) -> Iterator[bytes]:
    draw, whole = random.Random(seed), whole_images()
    for number in range(count):
        yield damaged(whole[number % len(whole)], draw)


def whole_archive(method: int) -> bytes:
    """Three classes of two images, an enclosing folder and something that is no image."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for number in range(6):
            image = io.BytesIO()
            picture(number, (8, 8)).save(image, "PNG")
            archive.writestr(f"val/{'abc'[number // 2]}/{number}.png", image.getvalue())
        archive.writestr("val/notes.txt", "none")
    return buffer.getvalue()


def archive_mutants(count: int, seed: int) -> Iterator[tuple[bytes, bytes | None]]:
    """Archives, each second with a map file, of which one of the two, or both, are damaged."""
    draw = random.Random(seed)
    whole = [whole_archive(method) for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)]
    listing = "".join(f"val/{'abc'[i // 2]}/{i}.png\t{i // 2}\n" for i in range(6)).encode()
    for number in range(count):
        content = whole[number % len(whole)]
        directory = content.index(b"PK\1\2")
        part = draw.randrange(4)
        if part == 0:  # the directory at the end, on which everything depends
            content = content[:directory] + damaged(content[directory:], draw)
        elif part < 3:
            content = damaged(content, draw)
        with_map = draw.random() < 0.5
        yield content, (damaged(listing, draw) if part == 3 else listing) if with_map else None
