"""Pictures in records: all the ways in which rows refer to images -> ImageRef.

"photos/1.jpg", "https://...", "data:image/png;base64,..."     a path or URL
"/9j/4AAQSkZJRg..."                                            base64 of the file
b"..."                                                         the file
{"bytes": b"..." or None, "path": "1.jpg"}                     Hugging Face datasets, Parquet
{"<image_00>": "1.jpg", "<image_01>": "2.jpg"}                 MiniCPM-V: a name for each
[any of the above but the last, ...]
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any

from omnidata.schema import ImageRef, RejectError

# base64 of the magic bytes of JPEG, PNG, WebP, GIF, TIFF (both byte orders) and BMP
_BASE64_START = re.compile(r"(?:/9j/|iVBORw0KGgo|UklGR|R0lGOD|SUkqA|TU0AK|Qk)[A-Za-z0-9+/]{16,}")
_BASE64 = re.compile(_BASE64_START.pattern + r"[A-Za-z0-9+/\s]*={0,2}\s*")
_PLACEHOLDER = r"<image(?:_\d+)?>"


def looks_like_base64(text: str) -> bool:
    """Does the text start as base64 of a picture does?"""
    return _BASE64_START.match(text) is not None


class ImagePool:
    """The images of a record that have no place yet."""

    def __init__(self, images: list[ImageRef], names: dict[str, int]) -> None:
        self._images = images
        self._names = names  # of MiniCPM-V: "<image_00>" -> position
        self._free = dict.fromkeys(range(len(images)))  # ordered set of positions
        self.placeholder = re.compile("|".join([*map(re.escape, names), _PLACEHOLDER]))

    def next(self) -> ImageRef:
        """The first image without a place."""
        if not self._free:
            raise RejectError(
                "placeholder_mismatch", f"more image placeholders than images ({len(self._images)})"
            )
        return self._take(next(iter(self._free)))

    def named(self, placeholder: str) -> ImageRef:
        """The image that ``<image>`` (the next one) or ``<image_03>`` (that one) stands for."""
        if placeholder in self._names:
            return self._take(self._names[placeholder])
        if placeholder == "<image>":
            return self.next()
        return self._take(int(placeholder[len("<image_") : -1]), placeholder)

    def left(self) -> list[ImageRef]:
        """The images without a place, all of them placed now."""
        return [self._take(position) for position in list(self._free)]

    def _take(self, position: int, placeholder: str = "") -> ImageRef:
        if position not in self._free:
            what = f"{placeholder or 'a placeholder'} is used twice, or stands for no image"
            raise RejectError("placeholder_mismatch", f"{what} (the record has {len(self._images)})")
        del self._free[position]
        return self._images[position]


def read_images(payload: dict[str, Any]) -> ImagePool:
    """The pool of a record's ``image`` or ``images``."""
    given = [payload[key] for key in ("image", "images") if not _is_absent(payload.get(key))]
    if len(given) > 1 and given[0] != given[1]:
        raise RejectError("bad_record", "the record has both image and images, and they differ")
    value = given[0] if given else []
    if isinstance(value, dict) and not value.keys() <= {"bytes", "path"}:
        names = {str(name): i for i, name in enumerate(value)}
        return ImagePool([image_ref(image) for image in value.values()], names)
    return ImagePool([image_ref(image) for image in (value if isinstance(value, list) else [value])], {})


def own_image(part: dict[str, Any]) -> ImageRef | None:
    """The image that a content part carries itself: None for a bare ``{"type": "image"}``."""
    for key in ("image_url", "image", "url", "path"):
        value = part.get(key)
        value = value.get("url") if key == "image_url" and isinstance(value, dict) else value
        if not _is_absent(value):
            return image_ref(value)
    if part.get("type") == "image_url":
        raise RejectError("bad_content", "an image_url part has no url")
    return None


def image_ref(value: Any) -> ImageRef:
    """One image, however it is referred to."""
    if isinstance(value, dict) and value.keys() <= {"bytes", "path"}:
        value = value.get("bytes") if value.get("bytes") else value.get("path")
    if isinstance(value, bytes) and value:
        return ImageRef(data=value)
    if isinstance(value, str) and value:
        return ImageRef(data=_decode(value)) if _BASE64.fullmatch(value) else ImageRef(path=value)
    raise RejectError("bad_record", f"an image is {type(value).__name__}, neither a path, a URL nor bytes")


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode(text)
    except binascii.Error as error:
        raise RejectError("image_corrupt", f"the image's base64 does not decode: {error}") from error


def _is_absent(value: Any) -> bool:
    return value is None or value in ("", [], {}, b"") or value == {"bytes": None, "path": None}
