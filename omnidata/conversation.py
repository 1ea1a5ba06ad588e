"""Record -> Conversation: every source's keys become roles, text and images, validated.

What a record may look like (the keys decide, not the file it came from)::

    {"id", "image", "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt", ...}]}
    {"id", "images": [...], "messages": [{"role": "user", "content": "text" or [parts]}, ...]}
    {"images": [...], "texts": [{"user": ..., "assistant": ...}, ...]}              The Cauldron
    {"instruction": ..., "input": ..., "output": ..., "history": [[q, a], ...]}     Alpaca
    {"image": ..., "question": ..., "answer" or "chosen": ...}                      RLAIF-V
    {"image": ..., "text": JSON of any of these}                                    Muffin, RLHF-V
    {"image": ..., "caption" or "text": ...}                                        with --caption-prompt

Step (1) ``read_turns`` (turns.py): whichever of these keys is there -> turns.
Step (2) ``read_images``: ``image`` / ``images`` / --image-key (a path, URL, base64, bytes, a struct, a list,
         or MiniCPM-V's {"<image_00>": path}) -> a pool of references; a turn may have its own.
Step (3) ``Placer``: each placeholder in the text, foreign mark (marks.py) or image part takes its image from
         the pool; every image is used exactly once. With none at all the images lead the first user turn.
Step (4) ``KeyCheck``: what no step has read is refused if it may be media or a verdict, else named.

``<image>`` in text is a placeholder only if no content has image parts of its own: those who write
``{"type": "image"}`` have said where their images are, and their text is text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from omnidata.corpus.calls import read_tools
from omnidata.corpus.columns import ALL, take_all, take_named
from omnidata.corpus.keys import KeyCheck
from omnidata.corpus.placer import Placer
from omnidata.corpus.turns import Turn, read_turns, texts_of
from omnidata.images.placeholders import read_images
from omnidata.schema import TOOL_ROLES, Conversation, ImagePart, Message, Part, Record, RejectError, Role

OWN_KEYS = frozenset(("id", "image", "images"))  # of every record, whatever its turns are called


@dataclass(frozen=True)
class Reading:
    """How records are understood; names are those of the flags of build-shards."""

    image_key: tuple[str, ...] = ()  # more keys that hold pictures
    caption_prompt: tuple[str, ...] = ()  # what asks for a caption; one of them by the record's id
    allow_empty_replies: bool = False
    train_on: str = "all"  # all | last: which assistant turns are supervised
    keep_column: tuple[str, ...] = ()  # keys of records whose values become columns of the index
    turn_order: str = "alternate"  # alternate | template: what the template prints and the proof accepts


def to_conversation(record: Record, reading: Reading = Reading()) -> Conversation:
    """Validate one record.

    Example: payload ``{"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nHi"},
    {"from": "gpt", "value": "Hello"}]}`` gives messages user ``(ImagePart(0), TextPart("\\nHi"))`` and
    assistant ``(TextPart("Hello"),)``, images ``(ImageRef(path="a.jpg"),)``.

    Raises:
        RejectError: the record cannot be used, or holds something that would be lost.
    """
    tools, tool_keys = read_tools(record.payload)
    turns, read = read_turns(record, reading.caption_prompt)
    _refuse_no_assistant(turns)
    if reading.turn_order == "alternate":
        check_order([turn.role for turn in turns])
    pool = read_images(record.payload, reading.image_key)
    placer = Placer(pool, turns, reading.image_key)
    parts = placer.place_all()
    images = placer.images
    check = KeyCheck(
        (image.path for image in images if image.path),
        num_bytes=sum(image.data is not None for image in images),
    )
    used = OWN_KEYS | read | tool_keys | set(reading.image_key)
    columns, rest = take_named(record.payload, reading.keep_column, used)
    check.check(rest)
    if ALL in reading.keep_column:
        take_all(rest, columns, check.counted)
    for turn in turns:
        unread = {
            key: value for key, value in turn.rest.items() if key not in Placer.turn_keys(reading.image_key)
        }
        check.check(unread, "messages.")
    for rest in placer.unread_of_parts:
        check.check(rest, "messages.content.")
    _refuse_unfilled(check.counted, turns)
    messages: Sequence[Message] = [
        Message(
            turn.role,
            content,
            supervised=turn.role == "assistant" and turn.switch is not False,
            more=_more(turn),
            switched_off=turn.role == "assistant" and turn.switch is False,
        )
        for turn, content in zip(turns, parts, strict=True)
    ]
    messages = trained_on(messages, reading.train_on)
    if not reading.allow_empty_replies:
        _refuse_empty_replies(messages)
    kept = columns if reading.keep_column else None
    return Conversation(
        *(record.id, messages, tuple(images), tuple(check.counted)), columns=kept, tools=tools
    )


def with_grids(conversation: Conversation, grids: Sequence[tuple[int, int] | None]) -> Conversation:
    """The same, with the layout of every picture's tiles (images.slices) at its place."""

    def place(part: Part) -> Part:
        return replace(part, grid=grids[part.image]) if isinstance(part, ImagePart) else part

    messages = [replace(message, parts=tuple(map(place, message.parts))) for message in conversation.messages]
    return replace(conversation, messages=tuple(messages))


