"""Images: what is kept, what is converted and how, and that no damage crashes or passes as half a picture."""

import io
import struct

import numpy as np
import pytest
from pictures import (
    adobe_cmyk,
    encode,
    mean_difference,
    photo,
    pixels,
    png,
    reject,
    smooth,
    swapped_profile,
)
from PIL import Image, ImageCms, ImageOps

from omnidata.images.header import read_header
from omnidata.images.pixels import backend, decode_rgb, process_image, resize_rgb

# --- what is kept -------------------------------------------------------------------------------------------

PLAIN = {
    "jpeg": lambda image: encode(image, "JPEG", quality=90),
    "progressive": lambda image: encode(image, "JPEG", progressive=True),
    "png": lambda image: encode(image, "PNG"),
    "webp": lambda image: encode(image, "WEBP"),
    "webp lossless": lambda image: encode(image, "WEBP", lossless=True),
}


@pytest.mark.parametrize("check", ["full", "quick"])
@pytest.mark.parametrize("name", PLAIN)
def test_keep_leaves_a_plain_image_as_it_is(name, check):
    data = PLAIN[name](photo(90, 60))
    kept = process_image(data, policy="keep", check=check)
    assert kept.data == data and (kept.width, kept.height) == (90, 60)
    assert kept.extension == name.split()[0].replace("jpeg", "jpg").replace("progressive", "jpg")


def test_shrink_never_upscales_and_leaves_small_images_alone():
    data = encode(photo(300, 200), "PNG")
    assert process_image(data, image_size=200).data == data
    assert process_image(data, image_size=201).data == data
    assert process_image(data, image_size=199).data != data


@pytest.mark.parametrize(
    ("size", "stored"),
    [
        ((640, 480), (597, 448)),
        ((480, 640), (448, 597)),
        ((2000, 450), (1991, 448)),
        ((448, 4480), (448, 4480)),
    ],
)
def test_shrink_brings_the_shorter_side_to_the_size(size, stored):
    small = process_image(encode(photo(*size), "JPEG"))
    assert (small.width, small.height) == stored == Image.open(io.BytesIO(small.data)).size
    assert small.extension == "jpg"


def test_conversion_is_lossless_where_the_source_was():
    image = photo(50, 40).convert("P")
    for format in ("GIF", "BMP", "TIFF", "PNG"):
        kept = process_image(encode(image, format), policy="keep")
        assert kept.extension == "png", format
        assert np.array_equal(pixels(kept.data), np.asarray(image.convert("RGB"))), format
    source = encode(photo(50, 40).convert("L"), "JPEG")
    gray = process_image(source, policy="keep")
    assert gray.extension == "jpg"
    assert mean_difference(pixels(gray.data), Image.open(io.BytesIO(source)).convert("RGB")) < 4
    lossy = process_image(encode(photo(50, 40).convert("RGBA"), "WEBP", quality=80), policy="keep")
    assert lossy.extension in ("jpg", "webp")


def test_same_bytes_every_time():
    data = encode(photo(700, 500), "JPEG")
    assert process_image(data).data == process_image(data).data


def test_backend_names_what_decides_the_bytes():
    import simplejpeg
    import torch

    assert simplejpeg.__version__ in backend() and torch.__version__.split("+")[0] in backend()


# --- quality ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["astronaut.png", "coffee.png", "rocket.jpg", "retina.jpg", "motorcycle_left.png"]
)
@pytest.mark.parametrize("size", [(640, 480), (1024, 768), (2000, 1500), (3200, 3200)])
def test_shrink_is_as_good_as_pillow(name, size):
    """Decode + resize against Pillow's own decode + bicubic: mean |difference| below 1 of 255."""
    data = encode(photo(*size, name=name), "JPEG", quality=90)
    small = process_image(data, quality=100)
    theirs = (
        Image.open(io.BytesIO(data))
        .convert("RGB")
        .resize((small.width, small.height), Image.Resampling.BICUBIC)
    )
    both_encoded = pixels(encode(theirs, "JPEG", quality=100, subsampling="4:2:0"))
    assert mean_difference(pixels(small.data), both_encoded) < 0.7


