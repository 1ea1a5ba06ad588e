"""What an image says about itself, read from its first bytes, before anything is decoded.

    data ──sniff──▶ "jpeg" ──read_header──▶ ImageHeader(width, height, orientation, icc, plain, …)
                                   └──▶ RejectError: unknown format, over a limit, no header

A file of ten kilobytes can claim a hundred thousand by a hundred thousand pixels, so the limits are
applied here: a decoder only ever sees what has passed. Magic bytes decide the format, never a file's name.

JPEG and PNG, nearly all of any corpus, are read by the few lines below (about 10 µs per image); the
others by Pillow, which reads no pixels when it opens a file.
"""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from omnidata.outcomes import without_addresses
from omnidata.schema import RejectError

MAX_PIXELS = 178_956_970  # of a picture in a corpus, as Pillow's own limit; --max-pixels
MAX_BYTES = 4 * MAX_PIXELS  # of a picture's file: as many pixels, not compressed, with transparency
MAX_FETCHED_BYTES = 50_000_000  # of a picture from a web server of the record's choice
MAX_STORED_PIXELS = 1 << 30  # of a picture that a build has let pass
MAX_SCANS = 100  # a progressive JPEG has about ten; each one costs a pass over the whole picture

_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0..SOF15; the three are tables
MAX_CHUNKS = 200_000  # of a PNG; encoders write one for about 8 to 64 KB
MAX_BEYOND = 1 << 16  # bytes of pixel data behind a PNG's last row
MAX_COMMENTS = 1 << 20  # bytes of a GIF's comments: Pillow joins them one by one
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """One image's own account of itself. Width and height are as stored: orientation not yet applied."""

    format: str  # jpeg | png | webp | gif | bmp | tiff
    width: int
    height: int
    orientation: int = 1  # EXIF, 1..8
    icc: bytes | None = None
    plain: bool = False  # 8-bit RGB, opaque, one frame: no reader needs to convert it
    lossless: bool = True  # a re-encoded copy must be lossless too
    num_channels: int = 3
    inverted_cmyk: bool = False  # Adobe writes CMYK upside down, and says so by its marker
    data_offset: int = 0  # where compressed pixels start (JPEG: the first scan)

    @property
    def upright_size(self) -> tuple[int, int]:
        """(width, height) as a person sees it."""
        swapped = self.orientation >= 5
        return (self.height, self.width) if swapped else (self.width, self.height)


