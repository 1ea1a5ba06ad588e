"""Words: the encodings of a sentencepiece BPE, put together from words that were encoded before.

Llama 2, Mistral, Zephyr and OmniLMM write a space as ``▁`` and have no piece with ``▁`` after anything else,
so no merge reaches from one word into the next and each word may be encoded by itself::

    "Hello big world"  ->  " Hello" "▁big" "▁world"  ->  [22557] [2032] [1526]

(The space in front stands for the ``▁`` that the tokenizer puts before a text.) Words repeat, and looking
them up takes a quarter of the time of encoding the whole text anew; text in which no word was seen before,
such as random letters, takes three times as long instead. ``Words.of`` gives None for tokenizers of which all
this cannot be told from their own description: those encode every text as a whole.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BLANK = "▁"  # how sentencepiece spells a space
FIRST = " "  # marks the first word after an added token; typed spaces are blanks by then
_NORMALIZER = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": BLANK},
        {"type": "Replace", "pattern": {"String": " "}, "content": BLANK},
    ],
}
_METASPACE = {"type": "Metaspace", "replacement": BLANK, "split": False}
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_WORD = re.compile(f"[{FIRST}{BLANK}]{BLANK}*[^{BLANK}]*|[^{BLANK}]+")
_HELD = 32_000_000  # bytes of words in memory, about
_GROUP = 100  # words encoded as one text
_MOST_TOKENS = (
    256  # added ones; a thousand alternatives would take a regular expression longer than the library
)


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

    def __init__(self, model: Any, added: dict[str, int], prefix: str) -> None:
        from tokenizers import Tokenizer

        self._model = Tokenizer(model)  # no normalizer, no added tokens
        self._added = added
        self._prefix = prefix
        vocab = self._model.get_vocab()
        self._sizes = {i: len(piece) for piece, i in vocab.items()} | {vocab[piece]: 1 for piece in _BYTES}
        self._going_on = {vocab[piece] for piece in _BYTES[0x80:0xC0]}  # bytes that go on with a character
        longest_first = sorted(added, key=len, reverse=True)  # of those that fit, as tokenizers does
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if added else None
        self._forget()

    @classmethod
    def of(cls, state: dict[str, Any], backend: Tokenizer) -> Words | None:
        """For a tokenizer and its ``to_str()``, parsed; None if words cannot stand alone."""
        prefix = _prefix(state)
        tokens = state["added_tokens"]
        if prefix is None or len(tokens) > _MOST_TOKENS or not all(map(_is_plain_token, tokens)):
            return None
        if not _is_plain_bpe(state["model"]):
            return None
        # Not the state's ids: the library gives its own to tokens that leave a gap after the vocabulary.
        names = [token["content"] for token in tokens]
        ids = {name: found for name in names if (found := backend.token_to_id(name)) is not None}
        return cls(backend.model, ids, prefix)

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
                blanked = part.replace(" ", BLANK)
                words += _WORD.findall(FIRST + blanked if self._is_prefixed(blanked, position) else blanked)
        return words

    def _is_prefixed(self, text: str, position: int) -> bool:
        """Whether a blank is put before the text (which is not empty)."""
        if self._prefix == "prepend":
            return True
        return text[0] != BLANK and (self._prefix == "always" or (self._prefix == "first" and position == 0))

    def _learn(self, words: set[str]) -> None:
        """Encode new words: many in one text, since a text costs more than a word; those that join, alone."""
        alone = [word for word in words if word[0] not in FIRST + BLANK or not word.strip(FIRST + BLANK)]
        other = sorted(words.difference(alone))  # sorted, or a fault would show on some runs only
        groups = [[word] for word in alone]
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
            self._held += 200 + 2 * len(word) + 48 * len(self._ids[word])  # two tuples, integers, a string

    def _lengths_of(self, ids: Sequence[int]) -> list[int]:
        """Characters of each piece; of a character that is spelled in bytes the last byte has it."""
        lengths = list(map(self._sizes.__getitem__, ids))
        if not self._going_on.isdisjoint(ids):
            for position, token_id in enumerate(ids[1:]):
                if token_id in self._going_on:
                    lengths[position] = 0
        return lengths

    def _forget(self) -> None:
        self._ids: dict[str, tuple[int, ...]] = {
            token: (token_id,) for token, token_id in self._added.items()
        }
        self._lengths: dict[str, tuple[int, ...]] = {token: (len(token),) for token in self._added}
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


def _is_plain_token(token: dict[str, Any]) -> bool:
    """Whether an added token takes in nothing but itself, and cannot be mistaken for a word."""
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    content = token["content"]
    return not (any(token[flag] for flag in flags) or BLANK in content or content.startswith(FIRST))


def _prefix(state: dict[str, Any]) -> str | None:
    """When a blank is put before a text: prepend (always), or as Metaspace does, which knows "first" as well
    as "never" and puts none before another. None if texts reach the model in another way."""
    normalizer, splitter = state["normalizer"], state["pre_tokenizer"]
    if normalizer == _NORMALIZER and splitter is None:
        return "prepend"
    if normalizer is None and splitter and {**splitter, **_METASPACE} == splitter:
        return splitter["prepend_scheme"]
    return None
