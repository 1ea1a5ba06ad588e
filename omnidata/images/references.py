"""References: all the ways in which rows refer to images -> ImageRef.

"photos/1.jpg", "https://...", "data:image/png;base64,..."     a path or URL
"/9j/4AAQSkZJRg..."                                            base64 of the file
b"..."                                                         the file
{"bytes": b"..." or None, "path": "1.jpg"}                     Hugging Face datasets, Parquet
{"url": "https://..."}                                         OpenAI's parts

Several of them, and their names, are placeholders.py's.
"""

from __future__ import annotations

import base64
import binascii
import re

from omnidata.schema import ImageRef, RejectError

# base64 of the magic bytes of JPEG, PNG, WebP, GIF, TIFF (both byte orders) and BMP
_BASE64_START = re.compile(r"(?:/9j/|iVBORw0KGgo|UklGR|R0lGOD|SUkqA|TU0AK|Qk)[A-Za-z0-9+/]{16,}")
_BASE64 = re.compile(_BASE64_START.pattern + r"[A-Za-z0-9+/\s]*={0,2}\s*")
STRUCT_KEYS = frozenset(("bytes", "path", "url", "detail"))  # of Hugging Face datasets; of OpenAI's parts
OWN_IMAGE_KEYS = ("image_url", "image", "url", "path", "bytes")  # of a content part


def looks_like_base64(text: str) -> bool:
    """Does the text start as base64 of a picture does?"""
    return _BASE64_START.match(text) is not None


def own_image(part: dict[str, object]) -> ImageRef | None:
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


def image_ref(value: object) -> ImageRef:
    """One image, however it is referred to."""
    if isinstance(value, dict) and value.keys() <= STRUCT_KEYS:
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


def is_absent(value: object) -> bool:
    """Is there no picture: null, nothing, or a struct of nothing?"""
    if isinstance(value, dict) and value.keys() <= STRUCT_KEYS:
        return not any(value.values())
    return value is None or value in ("", [], b"")
