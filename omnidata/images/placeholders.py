"""Placeholders: which of a record's pictures each mark in its text stands for.

``<image>`` is the next one, ``<image_03>`` that one, and MiniCPM-V gives each a name of its own:
``{"<image_00>": "1.jpg", "<image_01>": "2.jpg"}``. How one picture is written: references.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from omnidata.images.references import STRUCT_KEYS, image_ref, is_absent
from omnidata.schema import ImageRef, RejectError

_PLACEHOLDER = r"<image(?:_\d{1,9})?>"


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


def read_images(payload: dict[str, object], image_keys: Sequence[str] = ()) -> ImagePool:
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
        if isinstance(value, dict) and not value.keys() <= STRUCT_KEYS:
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
