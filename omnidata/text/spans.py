"""Where contents stand in a rendering: in characters, and then in tokens by the tokenizer's offsets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omnidata.schema import RejectError


def interleave(pieces: Sequence[str], contents: Sequence[str]) -> tuple[list[int], str]:
    """Where each content starts, in characters, and the whole text."""
    texts, starts, position = [pieces[0]], [], len(pieces[0])
    for content, piece in zip(contents, pieces[1:], strict=True):
        starts.append(position)
        texts += (content, piece)
        position += len(content) + len(piece)
    return starts, "".join(texts)


def token_range(encoding: Any, span: tuple[int, int, int]) -> tuple[int, int]:
    """The range of tokens that cover the span of characters, if its borders are borders of tokens."""
    start, end, slack = span
    # With the blanks that the model writes itself: before "42", Mistral's ▁ is a token of its own.
    first, last = encoding.char_to_token(start - slack), encoding.char_to_token(end - 1)
    if first is None or last is None:
        raise RejectError("mask_unproven", "the tokenizer gives no token for the start or end of a reply")
    if encoding.token_to_chars(first)[0] < start - slack:
        raise RejectError(
            "mask_unproven",
            "the tokenizer joins the start of a reply with the template's text before it; "
            "remove the blanks or line ends that the reply starts with",
        )
    if encoding.token_to_chars(last)[1] > end:
        raise RejectError("mask_unproven", "the tokenizer joins the end of a reply with the text after it")
    return first, last + 1
