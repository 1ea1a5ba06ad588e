"""Spaced words: the encodings of a byte-level BPE, put together from words that were encoded before.

GPT-2, Llama 3, Qwen and most of today's tokenizers cut a text by a pattern before they merge anything, and
the pattern always cuts before a blank that follows something that is not white (patterns.py proves it)::

    "Hello big world"  ->  "Hello" " big" " world"  ->  [9707] [2409] [1879]

So each of these words may be encoded by itself, whatever the model is: it never sees more than one piece.
Words repeat, and looking them up takes a small part of the time of encoding the whole text anew. What the
tokenizer's own description does not prove is encoded by the library (``SpacedWords.of`` gives None): another
normalizer than NFC, which no blank takes part in; another pre-tokenizer than Split, Digits and ByteLevel;
dropout; added tokens that take in more than themselves.

Not taken: new words one by one (8.7 us each, a hundred in one text 3.6), and the pattern itself in Python's
``regex``, whose classes of characters are those of another edition of Unicode than the library's.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any

from omnidata.text.patterns import cuts_before_blanks, finds_no_blank_inside

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Spans = list[tuple[int, int]]  # first character of each token, and the one after its last

_WORD = re.compile(" *[^ ]+| +")
# White space besides the blank, in any edition of Unicode; a blank after it may belong to what stands before.
_WHITE = r"[^\S ]|[\u180e\u200b\ufeff]"
_WHITE_BEFORE_BLANK = re.compile(f"(?:{_WHITE}) ")
_ENDS_WHITE = re.compile(rf"(?:{_WHITE})\Z")
_HELD = 32_000_000  # bytes of words in memory, about
_MOST_SPANS = 20_000  # words whose tokens' places are kept: those where turns start and end
_GROUP = 100  # words encoded as one text
_MOST_TOKENS = 256  # added ones that content may spell: alternatives of a regular expression


class SpacedEncoding:
    """Ids of a text and the characters they stand for: what the renderer needs of ``tokenizers.Encoding``."""

    def __init__(self, owner: SpacedWords, words: list[str], counts: list[int], ids: list[int]) -> None:
        self.ids = ids
        self._owner, self._words, self._counts = owner, words, counts  # tokens of each word
        self._places: tuple[list[int], list[int]] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def _starts(self) -> tuple[list[int], list[int]]:
        """The first character and the first token of each word, and the ends of the last."""
        if self._places is None:
            characters = list(accumulate(map(len, self._words), initial=0))
            self._places = characters, list(accumulate(self._counts, initial=0))
        return self._places

    def char_to_token(self, character: int) -> int | None:
        """The first token that has a part in the character; None outside the text."""
        characters, tokens = self._starts()
        if not 0 <= character < characters[-1]:
            return None
        number = bisect_right(characters, character) - 1
        inside = character - characters[number]
        for position, (start, end) in enumerate(self._owner.spans(self._words[number])):
            if start <= inside < end:
                return tokens[number] + position
        return None

    def token_to_chars(self, token: int) -> tuple[int, int]:
        """The token's first character, and the one after its last."""
        characters, tokens = self._starts()
        number = bisect_right(tokens, token) - 1
        start, end = self._owner.spans(self._words[number])[token - tokens[number]]
        return characters[number] + start, characters[number] + end