def sniff(data: bytes) -> str | None:
    """Format by magic bytes: ``sniff(b"GIF89a...")`` -> ``"gif"``; None when it is none of the six."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpeg"
    if data[:8] == _PNG_SIGNATURE:
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "tiff"
    return "bmp" if data[:2] == b"BM" else None


def read_header(data: bytes, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS) -> ImageHeader:
    """Parse the header and apply the limits; raises RejectError and decodes nothing."""
    if len(data) > max_bytes:
        raise RejectError("image_too_large", f"{len(data):,} bytes; the limit is {max_bytes:,}")
    kind = sniff(data)
    if kind is None:
        raise RejectError("image_format", f"starts with {data[:12]!r}: not JPEG, PNG, WebP, GIF, BMP or TIFF")
    try:
        header = _READERS[kind](data)
    except (struct.error, IndexError):
        raise RejectError("image_corrupt", f"{kind}: the file ends inside its header") from None
    if header.width < 1 or header.height < 1:
        raise RejectError("image_corrupt", f"{kind}: the header says {header.width}×{header.height} pixels")
    if header.width * header.height > max_pixels:
        size = f"{header.width}×{header.height}"
        raise RejectError("image_too_large", f"{size} pixels; the limit is {max_pixels:,} in all")
    return header


# --- JPEG: a chain of segments, marker + length, up to the first scan ---------------------------------------


def _jpeg_header(data: bytes) -> ImageHeader:
    frame: tuple[int, int, int] | None = None
    orientation, adobe, profile, progressive = 0, False, {}, False
    position = 2
    while True:
        marker, position = _next_marker(data, position)
        if marker == 0xDA:
            break
        length = int.from_bytes(data[position : position + 2], "big")
        if length < 2 or position + length > len(data):
            raise RejectError("image_corrupt", f"jpeg: the segment at byte {position} runs past the end")
        body = data[position + 2 : position + length]
        if marker in _JPEG_FRAMES:
            frame = _jpeg_frame(body)
            progressive = marker & 3 == 2  # SOF2, SOF6, SOF10, SOF14
        elif marker == 0xE1 and body[:6] == b"Exif\0\0":
            orientation = orientation or exif_orientation(body[6:])
        elif marker == 0xE2 and body[:12] == b"ICC_PROFILE\0":
            profile[body[12]] = body[14:]
        elif marker == 0xEE and body[:5] == b"Adobe":
            adobe = True
        position += length
    if frame is None:
        raise RejectError("image_corrupt", "jpeg: pixels before the frame header")
    height, width, channels = frame
    if progressive or data[position + 2] < channels:  # the first scan does not hold every channel
        _refuse_scan_bomb(data)
    return ImageHeader(
        "jpeg",
        width,
        height,
        orientation=orientation or 1,
        icc=b"".join(profile[number] for number in sorted(profile)) or None,
        plain=channels == 3,
        lossless=False,
        num_channels=channels,
        inverted_cmyk=adobe and channels == 4,
        data_offset=position,
    )


def _next_marker(data: bytes, position: int) -> tuple[int, int]:
    """The marker at ``position``, and where its segment starts; fill bytes (0xFF) may come first."""
    if position >= len(data):
        raise RejectError("image_corrupt", "jpeg: the file ends inside its header")
    if data[position] != 0xFF:
        raise RejectError("image_corrupt", f"jpeg: no marker at byte {position}")
    while data[position] == 0xFF:
        position += 1
    marker = data[position]
    if marker == 0xD9:
        raise RejectError("image_corrupt", "jpeg: ends before any pixels")
    return marker, position + 1


def _jpeg_frame(body: bytes) -> tuple[int, int, int]:
    precision, height, width, channels = struct.unpack(">BHHB", body[:6])
    if precision != 8:
        raise RejectError("image_format", f"jpeg: {precision} bits a channel; convert it to 8 bits")
    return height, width, channels


def _refuse_scan_bomb(data: bytes) -> None:
    """A small progressive file with thousands of scans keeps a decoder busy for hours."""
    scans = data.count(b"\xff\xda")  # inside pixel data 0xFF is always followed by 0x00 or a restart marker
    if scans > MAX_SCANS:
        raise RejectError("image_too_large", f"jpeg: {scans} scans; the limit is {MAX_SCANS}")


def exif_orientation(tiff: bytes) -> int:
    """Orientation (1..8) in an EXIF block; 1 if it is absent or unreadable, as viewers do."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 10:
        return 1
    (start,) = struct.unpack(order + "I", tiff[4:8])
    if start + 2 > len(tiff):
        return 1
    (count,) = struct.unpack(order + "H", tiff[start : start + 2])
    for entry in range(start + 2, min(start + 2 + 12 * count, len(tiff) - 11), 12):
        tag, kind, _, value = struct.unpack(order + "HHIH", tiff[entry : entry + 10])
        if tag == 0x0112 and kind == 3:
            return value if 1 <= value <= 8 else 1
    return 1


# --- PNG: a chain of chunks, length + name + body + CRC -----------------------------------------------------


