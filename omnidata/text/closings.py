"""Closings: what a chat template prints right after a reply, up to what ends it.

</s>            the first control token after the reply, blanks before it included
<|user|>        the same, if a template ends a turn by the next one's role (GLM): its last reply stays open
\\n### End       plain text that stands after every reply, if no control token does
"""

from __future__ import annotations

from functools import cached_property
from itertools import takewhile

from omnidata.schema import RejectError
from omnidata.text.chat_template import ChatTemplate
from omnidata.text.encoder import Encoder

OPEN = "end with a reply that the chat template does not close: how it ends is not learned"
LITERAL = "have replies that end in plain text of the chat template: generation must stop at that text"


class Closings:
    """The closings of one template, its control tokens written as the encoder's guards."""

    def __init__(self, template: ChatTemplate, encoder: Encoder) -> None:
        self._template, self._encoder = template, encoder

    def length(self, piece: str, *, is_last: bool) -> int:
        """Characters of the guarded piece after a reply that belong to it; 0 if the last reply stays open.

        Raises:
            RejectError: nothing shows where the reply ends.
        """
        match = self._encoder.control_guard.search(piece)
        if match is None and is_last and not piece.strip() and self.by_role:
            return 0
        if self.literal and piece.startswith(self.literal):
            return len(self.literal)
        if match is None or piece[: match.start()].strip():
            raise RejectError(
                "mask_unproven",
                "the chat template prints no control token right after the assistant's content",
            )
        return match.end()

    @cached_property
    def by_role(self) -> bool:
        """Does the token of the next turn's role close a reply, and nothing the last one?"""
        inner, last = self._template.pieces_after_replies()
        match = self._encoder.control_guard.match(self._encoder.guard(inner.lstrip()))
        return match is not None and not last.strip()

    @cached_property
    def literal(self) -> str:
        """Text without a control token that stands after every reply; "" if there is none."""
        inner, last = self._template.pieces_after_replies()
        if self._encoder.control_guard.search(self._encoder.guard(inner + last)):
            return ""
        pairs = takewhile(lambda pair: pair[0] == pair[1], zip(inner, last, strict=False))
        return "".join(character for character, _ in pairs).rstrip()

    def notes(self, text: str, ends: list[int]) -> tuple[str, ...]:
        """What to tell of a sample with this guarded text, whose replies end at these characters."""
        is_open = self.by_role and any(end == len(text.rstrip()) for end in ends)
        return (OPEN,) * is_open + (LITERAL,) * bool(self.literal)
