"""Where contents stand in a rendering: in characters, and then in tokens by the tokenizer's offsets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from omnidata.schema import IGNORE_INDEX, RejectError


class Encoding(Protocol):
    """What the ids of a text are asked: tokenizers' own, or those put together from words."""

    @property
    def ids(self) -> list[int]:
        """Of all tokens."""
        ...

    def char_to_token(self, char_pos: int, /) -> int | None:
        """The token that a character lies in; None if it lies in none."""
        ...

    def token_to_chars(self, token: int, /) -> tuple[int, int] | None:
        """The token's first character, and the one after its last; None if it has none."""
        ...


def interleave(pieces: Sequence[str], contents: Sequence[str]) -> tuple[list[int], str]:
    """Where each content starts, in characters, and the whole text."""
    texts, starts, position = [pieces[0]], [], len(pieces[0])
    for content, piece in zip(contents, pieces[1:], strict=True):
        starts.append(position)
        texts += (content, piece)
        position += len(content) + len(piece)
    return starts, "".join(texts)


def token_at(encoding: Encoding, character: int) -> int:
    """The token of a character that is known to be of one, say of a picture's run."""
    token = encoding.char_to_token(character)
    assert token is not None, "the character lies in no token"
    return token


def token_range(encoding: Encoding, span: tuple[int, int, int]) -> tuple[int, int]:
    """The range of tokens that cover the span of characters, if its borders are borders of tokens."""
    start, end, slack = span
    # With the blanks that the model writes itself: before "42", Mistral's ▁ is a token of its own.
    first, last = encoding.char_to_token(start - slack), encoding.char_to_token(end - 1)
    if first is None or last is None:
        raise RejectError("mask_unproven", "the tokenizer gives no token for the start or end of a reply")
    of_first, of_last = encoding.token_to_chars(first), encoding.token_to_chars(last)
    assert of_first and of_last, "a token that was found by a character has characters"
    if of_first[0] < start - slack:
        raise RejectError(
            "mask_unproven",
            "the tokenizer joins the start of a reply with the template's text before it; "
            "remove the blanks or line ends that the reply starts with",
        )
    if of_last[1] > end:
        raise RejectError("mask_unproven", "the tokenizer joins the end of a reply with the text after it")
    return first, last + 1


def labels_of(ids: np.ndarray, encoding: Encoding, spans: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Labels int32 [L]: the ids of the tokens in the spans, IGNORE_INDEX elsewhere."""
    labels = np.full_like(ids, IGNORE_INDEX)
    for span in spans:
        first, end = token_range(encoding, span)
        labels[first:end] = ids[first:end]
    return labels


def refuse_unsupervised(labels: np.ndarray) -> None:
    """RejectError if nothing is learned."""
    if not (labels != IGNORE_INDEX).any():
        raise RejectError("no_supervision", "no assistant turn is supervised, so there is nothing to learn")


def widened(
    ids: np.ndarray, labels: np.ndarray, image_id: int, block: tuple[int, int, int], num_query: int
) -> tuple[np.ndarray, np.ndarray]:
    """Each image's one token becomes its block (start, patches, end), which is never supervised."""
    places = np.flatnonzero(ids == image_id)
    if len(places) == 0:
        return ids, labels
    start, patch, end = block
    counts = np.ones(len(ids), dtype=np.intp)
    counts[places] = num_query + 2
    labels[places] = IGNORE_INDEX
    wide_labels = np.repeat(labels, counts)
    ids[places] = patch
    wide = np.repeat(ids, counts)
    first = places + np.arange(len(places)) * (num_query + 1)
    wide[first], wide[first + num_query + 1] = start, end
    return wide, wide_labels
