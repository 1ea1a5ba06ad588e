"""Lines: the turns of a transcript, and the texts in them that are printed as they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from omnidata.schema import REASONING_KEYS, Message
from omnidata.text.data import leaves


@dataclass(frozen=True, slots=True)
class Line:
    """A turn, its content as the renderer writes it."""

    message: Message
    parts: tuple[str | None, ...]  # texts; None: a picture
    is_default: bool = False  # a system turn that the record does not have

    @property
    def is_spoken(self) -> bool:
        """Does the assistant write more here than its content?"""
        return self.message.role == "assistant" and any(
            key in self.message.more for key in (*REASONING_KEYS, "tool_calls")
        )


@dataclass(frozen=True, slots=True)
class Slot:
    """A text of a turn that stands in the rendering as it is."""

    line: int
    key: str  # content, or what the record calls its reasoning
    text: str


def slots_of(number: int, line: Line) -> Iterator[Slot]:
    """A turn's texts in the order in which templates print them: its reasoning, then its content."""
    for key in [key for key in REASONING_KEYS if key in line.message.more][:1]:
        yield Slot(number, key, line.message.more[key])
    for part in line.parts:
        if part:
            yield Slot(number, "content", part)


def written_texts(message: Message) -> Iterator[str]:
    """All that an assistant's turn says: content, reasoning, and the strings of its calls."""
    yield message.text
    more = {key: message.more[key] for key in (*REASONING_KEYS, "tool_calls") if key in message.more}
    yield from (leaf for leaf in leaves(list(more.values())) if isinstance(leaf, str))
