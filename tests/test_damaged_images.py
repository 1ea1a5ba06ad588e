"""Images that must be refused: bombs before they are decoded, damage wherever it is."""

import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import (
    adobe_cmyk,
    chunk,
    encode,
    photo,
    pixels,
    png,
    reject,
    swapped_profile,
)
from PIL import ImageDraw

from omnidata.images.header import read_header, sniff
from omnidata.images.pixels import decode_rgb, process_image
from omnidata.schema import IMAGE_EXTENSIONS, RejectError

# --- refused before decoding --------------------------------------------------------------------------------


def test_unknown_formats():
    for data in (
        b"",
        b"\xff",
        b"<html>404</html>",
        b"%PDF-1.7",
        encode(photo(8, 8), "PPM"),
        encode(photo(8, 8), "TGA"),
    ):
        assert reject(data) == "image_format"


def test_the_first_bytes_decide():
    formats = {"JPEG": "jpeg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tiff"}
    assert {name: sniff(encode(photo(8, 8), name)) for name in formats} == formats
    assert set(IMAGE_EXTENSIONS) >= {process_image(encode(photo(8, 8), name)).extension for name in formats}


def test_too_many_bytes_or_pixels():
    data = encode(photo(100, 50), "JPEG")
    assert reject(data, max_bytes=len(data) - 1) == "image_too_large"
    assert reject(data, max_pixels=4999) == "image_too_large"
    assert process_image(data, max_bytes=len(data), max_pixels=5000)


@pytest.mark.parametrize("side", [14_000, 60_000])
def test_decompression_bombs(side):
    gif = b"GIF89a" + struct.pack("<HHBBB", side, side, 0xF0, 0, 0) + bytes(6) + b","
    gif += struct.pack("<HHHHB", 0, 0, side, side, 0) + b"\x02\x00;"
    bmp = (
        b"BM"
        + struct.pack("<IHHI", 100, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, side, side, 1, 24, *[0] * 6)
    )
    for bomb in (png(side, side, bytes(100_000)), gif, bmp):
        assert reject(bomb) == "image_too_large"


def test_a_jpeg_of_a_thousand_scans():
    data = encode(photo(32, 32), "JPEG", progressive=True)
    scans = data[data.index(b"\xff\xda") : -2]
    assert reject(data[:-2] + scans * 100 + data[-2:]) == "image_too_large"


