"""The place of each picture of a record: placeholders, parts and foreign marks take pictures from the pool.

Every picture gets exactly one place, in the order in which the places are printed; anything else is a reject.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from omnidata.corpus.keys import is_empty, shown
from omnidata.corpus.marks import (
    foreign_pictures,
    number_of,
    paths_in_text,
    refuse_leftovers,
    refuse_other_media,
)
from omnidata.corpus.turns import Turn, texts_of
from omnidata.images.placeholders import ImagePool, read_images
from omnidata.images.references import OWN_IMAGE_KEYS, own_image
from omnidata.schema import ImagePart, ImageRef, Part, RejectError, TextPart

_PART_KEYS = frozenset(("type", "text", "index", *OWN_IMAGE_KEYS))
Place = tuple[int, int, ImageRef]  # from, to (characters of a text), the picture that stands there


class Placer:
    """Hands out the images of one record in the order in which their places come."""

    def __init__(self, pool: ImagePool, turns: Sequence[Turn], image_keys: Sequence[str] = ()) -> None:
        self.images: list[ImageRef] = []  # in the order of their places
        self.unread_of_parts: list[dict[str, object]] = []  # keys of parts that nothing reads
        self._pool, self._turns = pool, turns
        self._pools = [self._own_pool(turn, image_keys) for turn in turns]
        self._explicit = any(_has_image_parts(turn.content) for turn in turns)
        self._foreign = self._match_foreign(list(texts_of(turns)))

    @staticmethod
    def turn_keys(image_keys: Sequence[str]) -> frozenset[str]:
        """Keys of a turn that hold pictures of its own."""
        return frozenset(("image", "images", *image_keys))

    def _own_pool(self, turn: Turn, image_keys: Sequence[str]) -> ImagePool | None:
        own = {key: value for key, value in turn.rest.items() if key in self.turn_keys(image_keys)}
        return read_images(own, image_keys) if any(not is_empty(value) for value in own.values()) else None

    def place_all(self) -> list[tuple[Part, ...]]:
        """The parts of every turn."""
        parts = []
        for turn, pool in zip(self._turns, self._pools, strict=True):
            is_null = turn.content is None and "tool_calls" in turn.more  # a turn that only calls
            placed = () if is_null else tuple(self._place(turn.content, pool or self._pool))
            parts.append(placed if pool is None else self._lead(turn, placed, pool))
        return self._finish(parts)

    # --- foreign marks ------------------------------------------------------------------------------------

    def _match_foreign(self, texts: list[str]) -> Iterator[ImageRef] | None:
        """The pictures of the foreign marks in the texts, in order; None if there are no such marks."""
        refuse_other_media(texts)
        marks, paths = foreign_pictures(texts), [match for text in texts for match in paths_in_text(text)]
        has_pictures = self._pool.num_free or self._explicit or any(self._pools)
        if not marks and not paths:
            if has_pictures:
                refuse_leftovers(texts)
            return None
        own = sum(len(self._pool.placeholder.findall(text)) for text in texts)
        inside = sum(len(self._pool.placeholder.findall(match[0])) for match in marks)
        if paths and not marks and not has_pictures and not own:
            return iter([ImageRef(path=match["path"].strip()) for match in paths])
        sure = not self._explicit and not any(self._pools) and not paths and own == inside
        if not sure or len(marks) != self._pool.num_free:
            refuse_leftovers(texts)
        return iter([self._pool.at(number) for number in _numbers(marks)])

    # --- contents -----------------------------------------------------------------------------------------

    def _place(self, content: object, pool: ImagePool) -> Iterator[Part]:
        if isinstance(content, str):
            yield from self._text(content, pool)
        elif isinstance(content, list):
            for part in content:
                yield from self._part(part, pool)
        else:
            raise RejectError(
                "bad_content", f"the content is {shown(content)}, neither text nor a list of parts"
            )

    def _part(self, part: Any, pool: ImagePool) -> Iterator[Part]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            self.unread_of_parts.append({key: part[key] for key in part if key not in ("type", "text")})
            yield from self._text(part["text"], pool)
        elif kind in ("image", "image_url") and is_empty(part.get("text")):
            self.unread_of_parts.append({key: part[key] for key in part if key not in _PART_KEYS})
            yield self._put(self._picture_of(part, pool))
        else:
            raise RejectError("bad_content", f"a part is {shown(part)}; known are text, image and image_url")

    def _picture_of(self, part: dict[str, Any], pool: ImagePool) -> ImageRef:
        own, index = own_image(part), part.get("index")
        if own is not None and index is not None:
            raise RejectError(
                "bad_content", "an image part has both a picture and an index into the record's"
            )
        if own is not None or index is None:
            return own if own is not None else pool.next()
        if not isinstance(index, int) or isinstance(index, bool):
            raise RejectError("bad_content", f"the index of an image part is {shown(index)}, no number")
        return pool.at(index)

    def _text(self, text: str, pool: ImagePool) -> Iterator[Part]:
        position = 0
        for start, end, image in self._places(text, pool):
            if start > position:
                yield TextPart(text[position:start])
            yield self._put(image)
            position = end
        if position < len(text):
            yield TextPart(text[position:])

    def _places(self, text: str, pool: ImagePool) -> Iterator[Place]:
        if self._foreign is not None:
            matches: list[re.Match[str]] = [*foreign_pictures([text]), *paths_in_text(text)]
            for match in sorted(matches, key=lambda match: match.start()):
                yield match.start(), match.end(), next(self._foreign)
        elif not self._explicit:
            for match in pool.placeholder.finditer(text):
                yield match.start(), match.end(), pool.named(match[0])

    def _put(self, image: ImageRef) -> ImagePart:
        self.images.append(image)
        return ImagePart(len(self.images) - 1)

    # --- those that nobody gave a place -------------------------------------------------------------------

    def _lead(self, turn: Turn, parts: tuple[Part, ...], pool: ImagePool) -> tuple[Part, ...]:
        """A turn's own images lead it if none of them has a place; refuse any that are left over."""
        if pool.num_free and not pool.is_untouched:
            raise RejectError(
                "placeholder_mismatch", f"a turn has {pool.num_free} images more than places for them"
            )
        line_end = (TextPart("\n"),) if turn.role == "user" else ()
        lead = [part for image in pool.left() for part in (self._put(image), *line_end)]
        if lead and any(isinstance(part, ImagePart) for part in parts):
            raise RejectError(
                "placeholder_mismatch", "a turn has images of its own besides those of its parts"
            )
        return (*lead, *parts)

    def _finish(self, parts: list[tuple[Part, ...]]) -> list[tuple[Part, ...]]:
        """Let the images lead where nobody gave them a place; refuse any that are left over."""
        left = self._pool.left()
        if not left:
            return parts
        if self.images:
            raise RejectError(
                "placeholder_mismatch",
                f"{len(self.images)} placeholders, {len(self.images) + len(left)} images; write one each",
            )
        roles = [turn.role for turn in self._turns]
        leader = roles.index("user") if "user" in roles else roles.index("assistant")
        # not in what the model learns to write
        line_end = (TextPart("\n"),) if roles[leader] == "user" else ()
        lead = [part for image in left for part in (self._put(image), *line_end)]
        parts[leader] = (*lead, *parts[leader])
        return parts


def _has_image_parts(content: object) -> bool:
    return isinstance(content, list) and any(
        isinstance(part, dict) and part.get("type") in ("image", "image_url") for part in content
    )


def _numbers(marks: Sequence[re.Match[str]]) -> list[int]:
    """Positions of the marks' pictures: by their numbers if all have one, else in order."""
    numbers = [number_of(mark) for mark in marks]
    if all(number is None for number in numbers):
        return list(range(len(marks)))
    for first in (1, 0):
        if (
            sorted(number or 0 for number in numbers) == list(range(first, first + len(marks)))
            and None not in numbers
        ):
            return [number - first for number in numbers if number is not None]
    raise RejectError(
        "placeholder_mismatch",
        f"the marks {', '.join(mark[0] for mark in marks[:5])} do not number {len(marks)} pictures",
    )
