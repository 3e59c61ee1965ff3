"""Every way in which a file is odd but readable, or unreadable."""

import io

import numpy as np
import pytest
from PIL import Image

from data.images import UnreadableImage, decode, read_file
from tests.data.fakes import picture


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


def test_sixteen_bit_grey_keeps_its_upper_byte_instead_of_turning_white():
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16) << 8
    decoded = np.asarray(decode(encoded(Image.fromarray(levels), "PNG")))
    assert np.array_equal(decoded[..., 0], np.arange(256).reshape(16, 16))


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
