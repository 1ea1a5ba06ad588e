"""Words: the encodings of a sentencepiece BPE, put together from words that were encoded before.

Llama 2, Mistral, Zephyr and OmniLMM write a space as ``▁`` and have no piece with ``▁`` after anything else,
so no merge reaches from one word into the next and each word may be encoded by itself::

    "Hello big world"  ->  " Hello" "▁big" "▁world"  ->  [22557] [2032] [1526]

(The space in front stands for the ``▁`` that the normalizer puts before a text.) Words repeat: looking them
up takes a tenth of the time of encoding them. ``Words.of`` gives None for tokenizers of which this cannot be
told from their own description; those encode every text anew.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any

import numpy as np

BLANK = "▁"  # how sentencepiece spells a space
FIRST = " "  # marks the first word after an added token; typed spaces are blanks by then
_NORMALIZERS = [
    {"type": "Prepend", "prepend": BLANK},
    {"type": "Replace", "pattern": {"String": " "}, "content": BLANK},
]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_WORD = re.compile(f"[{FIRST}{BLANK}]{BLANK}*[^{BLANK}]*")
_HELD = 32_000_000  # bytes of words in memory, about
_GROUP = 100  # words encoded as one text


class WordEncoding:
    """Ids of a text and the characters they stand for: what the renderer needs of ``tokenizers.Encoding``.

    A token without a character of its own has a part in the next one: the blank that the normalizer puts in
    front, all bytes of a character but the last.
    """

    def __init__(self, ids: list[int], lengths: list[int], num_characters: int) -> None:
        self.ids = ids
        self._lengths = lengths
        self._num_characters = num_characters
        self._starts: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def starts(self) -> np.ndarray:
        """int64 ``[L]``: the character with which each token starts."""
        if self._starts is None:
            lengths = np.array(self._lengths, np.int64)
            self._starts = np.cumsum(lengths) - lengths
        return self._starts

    def char_to_token(self, character: int) -> int | None:
        """The first token that has a part in the character; None outside the text."""
        if not 0 <= character < self._num_characters:
            return None
        position = int(np.searchsorted(self.starts, character))
        is_start = position < len(self.starts) and self.starts[position] == character
        return position if is_start else position - 1

    def token_to_chars(self, token: int) -> tuple[int, int]:
        """The token's first character, and the one after its last."""
        start = int(self.starts[token])
        return start, start + max(1, self._lengths[token])


class Words:
    """Encodes texts by their words; holds a bounded number of them."""

    def __init__(self, model: Any, added: dict[str, int]) -> None:
        from tokenizers import Tokenizer

        self._model = Tokenizer(model)  # no normalizer, no added tokens
        self._added = added
        vocab = self._model.get_vocab()
        self._sizes = {i: len(piece) for piece, i in vocab.items()} | {vocab[piece]: 1 for piece in _BYTES}
        self._going_on = {vocab[piece] for piece in _BYTES[0x80:0xC0]}  # bytes that go on with a character
        longest_first = sorted(added, key=len, reverse=True)  # of those that fit, as tokenizers does
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if added else None
        self._forget()

    @classmethod
    def of(cls, state: dict[str, Any], model: Any) -> Words | None:
        """For a tokenizer's model and its ``to_str()``, parsed; None where words cannot stand alone."""
        if not (_is_plain_bpe(state["model"]) and _is_plain_text(state)):
            return None
        return cls(model, {token["content"]: token["id"] for token in state["added_tokens"]})

    def encode_batch(self, texts: Sequence[str]) -> list[WordEncoding]:
        """The encodings of the texts, nothing added."""
        if self._held > _HELD:
            self._forget()
        listed = [self._words(text) for text in texts]
        try:
            return [self._join(words, text) for words, text in zip(listed, texts, strict=True)]
        except KeyError:  # a new word; seldom, so that looking for them beforehand would take longer
            self._learn({word for words in listed for word in words if word not in self._ids})
            return [self._join(words, text) for words, text in zip(listed, texts, strict=True)]

    def _join(self, words: list[str], text: str) -> WordEncoding:
        ids = list(chain.from_iterable(map(self._ids.__getitem__, words)))
        lengths = list(chain.from_iterable(map(self._lengths.__getitem__, words)))
        return WordEncoding(ids, lengths, len(text))

    def _words(self, text: str) -> list[str]:
        words: list[str] = []
        for position, part in enumerate(self._split.split(text) if self._split else [text]):
            if position % 2:
                words.append(part)
            elif part:
                words += _WORD.findall(FIRST + part.replace(" ", BLANK))
        return words

    def _learn(self, words: set[str]) -> None:
        """Encode new words: many in one text, since a text costs more than a word; blanks would join."""
        blank = [word for word in words if not word.strip(FIRST + BLANK)]
        other = sorted(words.difference(blank))  # sorted, or a fault would show on some runs only
        groups = [[word] for word in blank]
        groups += [other[start : start + _GROUP] for start in range(0, len(other), _GROUP)]
        texts = ["".join(group).replace(FIRST, BLANK) for group in groups]
        encodings = self._model.encode_batch_fast(texts, add_special_tokens=False)
        for group, encoding in zip(groups, encodings, strict=True):
            self._keep(group, encoding.ids)

    def _keep(self, words: list[str], ids: list[int]) -> None:
        """Take the joined words' ids apart."""
        lengths = self._lengths_of(ids)
        after = list(accumulate(lengths))
        start = border = 0
        for word in words:
            border += len(word)
            end = bisect_right(after, border)
            assert after[end - 1] == border, (word, ids[start:end])  # else a merge reached beyond the word
            self._ids[word] = tuple(ids[start:end])  # tuples of integers do not burden the garbage collector
            # The blank in front of a text is nobody's character.
            first = lengths[start] - (word[0] == FIRST)
            self._lengths[word] = (first, *lengths[start + 1 : end])
            start = end
            self._held += 200 + 2 * len(word) + 48 * len(self._ids[word])  # two lists, integers, a string

    def _lengths_of(self, ids: Sequence[int]) -> list[int]:
        """Characters of each piece; of a character that is spelled in bytes the last byte has it."""
        lengths = list(map(self._sizes.__getitem__, ids))
        if not self._going_on.isdisjoint(ids):
            for position, token_id in enumerate(ids[1:]):
                if token_id in self._going_on:
                    lengths[position] = 0
        return lengths

    def _forget(self) -> None:
        self._ids = {token: (token_id,) for token, token_id in self._added.items()}
        self._lengths = {token: (len(token),) for token in self._added}
        self._held = 0


def _is_plain_bpe(model: dict[str, Any]) -> bool:
    """Whether merges stay inside words and every character has pieces, if only its bytes."""
    return (
        model["type"] == "BPE"
        and not model["dropout"]
        and not model["continuing_subword_prefix"]
        and not model["end_of_word_suffix"]
        and model["byte_fallback"]
        and not model.get("ignore_merges")
        and BLANK in model["vocab"]
        and all(piece in model["vocab"] for piece in _BYTES)
        and not any(BLANK in piece.lstrip(BLANK) for piece in model["vocab"])
    )


def _is_plain_text(state: dict[str, Any]) -> bool:
    """Whether texts reach the model as they are, with blanks, between added tokens that take no more room."""
    normalizer = state["normalizer"] or {}
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    return (
        normalizer.get("type") == "Sequence"
        and normalizer["normalizers"] == _NORMALIZERS
        and state["pre_tokenizer"] is None
        and not any(token[flag] for token in state["added_tokens"] for flag in flags)
    )
