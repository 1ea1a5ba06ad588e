"""Record -> Conversation: every source's keys become roles, text and images, validated.

What a record may look like (the keys decide, not the file it came from)::

    {"id", "image", "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt", ...}]}
    {"id", "images": [...], "messages": [{"role": "user", "content": "text" or [parts]}, ...]}
    {"images": [...], "texts": [{"user": ..., "assistant": ...}, ...]}              The Cauldron
    {"image": ..., "question": ..., "answer" or "chosen": ...}                      RLAIF-V
    {"image": ..., "text": JSON of any of these}                                    Muffin, RLHF-V

Step (1) ``_turns``: whichever of these keys is there -> [(role, content)].
Step (2) ``read_images``: ``image`` / ``images`` (a path, URL, base64, bytes, {"bytes", "path"}, a list of
         those, or MiniCPM-V's {"<image_00>": path}) -> a pool of references.
Step (3) ``_Placer``: each placeholder in the text, or image part, takes its image from the pool; every image
         is used exactly once. With no placeholder at all the images lead the first user turn.
Step (4) ``_check_order``: a system turn comes first or not at all, the others alternate, one is the
         assistant's.

``<image>`` in text is a placeholder only where no content has image parts of its own: those who write
``{"type": "image"}`` have said where their images are, and their text is text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import orjson

from omnidata.corpus.pictures import ImagePool, own_image, read_images
from omnidata.schema import (
    Conversation,
    ImagePart,
    ImageRef,
    Message,
    Part,
    Record,
    RejectError,
    Role,
    TextPart,
)

SPEAKERS: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
}


def to_conversation(record: Record) -> Conversation:
    """Validate one record.

    Example: payload ``{"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nHi"},
    {"from": "gpt", "value": "Hello"}]}`` gives messages user ``(ImagePart(0), TextPart("\\nHi"))`` and
    assistant ``(TextPart("Hello"),)``, images ``(ImageRef(path="a.jpg"),)``.
    """
    turns = _turns(record.payload)
    roles = [_role(speaker) for speaker, _ in turns]
    _check_order(roles)
    placer = _Placer(
        read_images(record.payload), explicit=any(_has_image_parts(content) for _, content in turns)
    )
    parts = [tuple(placer.place(content)) for _, content in turns]
    parts = placer.finish(roles, parts)
    messages = tuple(Message(role, content) for role, content in zip(roles, parts, strict=True))
    return Conversation(record.id, messages, tuple(placer.images))


def with_grids(conversation: Conversation, grids: Sequence[tuple[int, int] | None]) -> Conversation:
    """The same, with the layout of every picture's tiles (images.slices) at its place."""

    def place(part: Part) -> Part:
        return replace(part, grid=grids[part.image]) if isinstance(part, ImagePart) else part

    messages = [replace(message, parts=tuple(map(place, message.parts))) for message in conversation.messages]
    return replace(conversation, messages=tuple(messages))


# --- step 1: turns ----------------------------------------------------------------------------------------


def _turns(payload: dict[str, Any]) -> list[tuple[Any, Any]]:
    """(speaker, content) of each turn, neither of them checked yet."""
    for key, reader in _READERS.items():
        if payload.get(key) is not None:
            turns = list(reader(payload[key], payload))
            break
    else:
        raise RejectError(
            "bad_record", f"no {', '.join(_READERS)} among the keys {sorted(map(str, payload))[:20]}"
        )
    if not turns:
        raise RejectError("empty_conversation", "the conversation has no turns")
    system = payload.get("system")
    return [("system", system), *turns] if isinstance(system, str) and system else turns


def _read_pairs(speaker: str, content: str) -> Any:
    """A reader of lists of objects that name speaker and content so, or as the other convention does."""

    def read(value: Any, payload: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
        for turn in _objects(value):
            if speaker in turn or content in turn:
                yield turn.get(speaker), turn.get(content)
            else:
                yield turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))

    return read