def test_header_without_size_or_pixels():
    data = bytearray(encode(photo(32, 32), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 7] = b"\0\0"
    assert reject(bytes(data)) == "image_corrupt"
    assert reject(b"\xff\xd8\xff\xd9") == "image_corrupt"
    assert reject(png(0, 5, b"")) == "image_corrupt"


# --- damage -------------------------------------------------------------------------------------------------

SMALL = photo(96, 72)
DAMAGEABLE = {
    "jpeg": encode(SMALL, "JPEG"),
    "progressive": encode(SMALL, "JPEG", progressive=True),
    "restarts": encode(SMALL, "JPEG", restart_marker_blocks=4),
    "gray": encode(SMALL.convert("L"), "JPEG"),
    "cmyk": adobe_cmyk(SMALL),
    "png": encode(SMALL, "PNG"),
    "png palette": encode(SMALL.convert("P"), "PNG"),
    "webp": encode(SMALL, "WEBP"),
    "webp lossless": encode(SMALL, "WEBP", lossless=True, exif=b"Exif\0\0nonsense"),
    "gif": encode(SMALL, "GIF"),
    "bmp": encode(SMALL, "BMP"),
    "tiff": encode(SMALL, "TIFF"),
    "tiff lzw": encode(SMALL, "TIFF", compression="tiff_lzw"),
    "tiff deflate": encode(SMALL, "TIFF", compression="tiff_adobe_deflate"),
    "tiff jpeg": encode(SMALL, "TIFF", compression="jpeg"),
    "tiff profile": encode(SMALL, "TIFF", compression="jpeg", icc_profile=bytes(swapped_profile())),
}
POLICIES = st.sampled_from(["keep", "shrink"])


@pytest.mark.parametrize("name", DAMAGEABLE)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_truncated_file_never_passes_as_half_a_picture(name, data):
    whole = DAMAGEABLE[name]
    policy = data.draw(POLICIES)
    cut = data.draw(st.integers(0, len(whole) - 1))
    expected = process_image(whole, policy=policy, image_size=32)
    try:
        result = process_image(whole[:cut], policy=policy, image_size=32)
    except RejectError:
        return
    assert len(whole) - cut <= 2, "only a trailer may be missing"
    assert np.array_equal(pixels(result.data), pixels(expected.data))


@pytest.mark.parametrize("name", DAMAGEABLE)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_flipped_bits_are_refused_or_give_a_whole_picture(name, data):
    damaged = bytearray(DAMAGEABLE[name])
    for position in data.draw(st.lists(st.integers(0, 8 * len(damaged) - 1), min_size=1, max_size=4)):
        damaged[position // 8] ^= 1 << position % 8
    try:
        result = process_image(bytes(damaged), policy=data.draw(POLICIES), image_size=32)
    except RejectError:
        return
    assert decode_rgb(result.data).shape == (result.height, result.width, 3)


@settings(max_examples=200, deadline=None)
@given(
    magic=st.sampled_from([data[:size] for data in DAMAGEABLE.values() for size in (12, 30, 200)]),
    junk=st.binary(),
)
def test_junk_behind_a_good_beginning(magic, junk):
    assert reject(magic + junk)


def test_every_flipped_bit_of_a_png_is_found():
    data = encode(photo(24, 16), "PNG")
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 0x10
        assert reject(bytes(damaged)) in ("image_corrupt", "image_format", "image_too_large")


def test_half_a_picture_that_pretends_to_be_whole():
    jpeg, webp = DAMAGEABLE["jpeg"], DAMAGEABLE["webp"]
    half = webp[: len(webp) // 2 // 2 * 2]
    half = (
        half[:4]
        + struct.pack("<I", len(half) - 8)
        + half[8:16]
        + struct.pack("<I", len(half) - 20)
        + half[20:]
    )
    rows = b"".join(b"\0" + bytes(row) for row in np.asarray(SMALL).reshape(72, -1))
    assert process_image(png(96, 72, rows))
    for data in (
        jpeg[: len(jpeg) // 2] + b"\xff\xd9",
        half,
        png(96, 72, rows[: len(rows) // 2]),
        png(96, 72, rows[:-1]),
        png(96, 72, rows[: len(rows) // 2], interlaced=1),
    ):
        assert reject(data) == "image_corrupt"


def test_black_last_row_and_interlacing_are_no_damage():
    image = photo(24, 16)
    ImageDraw.Draw(image).rectangle((0, 8, 24, 16), "black")
    assert process_image(encode(image, "PNG"), policy="keep")
    passes = [
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    ]
    for width, height in ((24, 16), (5, 3), (1, 1)):
        rgb = np.asarray(image)[:height, :width]
        parts = [rgb[top::down, left::across] for left, top, across, down in passes]
        rows = b"".join(b"\0" + row.tobytes() for part in parts if part.size for row in part)
        assert np.array_equal(decode_rgb(png(width, height, rows, interlaced=1)), rgb)
        assert reject(png(width, height, rows[:-1], interlaced=1)) == "image_corrupt"


def test_quick_check_sees_a_missing_end_but_not_damaged_pixels():
    for name in ("jpeg", "progressive", "png", "webp"):
        data = DAMAGEABLE[name]
        assert reject(data[:-100], policy="keep", check="quick") == "image_corrupt"
    damaged = bytearray(DAMAGEABLE["png"])
    damaged[len(damaged) // 2] ^= 1
    assert process_image(bytes(damaged), policy="keep", check="quick").data == damaged
    assert reject(bytes(damaged), policy="keep", check="full") == "image_corrupt"


def test_full_check_of_a_kept_jpeg_finds_what_a_full_decode_finds():
    """It decodes at an eighth of the size; the verdict must be the same."""
    import simplejpeg

    data, rng = encode(photo(160, 120), "JPEG"), np.random.default_rng(0)
    verdicts = []
    for position in rng.integers(read_header(data).data_offset + 12, len(data), 150):
        damaged = bytearray(data)
        damaged[position] ^= 1 << int(rng.integers(8))
        try:
            simplejpeg.decode_jpeg(bytes(damaged), strict=True)
            whole = True
        except ValueError:
            whole = False
        try:
            process_image(bytes(damaged), policy="keep")
            verdicts.append((True, whole))
        except RejectError:
            verdicts.append((False, whole))
    assert all(ours == theirs for ours, theirs in verdicts)
    assert {(True, True), (False, False)} <= set(verdicts)


def test_a_picture_too_long_for_jpeg_is_shrunk_into_a_png():
    image = process_image(encode(photo(70_000, 40), "PNG"), image_size=30)
    assert (image.extension, image.width, image.height) == ("jpg", 52_500, 30)
    image = process_image(encode(photo(90_000, 40), "PNG"), image_size=30)
    assert (image.extension, image.width, image.height) == ("png", 67_500, 30)
    assert decode_rgb(image.data).shape == (30, 67_500, 3)


def _png_of(*chunks):
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, body) for name, body in (*chunks, (b"IEND", b"")))


IHDR = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
ROW = zlib.compress(bytes(4))
BOMBS = {
    "rows beyond the picture": _png_of((b"IHDR", IHDR), (b"IDAT", zlib.compress(bytes(200_000_000)))),
    "a second size": _png_of(
        (b"IHDR", IHDR), (b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)), (b"IDAT", ROW)
    ),
    "no palette": _png_of((b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 3, 0, 0, 0)), (b"IDAT", ROW)),
    "a flood of chunks": _png_of((b"IHDR", IHDR), *[(b"tEXt", b"")] * 200_001, (b"IDAT", ROW)),
    "a flood of comments": b"GIF89a\1\0\1\0\0\0\0" + b"\x21\xfe\xff" + b"x" * 255 + b"\0" * 1
    + (b"\x21\xfe\xff" + b"x" * 255 + b"\0") * 5000 + b",\0\0\0\0\1\0\1\0\0\2\2D\1\0;",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_what_would_take_the_machine_is_refused_within_64_mb(name, tmp_path):
    (tmp_path / "bomb").write_bytes(BOMBS[name])
    code = (
        "import resource, sys\nfrom omnidata.images.pixels import process_image\n"
        "from omnidata.schema import RejectError\nfrom PIL import Image, GifImagePlugin, PngImagePlugin\n"
        "data = open(sys.argv[1], 'rb').read()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    process_image(data)\nexcept RejectError as error:\n    print(error.reason)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "bomb")]
    reason, megabytes = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert reason == "image_corrupt" and int(megabytes) <= 64