def _refuse_unfilled(unread: Iterable[str], turns: Sequence[Turn]) -> None:
    """Marks in the text that a key fills in, which nobody reads: ``<bbox>`` of ms-swift's ``objects``."""
    marks = [match[0] for text in texts_of(turns) for match in _FILLED_IN.finditer(text)]
    keys = [key for key in unread if key.rpartition(".")[2] in _FILLERS]
    if marks and keys:
        raise RejectError(
            "unread_content", f"the key {keys[0]!r} fills in {marks[0]} in the text, and is not read"
        )


_FILLED_IN = re.compile(r"<(?:bbox|ref-object|box|point|points|polygon|seg|obj|region|mask)\d*>")
_FILLERS = frozenset(("objects", "bbox", "bboxes", "boxes", "points", "regions", "ref", "polygons"))


def _more(turn: Turn) -> dict[str, object]:
    is_null = "tool_calls" in turn.more and turn.content is None
    return {**turn.more, "content": None} if is_null else turn.more


def _refuse_no_assistant(turns: Sequence[Turn]) -> None:
    if all(turn.role != "assistant" for turn in turns):
        raise RejectError(
            "no_assistant", f"{len(turns)} turns, none of them an assistant's: nothing to learn"
        )


def check_order(roles: Sequence[Role]) -> None:
    """The rule of OmniLMM's format: a system turn is the first, and no role speaks twice in a row.

    Raises:
        RejectError: ``role_order``.
    """
    for i, role in enumerate(roles):
        if role == "system" and i > 0:
            raise RejectError("role_order", f"turn {i + 1} is a system turn; only the first may be")
        if i > 0 and role == roles[i - 1] and role not in TOOL_ROLES:  # tools may answer one after another
            raise RejectError(
                "role_order",
                f"turns {i} and {i + 1} are both the {role}'s; --turn-order template builds what the chat "
                "template prints",
            )


def trained_on(messages: Sequence[Message], train_on: str) -> tuple[Message, ...]:
    """The messages with those to be learned chosen: those not switched off; ``last``: only the last of all.

    Raises:
        RejectError: ``no_supervision``.
    """
    if train_on == "last":
        last = max(i for i, message in enumerate(messages) if message.role == "assistant")
        messages = [replace(m, supervised=m.supervised and i == last) for i, m in enumerate(messages)]
    if not any(message.supervised for message in messages):
        raise RejectError("no_supervision", "every assistant turn is switched off (weight, loss or train)")
    return tuple(messages)


def _refuse_empty_replies(messages: Sequence[Message]) -> None:
    for i, message in enumerate(messages):
        has_image = any(isinstance(part, ImagePart) for part in message.parts)
        says = has_image or "tool_calls" in message.more or message.text.strip()
        if message.role == "assistant" and not says:
            raise RejectError(
                "empty_reply",
                f"turn {i + 1}, the assistant's, is empty; --allow-empty-replies builds such records",
            )
