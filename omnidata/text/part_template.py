"""A chat template that is given contents as lists of parts, as the templates of processors want them.

Step (1) ``PartTemplate.layout(structure)``: the messages of one structure (each turn's role and kinds of
parts) are printed with a mark in every text part; the marks show the pieces of text around each text, and
the image tokens inside the pieces show where pictures stand, in printed order::

    (("user", "it"), ("assistant", "t"))
      ->  "<|im_start|>user\\n<|vision_start|><|image_pad|><|vision_end|>", "<|im_end|>\\n<|im_start|>…", …

Step (2) ``prove_messages`` prints a record itself and compares: most of these templates look at contents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Any

from omnidata.schema import ImagePart, Message, RejectError, TextPart
from omnidata.text.chat_template import ChatTemplate, TurnShape

Structure = tuple[tuple[str, str], ...]  # (role, kinds) of every turn; kinds: "t" text, "i" image


@dataclass(frozen=True, slots=True)
class Layout:
    """What a template prints around the texts of one structure."""

    shape: TurnShape  # pieces around the text parts, in order
    owners: tuple[int, ...]  # message of each text part
    images: tuple[int, ...]  # image tokens in each piece


class PartTemplate(ChatTemplate):
    """A compiled chat template for turns whose contents may hold pictures.

    Args:
        text: the template.
        special_tokens: as transformers passes them.
        image_token: what the template prints for a picture, and the processor replaces.
    """

    def __init__(
        self, text: str, special_tokens: dict[str, Any], *, image_token: str, date: str | None = None
    ) -> None:
        super().__init__(text, special_tokens, date=date)
        self.image_token = image_token
        self.text_roles = self._find_text_roles()  # whose contents it wants as strings; pictures as tokens
        self.layout = lru_cache(maxsize=4096)(self._layout)

    def _find_text_roles(self) -> frozenset[str]:
        """The fewest roles whose contents must be strings, so that the template prints them as they are."""
        best: tuple[int, frozenset[str]] = (-1, frozenset())
        probes: tuple[Structure, ...] = (
            (("user", "it"), ("assistant", "t")),
            (("system", "t"), ("user", "it"), ("assistant", "t")),
        )
        for roles in (c for n in range(4) for c in combinations(("assistant", "system", "user"), n)):
            self.text_roles = frozenset(roles)
            score = sum(self._prints(probe) for probe in probes)
            if score > best[0]:
                best = score, self.text_roles
            if score == len(probes):
                break
        return best[1]

    def _prints(self, structure: Structure) -> bool:
        try:
            self._layout(structure, False)
        except RejectError:
            return False
        return True

    def _layout(self, structure: Structure, generation_prompt: bool) -> Layout:
        owners = tuple(i for i, (_, kinds) in enumerate(structure) for kind in kinds if kind == "t")

        def printed(texts: Sequence[str]) -> str:
            return self.print(self._with_texts(structure, texts), generation_prompt)

        shape = self.shape_of(len(owners), printed)
        images = tuple(piece.count(self.image_token) for piece in shape.pieces)
        wanted = sum(kinds.count("i") for _, kinds in structure)
        if sum(images) != wanted:
            raise RejectError(
                "mask_unproven",
                f"the chat template prints {sum(images)} × {self.image_token} for {wanted} pictures",
            )
        return Layout(shape, owners, images)

    def prove_messages(
        self, layout: Layout, messages: Sequence[Message], *, generation_prompt: bool = False
    ) -> None:
        """Refuse contents that the template does not print as the layout says."""
        structure, texts = structure_of(messages), texts_of(messages)
        printed = self.render(self._with_texts(structure, texts), generation_prompt=generation_prompt)
        if printed != layout.shape.text(layout.shape.contents(texts)):
            raise RejectError(
                "mask_unproven",
                "the chat template changes a content, or reacts to one, so its place is unknown",
            )

    def _with_texts(self, structure: Structure, texts: Sequence[str]) -> list[dict[str, object]]:
        """Messages as apply_chat_template takes them."""
        left = iter(texts)
        return [
            {
                "role": role,
                "content": self.content_of(role, [next(left) if kind == "t" else None for kind in kinds]),
            }
            for role, kinds in structure
        ]

    def content_of(self, role: str, parts: Sequence[str | None]) -> object:
        """A turn's content as the template wants it; None: a picture."""
        if role in self.text_roles:
            return "".join([self.image_token if part is None else part for part in parts])
        return [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]


def parts_of(message: Message) -> tuple[object, ...]:
    """A turn's parts; an empty turn has one empty text."""
    return message.parts or (TextPart(""),)


def structure_of(messages: Sequence[Message]) -> Structure:
    """Roles and kinds of parts."""
    return tuple(
        (message.role, "".join("i" if isinstance(part, ImagePart) else "t" for part in parts_of(message)))
        for message in messages
    )


def texts_of(messages: Sequence[Message]) -> list[str]:
    """The text parts of all turns, in order."""
    return [part.text for message in messages for part in parts_of(message) if isinstance(part, TextPart)]