@pytest.mark.parametrize("size", [(448, 448), (597, 448), (100, 70), (900, 600)])
def test_resize_equals_pillow_and_torch(size):
    import torch

    rgb = np.asarray(photo(741, 500, name="motorcycle_left.png"))
    ours = resize_rgb(rgb, *size)
    assert ours.shape == (size[1], size[0], 3) and ours.flags.c_contiguous
    planes = torch.from_numpy(rgb.copy()).permute(2, 0, 1)[None]
    theirs = torch.nn.functional.interpolate(planes, size[::-1], mode="bicubic", antialias=True)[0].permute(
        1, 2, 0
    )
    assert np.array_equal(ours, theirs.numpy())
    assert (
        np.abs(
            ours.astype(int) - np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.BICUBIC))
        ).max()
        <= 2
    )


def test_dct_scaled_decoding_stays_within_one_even_on_noise():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (448, 448, 3), dtype=np.uint8))
    data = encode(noise, "JPEG", quality=95)
    from omnidata.images import pixels as images

    header = read_header(data)
    size = (64, 64)  # 448 / 64 = 7 > 2 × DCT_MARGIN: decoded at half its size
    assert images._dct_divisor(header, size) > 1
    ours = images._decode(data, header, size=size)
    theirs = Image.open(io.BytesIO(data)).resize(size, Image.Resampling.BICUBIC)
    assert mean_difference(ours, theirs) < 1.0


def test_decode_equals_pillow():
    for data in (
        encode(photo(333, 222), "JPEG", quality=85),
        encode(photo(64, 48), "PNG"),
        encode(photo(64, 48), "WEBP"),
    ):
        rgb = decode_rgb(data)
        assert rgb.dtype == np.uint8 and rgb.flags.c_contiguous
        assert mean_difference(rgb, pixels(data)) < 0.05


# --- conversion ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["keep", "shrink"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(format, orientation, policy):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(smooth(96, 64), format, exif=exif)
    ours = process_image(data, policy=policy, image_size=32)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert read_header(data).upright_size == upright.size
    expected = upright.convert("RGB").resize((ours.width, ours.height), Image.Resampling.BICUBIC)
    assert mean_difference(pixels(ours.data), expected) < 2
    assert mean_difference(decode_rgb(data), upright.convert("RGB")) < 0.5


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_16_bits_are_scaled_not_clipped(dtype):
    ramp = np.tile(np.arange(0, 65536, 257, dtype=np.uint16), (4, 1))
    tiff = encode(
        Image.frombytes("I;16B" if dtype == ">u2" else "I;16", (256, 4), ramp.astype(dtype).tobytes()), "TIFF"
    )
    for data in (encode(Image.fromarray(ramp), "PNG"), tiff):
        assert np.array_equal(decode_rgb(data)[0, :, 0], np.arange(256))


def test_16_bit_rgb_png_is_scaled():
    rows = b"".join(b"\0" + struct.pack(">3H", 65535, 32768, 257) * 8 for _ in range(4))
    assert decode_rgb(png(8, 4, rows, depth=16)).reshape(-1, 3).tolist() == [[255, 128, 1]] * 32


def test_alpha_is_laid_over_white():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((1, 1), (0, 0, 0, 128))
    image.putpixel((2, 2), (10, 20, 30, 255))
    rgb = decode_rgb(encode(image, "PNG"))
    assert rgb[0, 0].tolist() == [255, 255, 255] and rgb[2, 2].tolist() == [10, 20, 30]
    assert abs(int(rgb[1, 1, 0]) - 127) <= 1


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_transparent_palette_entry_becomes_white(format):
    image = photo(32, 32).convert("P")
    rgb = decode_rgb(encode(image, format, transparency=image.getpixel((0, 0))))
    assert rgb[0, 0].tolist() == [255, 255, 255]