class SpacedWords:
    """Encodes texts by their words; holds a bounded number of them."""

    def __init__(self, backend: Tokenizer, added: Sequence[str], guards: Sequence[str]) -> None:
        self._backend = backend
        ids = {token: backend.token_to_id(token) for token in (*added, *guards)}
        self._added: dict[str, tuple[int, ...]] = {
            token: (token_id,) for token, token_id in ids.items() if token_id is not None
        }
        self._guard = guards[0]  # any: words on both sides of an added token are encoded apart
        [self._guard_id] = self._added[guards[0]]
        longest_first = sorted(added, key=len, reverse=True)  # of those that fit, as tokenizers does
        alternatives = [_any_of_the(guards), *map(re.escape, longest_first)]
        self._split = re.compile(f"({'|'.join(alternatives)})")
        self._spans: dict[str, Spans] = {}
        self._forget()

    @classmethod
    def of(cls, description: dict[str, Any], backend: Tokenizer, guards: Sequence[str]) -> SpacedWords | None:
        """For a tokenizer, its description (guarding.described), and those of its added tokens that are
        guards; None if words cannot stand alone."""
        tokens = [token["content"] for token in description["added_tokens"]]
        added = [token for token in tokens if token not in set(guards)]
        if not is_proven(description) or len(added) > _MOST_TOKENS or not guards:
            return None
        if any(token[:1] == guards[0][0] for token in added):
            return None
        return cls(backend, added, guards)

    def encode_batch(self, texts: Sequence[str]) -> list[SpacedEncoding]:
        """The encodings of the texts, nothing added."""
        if self._held > _HELD:
            self._forget()
        listed = [self._words(text) for text in texts]
        try:
            return [self._join(words) for words in listed]
        except KeyError:  # a new word; seldom, so that looking for them beforehand would take longer
            self._learn({word for words in listed for word in words if word not in self._ids})
            return [self._join(words) for words in listed]

    def spans(self, word: str) -> Spans:
        """The characters of each token of a word."""
        if word in self._added:
            return [(0, len(word))]
        if word not in self._spans:
            if len(self._spans) >= _MOST_SPANS:
                self._spans.clear()
            self._spans[word] = self._backend.encode(word, add_special_tokens=False).offsets
        return self._spans[word]

    def _join(self, words: list[str]) -> SpacedEncoding:
        ids = list(map(self._ids.__getitem__, words))
        return SpacedEncoding(self, words, list(map(len, ids)), list(chain.from_iterable(ids)))

    def _words(self, text: str) -> list[str]:
        words: list[str] = []
        for position, part in enumerate(self._split.split(text)):
            if position % 2:
                words.append(part)
            elif not part.isprintable() and _WHITE_BEFORE_BLANK.search(part):  # what prints is not white
                words += _kept_together(_WORD.findall(part))
            elif part:
                words += _WORD.findall(part)
        return words

    def _learn(self, words: set[str]) -> None:
        """Encode new words: many in one text, guards in between, since a text costs more than a word."""
        ordered = sorted(words)  # or a fault would show on some runs only
        groups = [ordered[start : start + _GROUP] for start in range(0, len(ordered), _GROUP)]
        texts = [self._guard.join(group) for group in groups]
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        for group, encoding in zip(groups, encodings, strict=True):
            ids, start = [*encoding.ids, self._guard_id], 0
            for word in group:
                end = ids.index(self._guard_id, start)
                self._ids[word] = tuple(ids[start:end])  # tuples do not burden the garbage collector
                self._held += 150 + 2 * len(word) + 40 * (end - start)
                start = end + 1

    def _forget(self) -> None:
        self._ids = dict(self._added)
        self._held = 0


def is_proven(description: dict[str, Any]) -> bool:
    """Whether a tokenizer's description proves that its words may be encoded alone."""
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    return (
        _leaves_blanks_alone(description["normalizer"])
        and _cuts_before_blanks(description["pre_tokenizer"])
        and not description["model"].get("dropout")
        and not any(token[flag] for token in description["added_tokens"] for flag in flags)
    )


def _leaves_blanks_alone(normalizer: dict[str, Any] | None) -> bool:
    """NFC joins no blank with anything, and makes nothing white that was not."""
    if normalizer is None or normalizer["type"] == "NFC":
        return True
    return normalizer["type"] == "Sequence" and all(map(_leaves_blanks_alone, normalizer["normalizers"]))


def _cuts_before_blanks(splitter: dict[str, Any] | None) -> bool:
    """Whether no stage's pieces reach over a blank that follows text, and one stage begins anew at it."""
    if splitter is None:
        return False
    stages = splitter["pretokenizers"] if splitter["type"] == "Sequence" else [splitter]
    begins = False
    for number, stage in enumerate(stages):
        if stage["type"] == "Split":
            pattern = stage["pattern"].get("Regex")
            if pattern is None or stage["behavior"] != "Isolated" or stage["invert"]:
                return False
            if not finds_no_blank_inside(pattern):
                return False
            begins = begins or cuts_before_blanks(pattern)
        elif stage["type"] == "ByteLevel":  # spells blanks otherwise, so nothing may come after it
            if stage["add_prefix_space"] or number + 1 < len(stages):
                return False
            begins = begins or stage["use_regex"]  # GPT-2's own pattern
        elif stage["type"] != "Digits":
            return False
    return begins


def _any_of_the(guards: Sequence[str]) -> str:
    """A pattern for guards, which have a secret beginning and an end in common; hundreds cost nothing."""
    begin, end = guards[0][:-1], guards[0][-1]
    while not all(guard.startswith(begin) for guard in guards):
        begin = begin[:-1]
    assert all(guard.endswith(end) and end not in guard[:-1] for guard in guards)
    return f"{re.escape(begin)}[^{end}]*{end}"


def _kept_together(words: list[str]) -> list[str]:
    """The words, each with what follows where it ends in white space."""
    kept: list[str] = []
    for word in words:
        if kept and _ENDS_WHITE.search(kept[-1]):
            kept[-1] += word
        else:
            kept.append(word)
    return kept
