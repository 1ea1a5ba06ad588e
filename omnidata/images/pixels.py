"""Image bytes in, verified upright sRGB bytes out.

    data ──image_header.read_header──▶ ImageHeader          format, bytes, pixels: refused before decoding
         ──_decode──▶ rgb uint8 [H, W, 3]                   simplejpeg (strict) for JPEG, Pillow for the rest
         ──shrink_rgb──▶ shorter side = image_size          antialiased bicubic; resize_rgb in training
         ──encode_rgb──▶ EncodedImage(data, "jpg", 597, 448)

Under ``keep``, and under ``shrink`` if there is nothing to shrink, an image that any reader would show
alike (8-bit RGB, opaque, upright, sRGB, one frame) keeps its original bytes; every other is converted:

    EXIF orientation   applied                     alpha        laid over white
    ICC profile        converted to sRGB           16 bits      scaled to 8, not clipped
    CMYK               to RGB, Adobe's inversion   animation    the first frame
                       undone                      re-encoding  PNG where the source was lossless, else JPEG

So what a shard holds needs no further care: ``decode_rgb`` in the loader sees the same pixels as a person.

``check="full"`` decodes what it keeps; ``"quick"`` looks at header, size and end marker only. What does not
decode in full is refused (RejectError), half a picture included. A damaged file can still decode into wrong
pixels (a decoder notices about a third of the flipped bits in a JPEG): only checksums find those.

One input and one set of libraries (``backend()``, kept in the manifest) give the same bytes every time.
torch is imported where it is used: ``omnidata --help`` must not wait for it.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from omnidata.images.header import (
    MAX_BYTES,
    MAX_PIXELS,
    MAX_STORED_PIXELS,
    ImageHeader,
    open_with_pillow,
    png_chunks,
    png_has_every_row,
    read_header,
    refusing_damage,
)
from omnidata.images.shrink import shrink_rgb
from omnidata.schema import EncodedImage, RejectError

if TYPE_CHECKING:
    from PIL import Image

Policy = Literal["keep", "shrink"]
Check = Literal["full", "quick"]

EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp"}  # formats that may be stored as they are
MAX_JPEG_SIDE = 65_500  # pixels; libjpeg's
BACKGROUND = (255, 255, 255)  # under transparent pixels

# A large JPEG may be decoded at 1/2, 1/4 or 1/8 of its size (in the DCT domain) before the resize, if that
# leaves at least this many times the wanted size. At 3.3 even white noise stays within 1 of 255, on average,
# of the full decode, and photographs within 0.3; at 1.7 noise is off by 4.
DCT_MARGIN = 3.3


def process_image(
    data: bytes,
    *,
    policy: Policy = "shrink",
    image_size: int = 448,
    size: tuple[int, int] | None = None,
    check: Check = "full",
    quality: int = 90,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
) -> EncodedImage:
    """Verify one image and make it ready to store; RejectError if it cannot be trusted.

    A 2000×1500 JPEG under ``shrink`` at 448 becomes a 597×448 JPEG; a 300×200 one keeps its bytes.
    ``size`` (width, height) names the size in place of the policy.
    """
    header = read_header(data, max_bytes=max_bytes, max_pixels=max_pixels)
    width, height = header.upright_size
    scale = image_size / min(width, height) if policy == "shrink" else 1.0
    if size is None and scale < 1:
        size = max(1, round(width * scale)), max(1, round(height * scale))
    is_whole = size in (None, (width, height))
    if is_whole and _is_final(header):
        _check_kept(data, header, check)
        return EncodedImage(data, EXTENSIONS[header.format], width, height)
    rgb = _decode(data, header, size=size or (width, height), resize=shrink_rgb)
    lossless = header.lossless and is_whole
    return encode_rgb(rgb, lossless=lossless, quality=quality)


def decode_rgb(data: bytes) -> np.ndarray:
    """Stored or any other image -> uint8 ``[H, W, 3]``, upright, sRGB. What the loader calls."""
    header = read_header(data, max_pixels=MAX_STORED_PIXELS)
    return _decode(data, header, size=header.upright_size)


def decode_resized(data: bytes, width: int, height: int, *, out: np.ndarray | None = None) -> np.ndarray:
    """``resize_rgb(decode_rgb(data), width, height)``; large JPEGs are decoded at a part of their size."""
    header = read_header(data, max_pixels=MAX_STORED_PIXELS)
    return _decode(data, header, size=(width, height), out=out)


def resize_rgb(
    rgb: np.ndarray,
    width: int,
    height: int,
    *,
    extent: tuple[float, float] | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """uint8 ``[H, W, 3]`` -> ``[height, width, 3]``: antialiased bicubic, as the model's ImageProcessor.

    Args:
        rgb: the picture.
        width, height: what it becomes.
        extent: how many columns and rows the picture fills, where its last ones are only covered in part.
        out: contiguous; where the result goes, and what is returned.
    """
    import torch

    if rgb.shape[:2] == (height, width):
        return rgb if out is None else _copied(rgb, out)
    resized = (np.empty((height, width, 3), np.uint8) if out is None else out)[None]
    scales = (height / extent[1], width / extent[0]) if extent else (None, None)
    # Same numbers as F.interpolate(..., mode="bicubic", antialias=True), which returns planes: interleaving
    # them again takes twice as long as the resize itself at 640×480. Given ``out`` it works in place.
    readable = np.require(rgb, requirements=["C", "W"])  # torch warns of arrays that may not be written to
    torch.ops.aten._upsample_bicubic2d_aa.out(
        _as_nchw(readable[None]), [height, width], False, *scales, out=_as_nchw(resized)
    )
    return resized[0]


def fit_rgb(rgb: np.ndarray, size: int, *, fit: str = "squash", out: np.ndarray | None = None) -> np.ndarray:
    """uint8 ``[H, W, 3]`` -> ``[size, size, 3]``: the whole picture squashed, or its centre.

    ``center_crop`` brings the shorter side to ``size`` and cuts the middle of the longer one, as CLIP's does.
    """
    if fit == "squash":
        return resize_rgb(rgb, size, size, out=out)
    height, width = rgb.shape[:2]
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    # Cut first: the same square of the picture, and the resize has less to do.
    return resize_rgb(np.ascontiguousarray(rgb[top : top + side, left : left + side]), size, size, out=out)


def _copied(rgb: np.ndarray, out: np.ndarray) -> np.ndarray:
    np.copyto(out, rgb)
    return out


def _as_nchw(images: np.ndarray) -> object:
    """A channels-last torch view of uint8 ``[N, H, W, C]``."""
    import torch

    return torch.from_numpy(images).permute(0, 3, 1, 2)


@functools.cache
def backend() -> str:
    """What decodes and resizes, with versions, for the manifest: it decides the stored bytes."""
    from importlib.metadata import version

    names = ("simplejpeg", "cykooz-resizer", "torch", "pillow")
    simplejpeg, resizer, torch, pillow = (version(name) for name in names)
    return (
        f"simplejpeg {simplejpeg} + cykooz-resizer {resizer} antialiased bicubic (tiles: torch {torch}); "
        f"Pillow {pillow}"
    )


# --- keeping the original bytes -----------------------------------------------------------------------------


def _is_final(header: ImageHeader) -> bool:
    """Whether the file as it is shows the right picture in any reader."""
    return header.plain and header.orientation == 1 and _to_srgb(header.icc, "RGB") is None


def _check_kept(data: bytes, header: ImageHeader, check: Check) -> None:
    """Raise RejectError unless the bytes hold a whole picture, as far as ``check`` looks."""
    if header.format == "jpeg":
        if data.rfind(b"\xff\xd9", header.data_offset) < 0:
            raise RejectError("image_corrupt", f"jpeg: no end marker in {len(data):,} bytes: truncated")
        if check == "full":
            # An eighth of the size skips most of the arithmetic, but reads and checks every coefficient.
            _decode_jpeg(data, mode="RGB", min_size=(1, 1))
    elif check == "full":
        _open_whole(data, header)
    elif header.format == "webp":
        _check_riff(data)


def _check_riff(data: bytes) -> None:
    declared = int.from_bytes(data[4:8], "little") + 8
    if declared > len(data):
        raise RejectError("image_corrupt", f"webp: truncated, {len(data):,} of {declared:,} bytes")


# --- decoding -----------------------------------------------------------------------------------------------


def _decode(
    data: bytes,
    header: ImageHeader,
    *,
    size: tuple[int, int],
    out: np.ndarray | None = None,
    resize: Callable[..., np.ndarray] | None = None,
) -> np.ndarray:
    """Upright sRGB at ``size`` (width, height), by ``resize`` (resize_rgb unless given)."""
    resize = resize or resize_rgb
    stored_size = size if header.orientation < 5 else size[::-1]
    extent = None
    if header.format == "jpeg":
        divisor = _dct_divisor(header, stored_size)
        rgb = _jpeg_rgb(data, header, divisor=divisor)
        if divisor > 1:  # 1501 columns become 751 that the picture fills to 750.5
            extent = header.width / divisor, header.height / divisor
    else:
        rgb = _pillow_rgb(_open_whole(data, header), header)
    if header.orientation == 1:
        return resize(rgb, *stored_size, extent=extent, out=out)
    upright = _upright(resize(rgb, *stored_size, extent=extent), header.orientation)
    return upright if out is None else _copied(upright, out)


def _jpeg_rgb(data: bytes, header: ImageHeader, *, divisor: int) -> np.ndarray:
    """sRGB at the stored size divided by ``divisor``, rounded up."""
    from PIL import Image

    mode = _JPEG_MODES.get(header.num_channels, "RGB")
    transform = _to_srgb(header.icc, mode)
    min_size = header.width // divisor, header.height // divisor
    if mode != "CMYK" and transform is None:
        return _decode_jpeg(data, mode="RGB", min_size=min_size)
    pixels = _decode_jpeg(data, mode=mode, min_size=min_size)
    if header.inverted_cmyk:
        pixels = 255 - pixels
    image = Image.frombytes(mode, (pixels.shape[1], pixels.shape[0]), pixels.tobytes())
    return np.array(_apply(transform, image) if transform else image.convert("RGB"))


_JPEG_MODES = {1: "L", 3: "RGB", 4: "CMYK"}  # by number of channels, as Pillow names them


def _dct_divisor(header: ImageHeader, size: tuple[int, int]) -> int:
    """By what to divide the stored size while decoding to ``size``: as much as DCT_MARGIN allows."""
    for divisor in (8, 4, 2):
        margin = divisor * DCT_MARGIN
        if header.width >= margin * size[0] and header.height >= margin * size[1]:
            return divisor
    return 1


def _decode_jpeg(data: bytes, *, mode: str, min_size: tuple[int, int]) -> np.ndarray:
    import simplejpeg

    colours = "GRAY" if mode == "L" else mode
    try:
        return simplejpeg.decode_jpeg(
            data, colours, min_width=min_size[0], min_height=min_size[1], strict=True
        )
    except ValueError as error:
        raise RejectError("image_corrupt", f"jpeg: {error}") from None


def _upright(rgb: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation: 6, the common one, means that the camera was turned to the left."""
    if orientation >= 5:
        rgb = rgb.transpose(1, 0, 2)
    flip_rows = orientation in (3, 4, 7, 8)
    flip_columns = orientation in (2, 3, 6, 7)
    rgb = rgb[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
    return np.ascontiguousarray(rgb)


# --- the other formats, by Pillow ---------------------------------------------------------------------------


def _open_whole(data: bytes, header: ImageHeader) -> Image.Image:
    """The first frame, decoded in full."""
    if header.format == "png":
        png_chunks(data, check_crc=True)
    elif header.format == "webp":
        _check_riff(data)
    image = open_with_pillow(data, header.format)
    with refusing_damage(header.format):
        image.load()
        if header.format == "png" and _may_lack_rows(data, image) and not png_has_every_row(data):
            raise RejectError("image_corrupt", "png: fewer rows of pixels than its header promises")
    return image


def _may_lack_rows(data: bytes, image: Image.Image) -> bool:
    """A row that never came is all zero. Counting the unpacked bytes is dear, so only then."""
    interlaced = data[28] == 1
    last_row = image.crop((0, image.height - 1, image.width, image.height))
    return interlaced or not np.asarray(last_row).any()


def _pillow_rgb(image: Image.Image, header: ImageHeader) -> np.ndarray:
    """8 bits a channel, opaque, sRGB."""
    from PIL import Image

    if image.mode.startswith("I;16"):
        image = _scale_16_bits(image)
    if image.mode in ("I", "F", "LAB", "HSV"):
        detail = f"{header.format}: pixels of mode {image.mode} have no agreed range; use 8 or 16 bits"
        raise RejectError("image_format", detail)
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.convert("RGB")
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    transform = _to_srgb(header.icc, image.mode)
    image = _apply(transform, image) if transform else image.convert("RGB")
    if alpha is not None:
        image = Image.composite(image, Image.new("RGB", image.size, BACKGROUND), alpha)
    return np.array(image)


def _scale_16_bits(image: Image.Image) -> Image.Image:
    """0..65535 -> 0..255. Pillow's own conversion clips, which turns nearly every pixel white."""
    from PIL import Image

    values = np.asarray(image).astype(np.uint32)
    scaled = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        scaled.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return scaled


# --- colour profiles ----------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _to_srgb(icc: bytes | None, mode: str) -> Any:
    """The transform from a profile to sRGB; None if there is nothing to do.

    Nothing to do: no profile; one that amounts to sRGB (no probe colour moves by more than 2 of 255); one
    that is broken, or for other channels than the image has, which browsers ignore as well.
    """
    if not icc:
        return None
    from PIL import Image, ImageCms

    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    if mode == "CMYK":
        return transform
    probe = Image.fromarray(_probe_colours()).convert(mode)
    moved = np.abs(np.asarray(_apply(transform, probe), int) - np.asarray(probe.convert("RGB"), int))
    return None if moved.max() <= 2 else transform


def _probe_colours() -> np.ndarray:
    """A 36×6 picture of 216 colours, evenly over the cube."""
    levels = np.arange(0, 256, 51, dtype=np.uint8)
    return np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(36, 6, 3)


def _apply(transform: Any, image: Image.Image) -> Any:
    from PIL import ImageCms

    return ImageCms.applyTransform(image, transform)


# --- encoding -----------------------------------------------------------------------------------------------


def encode_rgb(rgb: np.ndarray, *, lossless: bool, quality: int) -> EncodedImage:
    """uint8 ``[H, W, 3]`` -> PNG if nothing may be lost or a side is too long for JPEG, else JPEG."""
    height, width = rgb.shape[:2]
    if lossless or max(height, width) > MAX_JPEG_SIDE:
        return EncodedImage(_png(rgb), "png", width, height)
    import simplejpeg

    data = simplejpeg.encode_jpeg(np.ascontiguousarray(rgb), quality, "RGB", "420")
    return EncodedImage(data, "jpg", width, height)


def _png(rgb: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "PNG")
    return buffer.getvalue()