def test_transparent_gray_becomes_white():
    levels = np.full((4, 4), 10, np.uint8)
    levels[0, 0] = 77
    assert decode_rgb(encode(Image.fromarray(levels), "PNG", transparency=77))[0, 0].tolist() == [
        255,
        255,
        255,
    ]
    deep = Image.fromarray(levels.astype(np.uint16) * 257)
    rgb = decode_rgb(encode(deep, "PNG", transparency=77 * 257))
    assert rgb[0, 0].tolist() == [255, 255, 255] and rgb[1, 1].tolist() == [10, 10, 10]


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (20, 10), color) for color in ("red", "green", "blue")]
    for format in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if format == "WEBP" else {}
        data = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
        kept = process_image(data, policy="keep")
        assert Image.open(io.BytesIO(kept.data)).mode == "RGB" and kept.data != data, format
        assert pixels(kept.data)[5, 5].tolist() == [255, 0, 0], format


def test_cmyk_with_and_without_adobes_inversion():
    data = adobe_cmyk(smooth(64, 64))
    assert mean_difference(decode_rgb(data), smooth(64, 64)) < 4
    at = data.index(b"\xff\xee")
    length = int.from_bytes(data[at + 2 : at + 4], "big")
    plain = data[:at] + data[at + 2 + length :]  # without the marker the same numbers mean the opposite
    assert mean_difference(decode_rgb(plain), smooth(64, 64)) > 40
    kept = process_image(data, policy="keep")
    assert kept.extension == "jpg" and mean_difference(pixels(kept.data), smooth(64, 64)) < 5


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_icc_profile_is_honoured(format):
    data = encode(smooth(64, 64), format, icc_profile=swapped_profile())
    kept = process_image(data, policy="keep")
    assert kept.data != data and b"rXYZ" not in kept.data
    swapped = np.asarray(smooth(64, 64))[..., [1, 0, 2]]
    assert mean_difference(pixels(kept.data), swapped) < 6
    assert (
        mean_difference(
            pixels(process_image(data, image_size=32).data), Image.fromarray(swapped).resize((32, 32))
        )
        < 8
    )


def linear_gray_profile():
    """A gray profile with a straight curve: 55 is a fifth of the light of white, which sRGB writes as 128."""
    xyz = struct.pack(">3i", 63190, 65536, 54061)
    tags = {b"wtpt": b"XYZ \0\0\0\0" + xyz, b"kTRC": b"curv\0\0\0\0" + struct.pack(">IH", 1, 256) + b"\0\0"}
    table, body, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, tag in tags.items():
        table += name + struct.pack(">II", start + len(body), len(tag))
        body += tag
    head = struct.pack(
        ">I4sI4s4s4s12x4s28x", start + len(body), b"lcms", 0x02100000, b"mntr", b"GRAY", b"XYZ ", b"acsp"
    )
    return head + xyz + bytes(48) + table + body


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
def test_gray_profile_is_honoured(format):
    data = encode(Image.new("L", (32, 32), 55), format, icc_profile=linear_gray_profile())
    rgb = decode_rgb(data)
    assert np.ptp(rgb) == 0 and abs(int(rgb[0, 0, 0]) - 128) <= 2


def test_icc_profile_under_alpha_and_palette():
    for mode in ("RGBA", "P"):
        rgb = decode_rgb(encode(smooth(64, 64).convert(mode), "PNG", icc_profile=swapped_profile()))
        expected = np.asarray(smooth(64, 64).convert(mode).convert("RGB"))[..., [1, 0, 2]]
        assert mean_difference(rgb, expected) < 4, mode


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_srgb_profile_and_broken_profile_change_nothing(format):
    for icc in (
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        b"not a profile at all" * 10,
    ):
        data = encode(photo(64, 64), format, icc_profile=icc)
        assert process_image(data, policy="keep").data == data


def test_pixels_without_an_agreed_range_are_refused():
    assert reject(encode(Image.new("F", (8, 8), 0.5), "TIFF")) == "image_format"
    assert reject(encode(Image.new("I", (8, 8), 500), "TIFF")) == "image_format"
