"""Every way in which a file is odd but readable, or unreadable."""

import io
import os
import socket
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from data import images
from data.errors import DataError, printable
from data.images import UnreadableImage, as_rgb, decode, load_image, read_file
from data.transforms import eval_transform
from tests.data.fakes import picture, save


def encoded(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


JPEG = encoded(picture(0), "JPEG", quality=95)
PNG = encoded(picture(0), "PNG")


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "LA", "1"])
def test_any_mode_becomes_rgb(mode):
    form = "JPEG" if mode in ("L", "CMYK") else "PNG"
    assert decode(encoded(picture(0).convert(mode), form)).mode == "RGB"


def test_a_png_named_jpeg_is_read_by_its_content(tmp_path):
    (tmp_path / "x.JPEG").write_bytes(PNG)
    assert np.array_equal(
        np.asarray(decode(read_file(str(tmp_path / "x.JPEG")))), np.asarray(picture(0))
    )


LEVELS = np.arange(65536, dtype=np.uint16).reshape(256, 256)


@pytest.mark.parametrize("form", ["PNG", "PPM", "TIFF", "JPEG2000", "big-endian TIFF"])
def test_sixteen_bit_grey_keeps_its_upper_byte_instead_of_turning_white(form):
    levels = LEVELS.astype(">u2") if form == "big-endian TIFF" else LEVELS
    decoded = np.asarray(decode(encoded(Image.fromarray(levels), form.split()[-1])))
    assert np.array_equal(decoded[..., 0], LEVELS >> 8) and (np.ptp(decoded, axis=-1) == 0).all()


def test_ten_and_twelve_bits_are_scaled_by_their_own_white():
    assert np.asarray(decode(b"P2\n3 1\n1023\n0 512 1023\n"))[0, :, 0].tolist() == [0, 128, 255]
    twelve = b"P5\n2 1\n4095\n" + np.array([0, 4095], ">u2").tobytes()
    assert np.asarray(decode(twelve))[0, :, 0].tolist() == [0, 255]
    packed = bytes([0x00, 0x08, 0x00, 0xFF, 0xF0, 0x00])  # 0, 2048, 4095, 0 in 12 bits each
    assert np.asarray(decode(tiff(4, 12, packed)))[0, :, 0].tolist() == [0, 128, 255, 0]


def tiff(width: int, bits: int, content: bytes) -> bytes:
    """One row of grey, uncompressed."""
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: 1, 273: 200, 277: 1, 278: 1}
    tags[279] = len(content)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    return head.ljust(200, b"\0") + content


def test_a_tiff_whose_zero_is_white_is_not_read_as_its_negative():
    for polarity, first in ((0, 255), (1, 0)):
        content = encoded(Image.fromarray(LEVELS), "TIFF", tiffinfo={262: polarity})
        assert np.asarray(decode(content))[0, 0, 0] == first


@pytest.mark.parametrize("form", ["TIFF", "PPM"])
def test_floating_point_images_are_refused_instead_of_turning_black(form):
    content = encoded(Image.fromarray(np.ones((4, 4), np.float32)), form)
    with pytest.raises(UnreadableImage, match="floating-point values, whose white is not known"):
        decode(content)


def test_signed_and_wider_integers_are_refused_in_one_line_that_names_the_file(tmp_path):
    path = tmp_path / "x.tif"
    Image.fromarray(np.full((4, 4), 70000, np.int32)).save(path)
    with pytest.raises(DataError, match=r"x.tif: signed values or more than 16 bits") as caught:
        load_image(path)
    assert "\n" not in str(caught.value)


MODES = "1 L P RGB RGBA CMYK YCbCr LAB HSV LA PA La RGBa RGBX I;16 I;16L I;16B".split()


