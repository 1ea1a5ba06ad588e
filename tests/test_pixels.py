"""The loader's decoder against plain decode + resize and against Pillow, on real photographs and pages.

The tolerances are what README and docstrings may claim; measured: see each test.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import skimage
from PIL import Image, ImageOps

from omnidata.images.header import read_header
from omnidata.images.pixels import _dct_divisor, decode_resized, decode_rgb, resize_rgb

PHOTOS = Path(skimage.__file__).parent / "data"
NAMES = ["astronaut.png", "coffee.png", "chelsea.png", "page.png"]  # the last is printed text, the hardest


def jpeg(name: str, *, scale: float = 1, quality: int = 90, **options) -> bytes:
    image = ImageOps.scale(Image.open(PHOTOS / name).convert("RGB"), scale, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, **options)
    return buffer.getvalue()


def is_scaled(data: bytes, size: int) -> bool:
    """Whether decode_resized decodes at a part of the size."""
    return _dct_divisor(read_header(data), (size, size)) > 1


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(a.astype(int) - b.astype(int))


@pytest.mark.parametrize("size", [448, 224])
@pytest.mark.parametrize("name", NAMES)
def test_small_pictures_are_decoded_exactly_and_resized_as_pillow_does(name, size):
    data = jpeg(name)
    assert not is_scaled(data, size)
    found = decode_resized(data, size, size)
    assert np.array_equal(found, resize_rgb(decode_rgb(data), size, size))
    pillow = Image.fromarray(decode_rgb(data)).resize((size, size), Image.Resampling.BICUBIC)
    off = difference(found, np.asarray(pillow))
    assert off.max() <= 2 and off.mean() < 0.02  # measured: 2 and 0.01


# To 1501, 429, 512 and 851 rows: divided by 2, 2, 2 and 4, without a rest and with one.
@pytest.mark.parametrize("scale, size", [(6.7, 224), (6.7, 64), (8, 64), (13.3, 64)])
@pytest.mark.parametrize("name", NAMES)
def test_large_pictures_are_decoded_in_part_and_hardly_differ(name, scale, size):
    data = jpeg(name, scale=scale * size / min(Image.open(PHOTOS / name).size))
    assert is_scaled(data, size)
    found = decode_resized(data, size, size)
    off = difference(found, resize_rgb(decode_rgb(data), size, size))
    assert off.mean() < 0.4 and off.max() <= 10  # of 255; measured: 0.32 and 8


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_the_result_can_go_into_given_memory(scale, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg("chelsea.png", scale=scale, exif=exif)
    out = np.zeros((2, 64, 64, 3), np.uint8)
    assert np.shares_memory(decode_resized(data, 64, 64, out=out[1]), out)
    assert np.array_equal(out[1], decode_resized(data, 64, 64)) and not out[0].any()
    square = decode_resized(data, 64, 64)
    assert np.array_equal(resize_rgb(square, 64, 64, out=out[0]), square) and np.array_equal(out[0], square)
