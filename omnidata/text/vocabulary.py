"""Token ids back to readable pieces, straight from ``tokenizer.json``: no transformers, no torch, no decode.

``Tokenizer.decode`` joins, cleans up and drops; whoever looks at training data wants to see each id's own
text. Byte-level vocabularies (GPT-2 and later) and sentencepiece ones (``▁`` for a blank, ``<0x0A>`` for a
byte) are understood; ids whose bytes make one character only together come back as one piece.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import orjson

from omnidata.schema import UserError


@dataclass(frozen=True, slots=True)
class TokenText:
    """One or more consecutive ids and the text that they stand for."""

    text: str
    ids: tuple[int, ...]


class Vocabulary:
    """The vocabulary of a ``tokenizer.json``.

    Raises:
        UserError: the bytes are no ``tokenizer.json``.
    """

    def __init__(self, raw: bytes, *, where: str = "tokenizer.json") -> None:
        try:
            data = orjson.loads(raw)
            vocab = data["model"]["vocab"]
            self.added = {entry["id"]: entry["content"] for entry in data["added_tokens"]}
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{where} is not the tokenizer.json of a fast tokenizer: {error!r}") from error
        names = vocab if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
        names_found = "|".join(map(re.escape, sorted(self.added.values(), key=len, reverse=True)))
        self.special_names = re.compile(names_found or r"(?!)")  # in a text: what is spelled like one
        self._tokens = {token_id: token for token, token_id in names.items()}
        self._bytes: dict[int, bytes] = {}  # of the ids met so far
        self._is_byte_level = "ByteLevel" in str(data.get("decoder")) + str(data.get("pre_tokenizer"))

    def is_special(self, token_id: int) -> bool:
        """Was the token added to the vocabulary (a control, image or content token)?"""
        return token_id in self.added

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes of one id; an id outside the vocabulary is shown as ``<?123>``."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._spell(token_id)
        return known

    def _spell(self, token_id: int) -> bytes:
        if token_id in self.added:
            return self.added[token_id].encode()
        token = self._tokens.get(token_id)
        if token is None:
            return f"<?{token_id}>".encode()
        if self._is_byte_level:
            return bytes(byte for char in token for byte in _byte_of(char))
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode()

    def pieces(self, ids: Iterable[int]) -> Iterator[TokenText]:
        """The ids as pieces; bytes that never make a character become U+FFFD."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        text, pending = "", []
        for token_id in ids:
            pending.append(token_id)
            text += decoder.decode(self.token_bytes(token_id))
            if not decoder.getstate()[0]:  # not inside a character
                yield TokenText(text, tuple(pending))
                text, pending = "", []
        if pending:
            yield TokenText(text + decoder.decode(b"", final=True), tuple(pending))


def _byte_of(char: str) -> bytes:
    byte = _byte_alphabet().get(char)
    return char.encode() if byte is None else bytes([byte])


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's alphabet: printable Latin-1 stands for itself, the rest is moved to U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}
