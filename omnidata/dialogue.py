"""Dialogue: ``KEY.json``, the conversation of a sample as it was understood, to render it again.

    {"columns": {"lang": "en"},
     "id": "7",
     "images": [{"path": "photos/1.jpg", "size": [640, 480]}],
     "messages": [{"content": [{"type": "image"}, {"text": "What is it?", "type": "text"}], "role": "user"},
                  {"content": [{"text": "A cat.", "type": "text"}], "role": "assistant", "train": false}],
     "tools": [...]}

``messages`` and ``tools`` are what ``apply_chat_template`` takes. Empty keys are left out. ``content`` is
always a list of parts, since readers that want one type for a key (Arrow) would stumble over a text. A
message may also have ``train``: false where the record itself switches the turn off, ``reasoning_content``,
``tool_calls``, ``name``, ``tool_call_id``. An image part takes the next of ``images``:

    path   where its record found it; absent if the record carried the picture itself
    size   [width, height] before any shrinking; absent if its turn was cut off, so that nobody looked
    grid   [columns, rows] of its tiles, if it was cut into any

The whole conversation is here, also the turns that ``--max-length`` cut off.

One conversation has one spelling: UTF-8, no spaces, keys in alphabetical order; but objects of the record's
own (tools, calls) keep the order of their keys, because chat templates print it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from omnidata.schema import (
    ROLES,
    Conversation,
    ImagePart,
    ImageRef,
    Message,
    Part,
    RejectError,
    TextPart,
)

Size = tuple[int, int]  # (width, height), pixels
_KEYS = {"columns", "id", "images", "messages", "tools"}
_OWN = ("content", "role", "train")  # of a message, beside those that the chat template is given
MAX_SIDE = 1 << 31  # what a column of the index holds


class DialogueError(ValueError):
    """The bytes are no KEY.json of this schema."""


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A conversation that was stored.

    Its ImageRefs have a path, or neither path nor data if the record carried the picture itself.
    """

    conversation: Conversation  # no turn is switched off by --train-on
    sizes: tuple[Size | None, ...]  # of each picture before any shrinking; None: nobody looked


# --- writing ----------------------------------------------------------------------------------------------


def dialogue_json(conversation: Conversation, sizes: Sequence[Size | None] = ()) -> bytes:
    """The content of ``KEY.json``; ``sizes`` of the first pictures, those of the others are not known.

    Raises:
        RejectError: a tool, call or column holds what JSON does not.
    """
    known = [*sizes, *[None] * (len(conversation.images) - len(sizes))]
    content: dict[str, object] = {}
    if conversation.columns:
        content["columns"] = dict(sorted(conversation.columns.items()))
    content["id"] = conversation.id
    if conversation.images:
        grids = [part.grid for part in _image_parts(conversation)]
        content["images"] = [
            _image(reference, size, grid)
            for reference, size, grid in zip(conversation.images, known, grids, strict=True)
        ]
    content["messages"] = [_message(message) for message in conversation.messages]
    if conversation.tools:
        content["tools"] = list(conversation.tools)
    try:
        raw = orjson.dumps(content)
    except TypeError as error:  # e.g. an integer over 64 bits, a lone surrogate
        raise _unwritable(str(error)) from error
    if (conversation.columns or not conversation.is_plain) and orjson.loads(raw) != content:  # e.g. NaN
        raise _unwritable("its tools, calls or columns hold what JSON cannot say")
    return raw


def _unwritable(why: str) -> RejectError:
    return RejectError(
        "bad_record", f"the conversation cannot be kept as JSON: {why}; --no-conversation builds it"
    )


def _image_parts(conversation: Conversation) -> Iterable[ImagePart]:
    return (
        part for message in conversation.messages for part in message.parts if isinstance(part, ImagePart)
    )


def _image(reference: ImageRef, size: Size | None, grid: Size | None) -> dict[str, object]:
    image: dict[str, object] = {}
    if grid is not None:
        image["grid"] = list(grid)
    if reference.path and not reference.path.startswith("data:"):
        image["path"] = reference.path
    if size is not None:
        image["size"] = list(size)
    return image