def _read_texts(value: Any, payload: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    for pair in _objects(value):
        yield "user", pair.get("user")
        yield "assistant", pair.get("assistant")


def _read_question(value: Any, payload: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    yield "user", value
    yield "assistant", payload.get("answer", payload.get("chosen"))


def _read_json(value: Any, payload: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """RLHF-V and Muffin keep the dialogue as JSON text, in three ways."""
    try:
        dialogue = orjson.loads(value)
    except (orjson.JSONDecodeError, TypeError) as error:
        raise RejectError("bad_record", f"text is no JSON: {error}") from error
    if isinstance(dialogue, dict):
        yield from _read_question(dialogue.get("question"), dialogue)
    elif isinstance(dialogue, list) and len(dialogue) >= 3 and isinstance(dialogue[0], str):
        yield from _read_question(dialogue[0], {"chosen": dialogue[1]})  # [question, chosen, rejected, ...]
    else:
        yield from _READERS["conversations"](dialogue, payload)


def _objects(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise RejectError("bad_record", f"the turns are no list of objects but {_shown(value)}")
    return value


_READERS = {
    "conversations": _read_pairs("from", "value"),
    "messages": _read_pairs("role", "content"),
    "conversation": _read_pairs("role", "content"),
    "texts": _read_texts,
    "question": _read_question,
    "text": _read_json,
}


# --- step 4: order (done early: it is cheap) ----------------------------------------------------------------


def _role(speaker: Any) -> Role:
    role = SPEAKERS.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise RejectError("bad_role", f"the speaker {_shown(speaker)} is none of {', '.join(SPEAKERS)}")
    return role


def _check_order(roles: list[Role]) -> None:
    if "assistant" not in roles:
        raise RejectError(
            "no_assistant", f"{len(roles)} turns, none of them an assistant's: nothing to learn"
        )
    for i, role in enumerate(roles):
        if role == "system" and i > 0:
            raise RejectError("role_order", f"turn {i + 1} is a system turn; only the first may be")
        if i > 0 and role == roles[i - 1]:
            raise RejectError("role_order", f"turns {i} and {i + 1} are both the {role}'s")


# --- step 3: places of images -----------------------------------------------------------------------------


def _has_image_parts(content: Any) -> bool:
    return isinstance(content, list) and any(
        isinstance(part, dict) and part.get("type") in ("image", "image_url") for part in content
    )


class _Placer:
    """Hands out the images of one record in the order in which their places come."""

    def __init__(self, pool: ImagePool, *, explicit: bool) -> None:
        self.images: list[ImageRef] = []  # in the order of their places
        self._pool = pool
        self._explicit = explicit

    def place(self, content: Any) -> Iterator[Part]:
        """The parts of one message's content."""
        if isinstance(content, str):
            yield from self._text(content)
        elif isinstance(content, list):
            for part in content:
                yield from self._part(part)
        else:
            raise RejectError(
                "bad_content", f"the content is {_shown(content)}, neither text nor a list of parts"
            )

    def _part(self, part: Any) -> Iterator[Part]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            yield from self._text(part["text"])
        elif kind in ("image", "image_url"):
            own = own_image(part)
            yield self._put(own if own is not None else self._pool.next())
        else:
            raise RejectError("bad_content", f"a part is {_shown(part)}; known are text, image and image_url")

    def _text(self, text: str) -> Iterator[Part]:
        position = 0
        if not self._explicit:
            for match in self._pool.placeholder.finditer(text):
                if match.start() > position:
                    yield TextPart(text[position : match.start()])
                yield self._put(self._pool.named(match[0]))
                position = match.end()
        if position < len(text):
            yield TextPart(text[position:])

    def _put(self, image: ImageRef) -> ImagePart:
        self.images.append(image)
        return ImagePart(len(self.images) - 1)

    def finish(self, roles: list[Role], parts: list[tuple[Part, ...]]) -> list[tuple[Part, ...]]:
        """Let the images lead where nobody gave them a place; refuse any that are left over."""
        left = self._pool.left()
        if not left:
            return parts
        if self.images:
            raise RejectError(
                "placeholder_mismatch",
                f"{len(self.images)} placeholders, {len(self.images) + len(left)} images; write one each",
            )
        leader = roles.index("user") if "user" in roles else roles.index("assistant")
        line_end = (
            (TextPart("\n"),) if roles[leader] == "user" else ()
        )  # not in what the model learns to write
        lead = [part for image in left for part in (self._put(image), *line_end)]
        parts[leader] = (*lead, *parts[leader])
        return parts


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
