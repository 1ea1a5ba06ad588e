"""A JSON array of records, read as a stream: memory does not grow with the file.

    [{"id": "7", "conversations": [...]}, {"id": "8", ...}, ...]
    {"version": 1, "data": [{"id": "7", ...}, ...]}               the array may be wrapped (_WRAPPER)

Items are found without parsing them: a block of bytes is looked at with numpy for quotes, brackets and
commas; what stands between two quotes is text; a comma at depth 1 ends an item. Each item is then parsed on
its own, so that a broken one is one reject.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from omnidata.corpus.json_lines import BOM, parse
from omnidata.corpus.source import MAX_ITEM, UNIT_BYTES, UNIT_RECORDS, SourceFile, Unit
from omnidata.corpus.streams import Limited, open_at, read_head
from omnidata.schema import Record, Reject, UserError

FORMATS = ("llava", "messages")
BLOCK = 4 << 20
_HEAD = 64 << 10  # bytes in which a wrapped array must start

# An object that holds the array under one of these names, after nothing but plain values.
_WRAPPER = re.compile(
    rb'\s*\{\s*(?:"[^"\\]*"\s*:\s*(?:"[^"\\]*"|[-+.\w]+)\s*,\s*)*'
    rb'"(?:data|records|samples|examples)"\s*:\s*\[(?=\s*[{\]])'
)
_QUOTE, _BACKSLASH, _COMMA, _OPEN = b'"\\,['
_BLANKS = b" \t\r\n"
_DEPTH = np.zeros(256, dtype=np.int8)  # what a byte outside strings does to the depth
_DEPTH[list(b"{[")], _DEPTH[list(b"}]")] = 1, -1
_STRUCTURAL = np.zeros(256, dtype=bool)
_STRUCTURAL[list(b'"{}[],')] = True


def sniff(name: str, head: bytes) -> bool:
    """An opening bracket first, or a wrapper around one."""
    return head.removeprefix(BOM).lstrip()[:1] == b"[" or _array_start(head) > 0


def _array_start(head: bytes) -> int:
    """Bytes in front of a wrapped array's bracket; 0 if nothing wraps it."""
    match = _WRAPPER.match(head, len(BOM) if head.startswith(BOM) else 0)
    return match.end() - 1 if match else 0


def scan(file: SourceFile) -> Iterator[Unit]:
    """Cost: one pass over the bytes at numpy's speed, nothing parsed."""
    bracket = _array_start(read_head(file.source, _HEAD)[0])
    with open_at(file, bracket) as stream:
        start, first, records, stop = 0, 0, 0, 0
        found = items(stream, bracket, inside=False, name=file.source, wrapped=bracket > 0)
        for number, (item_start, text) in enumerate(found):
            if records == 0:
                start, first = item_start, number
            records += 1
            stop = item_start + len(text)
            if records == UNIT_RECORDS or stop - start >= UNIT_BYTES:
                yield Unit(start, stop, first, records)
                records = 0
        if records:
            yield Unit(start, stop, first, records)


def read(file: SourceFile, unit: Unit) -> Iterator[Record | Reject]:
    """The records of a unit."""
    with open_at(file, unit.start) as stream:
        found = items(Limited(stream, unit.stop - unit.start), unit.start, inside=True, name=file.source)
        for number, (_, text) in enumerate(found, start=unit.first):
            yield parse(file, f"item {number}", text)


def items(
    stream: BinaryIO | Limited, offset: int, *, inside: bool, name: str, wrapped: bool = False
) -> Iterator[tuple[int, bytes]]:
    """(offset, text) of each item. ``inside``: the stream starts at an item, not at the array's bracket."""
    finder = _Finder(depth=1 if inside else 0)
    pending, base = b"", offset  # bytes since the last border, and where they start
    while block := stream.read(BLOCK):
        borders, fresh = finder.borders(block), len(pending)
        pending, done = pending + block, 0
        for position in borders:
            border = fresh + position
            yield from _item(pending, done, border, base)
            done = border + 1
        pending, base = pending[done:], base + done
        if finder.closed:
            _check_end(pending, stream, base, name, wrapped=wrapped)
            return
        if len(pending) > MAX_ITEM:
            break
    if not inside:
        raise UserError(
            f"source {name}: the array does not end; look for a missing quote or bracket after byte {base}"
        )
    yield from _item(pending + b"]", 0, len(pending), base)


def _item(text: bytes, start: int, border: int, base: int) -> Iterator[tuple[int, bytes]]:
    """The item that a comma or the closing bracket ends; an empty one is an item before a comma only."""
    item = text[start:border].strip(_BLANKS)
    if text[border] == _COMMA or (item and text[border] != _OPEN):
        yield base + start + (text.find(item[:1], start) - start if item else 0), item


def _check_end(rest: bytes, stream: BinaryIO | Limited, base: int, name: str, *, wrapped: bool) -> None:
    """Blanks end a file; around a wrapped array there may be plain values, but no second array."""
    while not (b"[" in rest if wrapped else rest.strip(_BLANKS)):
        base += len(rest)
        rest = stream.read(BLOCK)
        if not rest:
            return
    raise UserError(
        f"source {name}: more {'arrays' if wrapped else 'text'} after the end of the array, "
        f"near byte {base}; one file holds one array"
    )


class _Finder:
    """Finds the brackets of the array and the commas between its items, block after block."""

    def __init__(self, depth: int) -> None:
        self.closed = False
        self._depth = depth
        self._quotes = 0  # unescaped ones so far: odd inside a string
        self._backslashes = 0  # at the end of the last block

    def borders(self, block: bytes) -> list[int]:
        """Positions in the block of what starts, separates and ends items."""
        data = np.frombuffer(block, dtype=np.uint8)
        places = np.flatnonzero(_STRUCTURAL[data])
        kinds = data[places]
        quotes = kinds == _QUOTE
        quotes[quotes] = ~self._escaped(block, data, places[quotes])
        inside_string = (np.cumsum(quotes) + self._quotes) & 1
        change = np.where(inside_string, 0, _DEPTH[kinds])
        depth = np.cumsum(change) + self._depth
        is_border = ((change > 0) & (depth == 1)) | ((change < 0) & (depth == 0))
        is_border |= (kinds == _COMMA) & (depth == 1) & (inside_string == 0)
        borders = places[is_border]
        ends = np.flatnonzero((change < 0) & (depth == 0))
        self.closed = len(ends) > 0
        if len(places):
            self._quotes += int(quotes.sum())
            self._depth = int(depth[-1])
        self._backslashes = _trailing_backslashes(block, len(block), self._backslashes)
        return (
            borders[: np.searchsorted(borders, places[ends[0]]) + 1].tolist()
            if self.closed
            else borders.tolist()
        )

    def _escaped(self, block: bytes, data: np.ndarray, quotes: np.ndarray) -> np.ndarray:
        """For each quote: is the number of backslashes in front of it odd?"""
        escaped = np.zeros(len(quotes), dtype=bool)
        after_backslash = data[quotes - 1] == _BACKSLASH  # position 0 looks at the last byte: corrected below
        if len(quotes) and quotes[0] == 0:
            after_backslash[0] = self._backslashes > 0
        for i in np.flatnonzero(after_backslash):
            escaped[i] = _trailing_backslashes(block, int(quotes[i]), self._backslashes) % 2
        return escaped


def _trailing_backslashes(block: bytes, stop: int, before: int) -> int:
    """Backslashes in a row that end at ``stop``; those ``before`` the block count where it starts with."""
    start = stop
    while start > 0 and block[start - 1] == _BACKSLASH:
        start -= 1
    return stop - start + (before if start == 0 else 0)