@pytest.mark.parametrize("mode", MODES)
def test_the_predictor_takes_an_image_of_any_mode(mode):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = Image.new(mode, (40, 30))
        assert as_rgb(image).mode == "RGB"
        for mean in ((0.5,), (0.5, 0.5, 0.5)):
            batch = eval_transform((16, 16), mean=mean, std=mean)(image)
            assert batch.shape == (len(mean), 16, 16)


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "CMYK", "1", "LA"])
def test_the_predictor_sees_what_validation_sees(mode, tmp_path):
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    picture(3).convert(mode).save(path)
    transform = eval_transform((16, 16), mean=(0.3,) * 3, std=(0.3,) * 3)
    seen = transform(decode(path.read_bytes()))
    assert (transform(Image.open(path)) == seen).all()
    assert (transform(load_image(path)) == seen).all()


def test_transparent_palettes_keep_their_colours_without_a_warning():
    image = picture(0).quantize(16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded = decode(encoded(image, "PNG", transparency=bytes([0, 99, 255])))
    assert np.array_equal(np.asarray(decoded), np.asarray(image.convert("RGB")))


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"x")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [12_000, 20_000, 2**31 - 1])
def test_an_image_that_announces_too_many_pixels_is_not_decoded(side):
    with pytest.raises(UnreadableImage, match=f"more than {images.MAX_PIXELS}"):
        decode(png_header(side, side))


def test_a_very_long_image_is_not_enlarged_whole(monkeypatch):
    asked = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda *a, **k: asked.append(a[1]) or resize(*a, **k)
    )
    image = picture(1, (2, 9000))
    transform = eval_transform((56, 56), mean=(0.5,) * 3, std=(0.5,) * 3)
    assert transform(image).shape == (3, 56, 56)
    assert max(asked[-1]) <= 64 * 64
    middle = image.crop((4500 - 60, 0, 4500 + 60, 2))  # enough of it for the centre
    assert (transform(middle) - transform(image)).abs().max() < 0.05


@pytest.mark.parametrize(
    "error",
    [NotImplementedError("x"), RuntimeError(), MemoryError(), RecursionError(), KeyError(1)],
)
def test_whatever_a_decoder_raises_is_an_unreadable_image(error, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(images, "as_rgb", fail)
    with pytest.raises(UnreadableImage, match="damaged image"):
        decode(JPEG)


def test_postscript_is_not_run():
    with pytest.raises(UnreadableImage, match="PostScript, which is a program"):
        decode(encoded(picture(0), "EPS"))


def test_only_regular_files_are_read_and_none_is_waited_for(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket.jpg"))
    for name in (tmp_path / "pipe.jpg", tmp_path / "socket.jpg", "/dev/zero", tmp_path, "a\0b"):
        with pytest.raises(UnreadableImage):
            read_file(str(name))
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    with pytest.raises(UnreadableImage, match="bytes, more than 100"):
        read_file(str(save(tmp_path / "x.jpg", 0)))


def test_names_that_are_no_text_are_printed_as_escapes():
    name = os.fsdecode(b"caf\xe9\n\xc3\xa9.jpg")
    assert printable(name) == "caf\\xe9\\né.jpg"
    printable(name).encode("utf-8")


def test_orientation_tags_are_ignored_as_by_the_reference():
    exif = Image.Exif()
    exif[274] = 6
    assert decode(encoded(picture(0), "JPEG", exif=exif)).size == picture(0).size


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "empty file"),
        (b"<!DOCTYPE html><html>404</html>", "not an image"),
        (JPEG[:-200], "truncated"),
        (JPEG[:40], "."),
        (PNG[: len(PNG) // 2], "."),
        (b"\xff\xd8\xff" + bytes(100), "."),
        (b"GIF89a" + bytes(3), "."),
    ],
)
def test_damaged_content_is_one_exception_with_a_reason(content, reason):
    with pytest.raises(UnreadableImage, match=reason) as caught:
        decode(content)
    assert "\n" not in str(caught.value) and "0x" not in str(caught.value).replace("\\x", "")


def test_a_vanished_file_is_unreadable(tmp_path):
    with pytest.raises(UnreadableImage, match="No such file"):
        read_file(str(tmp_path / "gone.jpg"))


def test_every_cut_of_a_file_is_either_read_or_reported():
    for content in (JPEG, PNG):
        for end in range(0, len(content), 37):
            try:
                assert decode(content[:end]).mode == "RGB"
            except UnreadableImage:
                pass
