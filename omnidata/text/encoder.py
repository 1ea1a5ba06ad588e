"""Text is data: an encoder in which nobody can type a control token.

A tokenizer finds its added tokens anywhere in a text, so a ``</s>`` that somebody wrote would end the turn.
``Encoder`` holds a copy of the tokenizer in which every control token has a secret name (its *guard*). The
renderer writes guards where the chat template itself prints control tokens, and leaves contents alone::

    tokenizer   "</s>" -> 2
    encoder     guard of "</s>" -> 2,  "</s>" -> ["</", "s", ">"]

Everything else in the copy is the same (normalizer, pre-tokenizer, model), so the ids are those of encoding
the whole rendering with the tokenizer itself, wherever no control token was typed. An image is one guard
here; the renderer widens it to <im_start> <im_patch> ... <im_end> once the ids are known.

Where the tokenizer allows it, texts are put together from words that were encoded before: words.py for
sentencepiece's kind of BPE, spaced_words.py for byte-level ones.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import orjson

from omnidata.schema import IM_END, IM_PATCH, IM_START, IMAGE_TOKENS, RejectError, UserError
from omnidata.text.chat_template import NONCE
from omnidata.text.guarding import added_tokens, described, guarded
from omnidata.text.prepared import PreparedTokenizer
from omnidata.text.spaced_words import SpacedWords
from omnidata.text.words import Words

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from omnidata.text.prepared import AnyTokenizer
    from omnidata.text.spans import Encoding

IMAGE_GUARD = f"\ufdd0{NONCE}image\ufdd1"
_BRACKETED = re.compile(r"<.*>|\[.*\]|\{.*\}|.*[|｜].*", re.DOTALL)  # how role markers and tags are spelt


class Encoder:
    """A tokenizer's ids for texts whose control tokens are written as guards."""

    def __init__(self, tokenizer: AnyTokenizer, *, content_tokens: Sequence[str]) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UserError(
                f"{type(tokenizer).__name__} is not a fast tokenizer; load one with tokenizer.json"
            )
        _refuse_image_tokens(content_tokens)
        added = added_tokens(backend)
        self.guards = {
            token: f"\ufdd0{NONCE}{i}\ufdd1" for i, token in enumerate(_control_tokens(added, content_tokens))
        }
        self.image_ids = _image_ids(added)  # (<im_start>, <im_patch>, <im_end>), or None if one is missing
        self._pattern = _alternation(self.guards)
        self._first_characters = frozenset(token[0] for token in self.guards)
        self.control_guard = _alternation(self.guards.values())
        self._backend, state = guarded(backend, self.guards, IMAGE_GUARD)
        self._words = _words_of(self._backend, state, [*self.guards.values(), IMAGE_GUARD])
        self.image_id = self._backend.token_to_id(IMAGE_GUARD)
        self._check_ids(added)

    def guard(self, text: str) -> str:
        """The template's own text, with its control tokens replaced by their guards."""
        return self._pattern.sub(lambda match: self.guards[match[0]], text)

    def require(self, tokens: Sequence[str]) -> tuple[str, ...]:
        """The guards of control tokens that the tokenizer must have."""
        missing = [token for token in tokens if token not in self.guards]
        if missing:
            command = f"omnidata prepare-tokenizer SOURCE --out DIR --slice-tokens {shlex.join(tokens)}"
            raise UserError(
                f"the tokenizer lacks {' and '.join(missing)} (or content may spell them), which pictures "
                f"that are cut need; run: {command}"
            )
        return tuple(self.guards[token] for token in tokens)

    def spelled(self, text: str) -> list[str]:
        """Control tokens that a content spells, each once: they are encoded as ordinary text."""
        if self._first_characters.isdisjoint(text):
            return []
        return list(dict.fromkeys(self._pattern.findall(text)))

    def may_spell(self, text: str) -> bool:
        """Does a text spell a control token, or could it complete one with what stands beside it?"""
        starts, ends, longest = self._affixes
        sizes = range(1, min(longest, len(text)) + 1)
        return bool(self.spelled(text)) or any(
            text[-size:] in starts or text[:size] in ends for size in sizes
        )

    @cached_property
    def _affixes(self) -> tuple[frozenset[str], frozenset[str], int]:
        """Proper beginnings and ends of control tokens, and the characters of the longest."""
        cuts = [(token[:i], token[i:]) for token in self.guards for i in range(1, len(token))]
        longest = max((len(token) for token in self.guards), default=0)
        return frozenset(cut[0] for cut in cuts), frozenset(cut[1] for cut in cuts), longest

    def ids(self, guards: Sequence[str]) -> list[int]:
        """The tokens' ids."""
        return [self._backend.token_to_id(guard) for guard in guards]

    def encode_batch(self, texts: Sequence[str]) -> Sequence[Encoding]:
        """Encodings (ids, char_to_token, token_to_chars) of guarded texts, nothing added."""
        if self._words is not None:
            return self._words.encode_batch(texts)
        return self._backend.encode_batch(texts, add_special_tokens=False)

    def _check_ids(self, added: list[dict[str, Any]]) -> None:
        for token in added:
            name = self.guards.get(token["content"], token["content"])
            assert self._backend.token_to_id(name) == token["id"], token


