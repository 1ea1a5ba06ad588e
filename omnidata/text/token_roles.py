"""Which added tokens people may write and which only the template: content tokens and control tokens.

A tokenizer's added tokens are of two kinds, and nothing in tokenizer.json says which is which: those that
build turns (``<|im_start|>``, ``[INST]``, ``<｜Assistant｜>``) and those that the assistant itself writes
(``<think>``, ``<tool_call>``, ``<table>``). A typed token of the first kind must stay text; one of the second
kind must become the token, or the model learns to spell it letter by letter.

    special                                         control, always (--content-token says otherwise)
    printed around a system, user or tool turn      control, and its other half (``[/INST]`` of ``[INST]``)
    printed elsewhere, not one half of a pair       control (it may open the assistant's turn)
    spelled as markers are, ``<|…|>`` or ``[…]``      control
    stands for a picture, video or sound            control
    everything else that is not special             content
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omnidata.schema import RejectError
from omnidata.text.chat_template import ChatTemplate

_OF_MEDIA = re.compile(
    r"image|img|video|audio|vision|picture|frame|patch|pad\b|_pad|row_\d+_col|soft_token|slice", re.IGNORECASE
)
_MARKER = re.compile(
    r"<[|｜].*[|｜]>|\[/?[A-Z_]+\]", re.DOTALL
)  # how role markers are spelled, printed or not
_ROLES = (
    ("user",),
    ("system", "user"),
    ("user", "assistant"),
    ("system", "user", "assistant"),
    ("user", "assistant", "user", "assistant"),
    ("system", "user", "assistant", "user", "assistant", "user"),
)
_MARK = "\ue000"


def content_tokens_of(template: ChatTemplate, added_tokens: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The added tokens that content may spell, in the order of the tokenizer's list.

    ``added_tokens``: those of tokenizer.json, with ``content`` and ``special``.
    """
    ordinary = [token["content"] for token in added_tokens if not token["special"]]
    if not ordinary:
        return ()
    around, elsewhere = _printed(template)
    names = set(ordinary)
    control = {token for token in names if _OF_MEDIA.search(token) or _MARKER.fullmatch(token)}
    control |= {token for token in names if any(token in text for text in around)}
    control |= {_other_half(token) for token in control} & names
    singles = {token for token in names if _other_half(token) not in names}
    control |= {token for token in singles if any(token in text for text in elsewhere)}
    return tuple(token for token in ordinary if token not in control and token.strip())


def _printed(template: ChatTemplate) -> tuple[list[str], list[str]]:
    """Texts that the template prints before contents that are not the assistant's, and all other texts."""
    around: list[str] = []
    elsewhere: list[str] = []
    for roles in _ROLES:
        for generation_prompt in (False, True):
            try:
                pieces = template.shape(roles, generation_prompt).pieces
            except RejectError:
                continue
            around += [piece for piece, role in zip(pieces, roles, strict=False) if role != "assistant"]
            elsewhere += pieces
    around += _around_tools(template)
    return around, elsewhere


def _around_tools(template: ChatTemplate) -> Iterator[str]:
    """What stands right before and after a tool's answer, if the template knows such turns."""
    for role in ("tool", "function"):
        messages = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "x"},
            {"role": role, "content": _MARK, "name": "x", "tool_call_id": "123456789"},
        ]
        try:
            before, found, after = template.render(messages).partition(_MARK)
        except RejectError:
            continue
        if found:
            yield before.rpartition("x")[2]
            yield after


def _other_half(token: str) -> str:
    """``<think>`` <-> ``</think>``, ``[INST]`` <-> ``[/INST]``; what is no half gives a stranger."""
    if len(token) > 2 and token[1] == "/":
        return token[0] + token[2:]
    return f"{token[:1]}/{token[1:]}"
