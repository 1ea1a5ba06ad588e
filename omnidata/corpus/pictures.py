"""Pictures in records: all the ways in which rows refer to images -> ImageRef.

"photos/1.jpg", "https://...", "data:image/png;base64,..."     a path or URL
"/9j/4AAQSkZJRg..."                                            base64 of the file
b"..."                                                         the file
{"bytes": b"..." or None, "path": "1.jpg"}                     Hugging Face datasets, Parquet
{"url": "https://..."}                                         OpenAI's parts
{"<image_00>": "1.jpg", "<image_01>": "2.jpg"}                 MiniCPM-V: a name for each
[any of the above but the last, ...]
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from typing import Any

from omnidata.schema import ImageRef, RejectError

# base64 of the magic bytes of JPEG, PNG, WebP, GIF, TIFF (both byte orders) and BMP
_BASE64_START = re.compile(r"(?:/9j/|iVBORw0KGgo|UklGR|R0lGOD|SUkqA|TU0AK|Qk)[A-Za-z0-9+/]{16,}")
_BASE64 = re.compile(_BASE64_START.pattern + r"[A-Za-z0-9+/\s]*={0,2}\s*")
_PLACEHOLDER = r"<image(?:_\d{1,9})?>"
_STRUCT_KEYS = frozenset(("bytes", "path", "url", "detail"))  # of Hugging Face datasets; of OpenAI's parts
OWN_IMAGE_KEYS = ("image_url", "image", "url", "path", "bytes")  # of a content part


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

    def at(self, index: int) -> ImageRef:
        """The image at a position: what ``{"type": "image", "index": 1}`` stands for."""
        return self._take(index, f"the part with index {index}")

    @property
    def num_free(self) -> int:
        """Images that have no place yet."""
        return len(self._free)

    @property
    def is_untouched(self) -> bool:
        """Has no image a place yet?"""
        return len(self._free) == len(self._images)

    @property
    def paths(self) -> list[str]:
        """Paths and URLs of all images."""
        return [image.path for image in self._images if image.path]

    def left(self) -> list[ImageRef]:
        """The images without a place, all of them placed now."""
        return [self._take(position) for position in list(self._free)]

    def _take(self, position: int, placeholder: str = "") -> ImageRef:
        if position not in self._free:
            what = f"{placeholder or 'a placeholder'} is used twice, or stands for no image"
            raise RejectError("placeholder_mismatch", f"{what} (the record has {len(self._images)})")
        del self._free[position]
        return self._images[position]


def read_images(payload: dict[str, Any], image_keys: Sequence[str] = ()) -> ImagePool:
    """The pool of a record's ``image`` or ``images`` and of the keys that the user named.

    Names stand for pictures as ``<name>`` only: ``{"photo": "1.jpg"}`` belongs to ``<photo>`` in the text.
    """
    given = [payload[key] for key in ("image", "images") if not is_absent(payload.get(key))]
    if len(given) > 1 and given[0] != given[1]:
        raise RejectError("bad_record", "the record has both image and images, and they differ")
    values = given[:1] + [payload[key] for key in image_keys if not is_absent(payload.get(key))]
    images: list[ImageRef] = []
    names: dict[str, int] = {}
    for value in values:
        if isinstance(value, dict) and not value.keys() <= _STRUCT_KEYS:
            named = {_placeholder(str(name)): len(images) + i for i, name in enumerate(value)}
            if len(named) < len(value) or names.keys() & named.keys():
                raise RejectError(
                    "placeholder_mismatch", f"two pictures share a name among {sorted(value)[:9]}"
                )
            names |= named
            images += [image_ref(image) for image in value.values()]
        else:
            images += [image_ref(image) for image in (value if isinstance(value, list) else [value])]
    return ImagePool(images, names)


def _placeholder(name: str) -> str:
    return name if name.startswith("<") and name.endswith(">") else f"<{name}>"


def own_image(part: dict[str, Any]) -> ImageRef | None:
    """The image that a content part carries itself: None for a bare ``{"type": "image"}``."""
    found = [part[key] for key in OWN_IMAGE_KEYS if not is_absent(part.get(key))]
    references = [image_ref(value) for value in found]
    if any(reference != references[0] for reference in references):
        raise RejectError(
            "bad_content", f"an image part has several pictures under {', '.join(OWN_IMAGE_KEYS)}"
        )
    if references:
        return references[0]
    if part.get("type") == "image_url":
        raise RejectError("bad_content", "an image_url part has no url")
    return None


def image_ref(value: Any) -> ImageRef:
    """One image, however it is referred to."""
    if isinstance(value, dict) and value.keys() <= _STRUCT_KEYS:
        value = value.get("bytes") or value.get("path") or value.get("url")
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


def is_absent(value: Any) -> bool:
    """Is there no picture: null, nothing, or a struct of nothing?"""
    if isinstance(value, dict) and value.keys() <= _STRUCT_KEYS:
        return not any(value.values())
    return value is None or value in ("", [], b"")
