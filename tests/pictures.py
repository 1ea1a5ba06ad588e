"""Pictures for tests of the image stages: real photographs, encoded and compared."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import skimage
from PIL import Image, ImageCms, ImageOps

from omnidata.images.pixels import process_image
from omnidata.schema import RejectError

PHOTOS = Path(skimage.__file__).parent / "data"


def photo(width, height, *, name="astronaut.png"):
    """A real photograph at this size, without the colour profile that its file may have."""
    rgb = Image.fromarray(np.asarray(Image.open(PHOTOS / name).convert("RGB")))
    return ImageOps.fit(rgb, (width, height), Image.Resampling.LANCZOS)


def smooth(width, height):
    """The same without detail: JPEG keeps it nearly exact, and no flip or swapped colour goes unseen."""
    return photo(6, 4).resize((width, height), Image.Resampling.BICUBIC)


def encode(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixels(data):
    """Pillow's view of stored bytes: the oracle. Stored images need no care, so none is taken."""
    image = Image.open(io.BytesIO(data))
    assert image.mode == "RGB" and image.getexif().get(0x0112, 1) == 1
    return np.asarray(image, int)


def mean_difference(a, b):
    return np.abs(np.asarray(a, int) - np.asarray(b, int)).mean()


def reject(data, **options):
    with pytest.raises(RejectError) as error:
        process_image(data, **options)
    return error.value.reason


def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width, height, rows, *, depth=8, color=2, interlaced=0):
    """A PNG with right checksums around any pixel data."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlaced)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def adobe_cmyk(image):
    """As Photoshop writes it: inverted, with an Adobe marker."""
    return encode(image.convert("CMYK"), "JPEG", quality=95)


def swapped_profile():
    """sRGB with the red and green primaries exchanged: a profile that cannot be overlooked."""
    icc = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    table = {
        bytes(icc[at : at + 4]): at for at in range(132, 132 + 12 * struct.unpack(">I", icc[128:132])[0], 12)
    }
    red, green = table[b"rXYZ"], table[b"gXYZ"]
    icc[red + 4 : red + 12], icc[green + 4 : green + 12] = (
        icc[green + 4 : green + 12],
        icc[red + 4 : red + 12],
    )
    return bytes(icc)