_LAST: list[tuple[Any, Any, Encoder]] = []  # (backend, what else decides, its encoder)


def encoder_of(tokenizer: AnyTokenizer, *, content_tokens: Sequence[str]) -> Encoder:
    """``Encoder(...)``; of a prepared tokenizer that was the last one, the same again.

    A build's workers are forked from a server that has made it (omnidata.builder.warm): 0.2 to 0.4 seconds
    less in each where the model has to be written out.
    """
    if not isinstance(tokenizer, PreparedTokenizer):  # others change their backend as they go
        return Encoder(tokenizer, content_tokens=content_tokens)
    backend = tokenizer.backend_tokenizer
    key = frozenset(content_tokens), str(added_tokens(backend))
    if not (_LAST and _LAST[0][0] is backend and _LAST[0][1] == key):
        _LAST[:] = [(backend, key, Encoder(tokenizer, content_tokens=content_tokens))]
    return _LAST[0][2]


def refuse_surrogates(text: str) -> None:
    """RejectError for half of a surrogate pair, which JSON of other tools may hold."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RejectError(
                "bad_content", f"character {error.start} of a message is no Unicode text"
            ) from error


def _refuse_image_tokens(content_tokens: Sequence[str]) -> None:
    forbidden = sorted(set(content_tokens) & set(IMAGE_TOKENS))
    if forbidden:
        raise UserError(
            f"{', '.join(forbidden)}: image tokens can't be content tokens; write <image> in the content"
        )


def _control_tokens(added: list[dict[str, Any]], content_tokens: Sequence[str]) -> list[str]:
    """The added tokens that content may not produce.

    All special ones, and of the others those that look like markup: a tokenizer's owner often adds role
    markers without calling them special. What is left is vocabulary (words, runs of blanks).
    """
    return [
        token["content"]
        for token in added
        if token["content"] not in content_tokens
        and (token["special"] or _BRACKETED.fullmatch(token["content"]))
    ]


def _words_of(
    backend: Tokenizer, state: dict[str, Any] | None, guards: Sequence[str]
) -> SpacedWords | Words | None:
    """What encodes texts by their words, if that is proven to be the same; ``state``: see ``guarded``."""
    description = described(backend)
    words = SpacedWords.of(description, backend, guards)
    if words is not None:
        return words
    splitter = description["pre_tokenizer"] or {"type": "Metaspace"}
    if splitter["type"] != "Metaspace":
        return None
    return Words.of(orjson.loads(backend.to_str()) if state is None else state, backend)


def _image_ids(added: list[dict[str, Any]]) -> tuple[int, int, int] | None:
    ids = {token["content"]: token["id"] for token in added}
    wanted = (IM_START, IM_PATCH, IM_END)
    return tuple(ids[token] for token in wanted) if all(token in ids for token in wanted) else None


def _alternation(tokens: Any) -> re.Pattern[str]:
    """Matches any of the tokens, the longest where several fit, as the tokenizers library does."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