def _message(message: Message) -> dict[str, object]:
    own: dict[str, object] = {"content": [_part(part) for part in message.parts], "role": message.role}
    if message.switched_off:
        own["train"] = False
    return own if not message.more else dict(sorted((own | message.more).items()))


def _part(part: Part) -> dict[str, object]:
    return {"text": part.text, "type": "text"} if isinstance(part, TextPart) else {"type": "image"}


# --- reading ----------------------------------------------------------------------------------------------


def read_dialogue(raw: bytes | memoryview) -> Dialogue:
    """The conversation of a ``KEY.json``.

    Raises:
        DialogueError: says what is no part of this schema.
    """
    try:
        content = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise DialogueError(f"not valid JSON: {error}") from error
    if not isinstance(content, dict) or not {"id", "messages"} <= content.keys() <= _KEYS:
        raise DialogueError(f"its keys are not id, messages and of {', '.join(sorted(_KEYS))}")
    images = [_read_image(image) for image in _list(content.get("images", []), "images")]
    grids = iter([grid for _, _, grid in images])
    number = iter(range(len(images)))
    messages = tuple(
        _read_message(message, number, grids) for message in _list(content["messages"], "messages")
    )
    if not messages or next(number, None) is not None:
        raise DialogueError(f"{len(messages)} messages that do not show all of {len(images)} images")
    tools, columns = _list(content.get("tools", []), "tools"), content.get("columns")
    if not isinstance(content["id"], str) or not all(isinstance(tool, dict) for tool in tools):
        raise DialogueError("id is no text, or a tool no object")
    if columns is not None and not isinstance(columns, dict):
        raise DialogueError("columns is no object")
    conversation = Conversation(
        content["id"], messages, tuple(ref for ref, _, _ in images), columns=columns, tools=tuple(tools)
    )
    return Dialogue(conversation, tuple(size for _, size, _ in images))


def _list(value: object, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise DialogueError(f"{name} is no list")
    return value


def _read_image(value: object) -> tuple[ImageRef, Size | None, Size | None]:
    if not isinstance(value, dict) or not value.keys() <= {"grid", "path", "size"}:
        raise DialogueError("an image is no object of path, size and grid")
    path = value.get("path")
    if path is not None and not isinstance(path, str):
        raise DialogueError("the path of an image is no text")
    return ImageRef(path=path), _pair(value.get("size")), _pair(value.get("grid"))


def _pair(value: object) -> Size | None:
    if value is None:
        return None
    if (
        not isinstance(value, list)
        or len(value) != 2
        or not all(type(side) is int and 0 < side < MAX_SIDE for side in value)
    ):
        raise DialogueError("a size or grid is no pair of positive numbers")
    return value[0], value[1]


def _read_message(value: object, number: object, grids: object) -> Message:
    if not isinstance(value, dict) or not {"content", "role"} <= value.keys() or value["role"] not in ROLES:
        raise DialogueError(f"a message has no content, or no role of {', '.join(ROLES)}")
    is_off = "train" in value
    if is_off and (value["train"] is not False or value["role"] != "assistant"):
        raise DialogueError("train of a message is not false, or the turn is not the assistant's")
    more = {key: inner for key, inner in value.items() if key not in _OWN}
    if value["content"] is None:
        more["content"] = None
    parts = (
        ()
        if value["content"] is None
        else tuple(_read_part(part, number, grids) for part in _list(value["content"], "content"))
    )
    supervised = value["role"] == "assistant" and not is_off
    return Message(value["role"], parts, supervised, more, switched_off=is_off)


def _read_part(value: Any, number: Any, grids: Any) -> Part:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text" and value.keys() == {"text", "type"} and isinstance(value["text"], str):
        return TextPart(value["text"])
    if kind == "image" and len(value) == 1:
        if (image := next(number, None)) is None:
            raise DialogueError("there are more image parts than images")
        return ImagePart(image, next(grids))
    raise DialogueError("a part is neither a text nor an image")