def png_chunks(data: bytes, *, check_crc: bool) -> list[tuple[bytes, int, int]]:
    """Every chunk as (name, start, end) of its body, IEND included; RejectError if the chain breaks."""
    chunks, position, view = [], 8, memoryview(data)
    while True:
        if position + 12 > len(data):
            raise RejectError("image_corrupt", f"png: no end marker in {len(data):,} bytes: truncated")
        length = int.from_bytes(data[position : position + 4], "big")
        name, start, end = data[position + 4 : position + 8], position + 8, position + 8 + length
        if end + 4 > len(data):
            raise RejectError("image_corrupt", f"png: chunk {name!r} at byte {position} runs past the end")
        if check_crc and zlib.crc32(view[start - 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise RejectError("image_corrupt", f"png: checksum of chunk {name!r} at byte {position} is wrong")
        chunks.append((name, start, end))
        if name == b"IEND":
            return chunks
        if len(chunks) > MAX_CHUNKS:
            raise RejectError("image_corrupt", f"png: more than {MAX_CHUNKS:,} chunks")
        position = end + 4


def png_has_every_row(data: bytes) -> bool:
    """Whether the pixel data unpack to the size in the header; Pillow leaves missing rows black."""
    width, height, depth, color, _, _, interlaced = struct.unpack(">IIBBBBB", data[16:29])
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color]
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    due = 0
    for left, top, across, down in passes:
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        due += rows * (1 + -(-columns * bits // 8)) if columns > 0 and rows > 0 else 0
    unpacker = zlib.decompressobj()
    for name, start, end in png_chunks(data, check_crc=False):
        packed = data[start:end] if name == b"IDAT" else b""
        while packed and due > 0:
            due -= len(unpacker.decompress(packed, 1 << 20))
            packed = unpacker.unconsumed_tail
        if len(packed) > MAX_BEYOND:  # zeros that unpack a thousandfold
            raise RejectError("image_corrupt", f"png: {len(packed):,} bytes behind the last row")
    return due <= 0 or due - len(unpacker.flush()) <= 0


# (left, top, across, down): where each pass of an interlaced PNG starts and the distance between its pixels
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def _png_header(data: bytes) -> ImageHeader:
    width, height, depth, color = struct.unpack(">IIBB", data[16:26])
    if data[12:16] != b"IHDR":
        raise RejectError("image_corrupt", "png: the first chunk is not IHDR")
    places = png_chunks(data, check_crc=False)
    names = [name for name, _, _ in places]
    if names.count(b"IHDR") > 1:
        raise RejectError("image_corrupt", "png: a second IHDR, of another size perhaps")
    if color == 3 and b"PLTE" not in names:
        raise RejectError("image_corrupt", "png: colours of a palette that is not there")
    chunks = {name: data[start:end] for name, start, end in places if name in _PNG_NOTES}
    return ImageHeader(
        "png",
        width,
        height,
        orientation=exif_orientation(chunks.get(b"eXIf", b"")),
        icc=_png_profile(chunks.get(b"iCCP")),
        plain=depth == 8 and color == 2 and not chunks.keys() & {b"tRNS", b"acTL"},
    )


_PNG_NOTES = frozenset((b"eXIf", b"iCCP", b"tRNS", b"acTL"))


def _png_profile(chunk: bytes | None) -> bytes | None:
    """The ICC profile of an iCCP chunk: name, NUL, method, zlib stream; None if it does not unpack."""
    if chunk is None:
        return None
    try:
        return zlib.decompressobj().decompress(chunk[chunk.index(b"\0") + 2 :], 4_000_000) or None
    except (ValueError, zlib.error):
        return None


# --- the other formats, opened by Pillow --------------------------------------------------------------------


def open_with_pillow(data: bytes, kind: str) -> Any:
    """A lazy ``PIL.Image`` of exactly this format (Pillow would otherwise try its forty others)."""
    from PIL import Image

    with refusing_damage(kind):
        return Image.open(io.BytesIO(data), formats=[kind.upper()])


@contextlib.contextmanager
def refusing_damage(kind: str) -> Iterator[None]:
    """Turn what Pillow raises on a damaged file into a RejectError."""
    from PIL import Image

    try:
        with _tiff_damage_raises() if kind == "tiff" else contextlib.nullcontext():
            yield
    except RejectError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError) as error:
        raise RejectError("image_too_large", f"{kind}: {without_addresses(str(error))}") from None
    except PILLOW_ERRORS as error:
        words = without_addresses(str(error)) or type(error).__name__
        raise RejectError("image_corrupt", f"{kind}: {words}") from None


@contextlib.contextmanager
def _tiff_damage_raises() -> Iterator[None]:
    """Pillow only warns of tags that lie behind the end of a file, such as the colour profile."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Truncated File Read|Tag data larger|Corrupt EXIF", UserWarning)
        yield


# What its parsers were seen to raise when bits were flipped: they were not written with damage in mind.
PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    Warning,
    struct.error,
    zlib.error,
)


def _refuse_comments(data: bytes) -> None:
    """RejectError for a GIF whose comments would take Pillow minutes; damage is for Pillow to name."""
    position = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    comments = 0
    while position + 1 < len(data):
        kind, is_comment = data[position], data[position : position + 2] == b"\x21\xfe"
        if kind == 0x2C and position + 9 < len(data):  # an image: its header, its own palette, its code size
            flags = data[position + 9]
            position += 11 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
        elif kind == 0x21:
            position += 2
        else:
            return
        while position < len(data) and (size := data[position]):
            position += 1 + size
            comments += size * is_comment
        position += 1
        if comments > MAX_COMMENTS:
            raise RejectError("image_corrupt", f"gif: more than {MAX_COMMENTS:,} bytes of comments")


def _pillow_header(data: bytes) -> ImageHeader:
    kind = sniff(data)
    assert kind is not None
    if kind == "gif":
        _refuse_comments(data)
    image = open_with_pillow(data, kind)
    animated = getattr(image, "is_animated", False)
    return ImageHeader(
        kind,
        image.width,
        image.height,
        orientation=exif_orientation(image.info.get("exif", b"").removeprefix(b"Exif\0\0")),
        icc=image.info.get("icc_profile"),
        plain=kind == "webp" and image.mode == "RGB" and not animated,
        lossless=not _is_lossy(data, kind, image),
    )


def _is_lossy(data: bytes, kind: str, image: Any) -> bool:
    if kind == "webp":
        return b"VP8L" not in data[12:64] and data.find(b"VP8 ", 12) != -1
    return kind == "tiff" and image.info.get("compression") in ("jpeg", "webp", "tiff_jpeg")


_READERS = {
    "jpeg": _jpeg_header,
    "png": _png_header,
    "webp": _pillow_header,
    "gif": _pillow_header,
    "bmp": _pillow_header,
    "tiff": _pillow_header,
}
