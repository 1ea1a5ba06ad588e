"""Comparing an encoding of ours with the library's."""

from __future__ import annotations

from typing import Any


def check_same(ours: Any, theirs: Any, text: str) -> None:
    """Ids, and which token belongs to which character."""
    assert ours.ids == theirs.ids and len(ours) == len(theirs)
    for character in range(len(text) + 2):
        assert ours.char_to_token(character) == theirs.char_to_token(character), character
    for token in range(len(ours)):
        assert ours.token_to_chars(token) == theirs.token_to_chars(token), token
