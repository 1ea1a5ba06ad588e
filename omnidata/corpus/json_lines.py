"""JSON lines: one record a line (LLaVA or chat keys), blank lines left out.

    {"id": "7", "image": "7.jpg", "conversations": [...]}
    {"id": "8", "messages": [...]}

A unit is a range of bytes that starts at the start of a line, so units are read independently.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import BinaryIO

import orjson

from omnidata.corpus.source import MAX_ITEM, UNIT_BYTES, UNIT_RECORDS, SourceFile, Unit
from omnidata.corpus.streams import open_at
from omnidata.schema import Record, Reject

FORMATS = ("llava", "messages")
BOM = b"\xef\xbb\xbf"
_NOT_A_NUMBER = re.compile(rb"\b(?:NaN|Infinity)\b")


def sniff(name: str, head: bytes) -> bool:
    """An object that starts, and does not only start, on the first line that is not blank."""
    first = head.removeprefix(BOM).lstrip().partition(b"\n")[0].strip()
    return first[:1] == b"{" and first != b"{"


def scan(file: SourceFile) -> Iterator[Unit]:
    """Cost: one pass over the bytes, nothing parsed."""
    with open_at(file) as stream:
        start = position = records = 0
        first = number = 1
        for line, num_bytes in bounded_lines(stream):
            records += bool(_text(line, position).strip())
            position += num_bytes
            number += 1
            if records == UNIT_RECORDS or position - start >= UNIT_BYTES:
                if records:
                    yield Unit(start, position, first, records)
                start, first, records = position, number, 0
        if records:
            yield Unit(start, position, first, records)


def read(file: SourceFile, unit: Unit) -> Iterator[Record | Reject]:
    """The records of a unit."""
    with open_at(file, unit.start) as stream:
        for locator, line in lines(file, stream, unit):
            yield line if isinstance(line, Reject) else parse(file, locator, line)


def lines(file: SourceFile, stream: BinaryIO, unit: Unit) -> Iterator[tuple[str, bytes | Reject]]:
    """(locator, line) of a unit's lines, without the blank ones; a reject for one over MAX_ITEM."""
    position, number = unit.start, unit.first
    for line, num_bytes in bounded_lines(stream):
        text = _text(line, position)
        if num_bytes > MAX_ITEM:
            detail = f"the line has {num_bytes:,} bytes; the limit is {MAX_ITEM:,}"
            yield f"line {number}", bad_json(file, f"line {number}", text, detail)
        elif text.strip():
            yield f"line {number}", text
        position += num_bytes
        number += 1
        if position >= unit.stop:
            return


def bounded_lines(stream: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """(line, its bytes); of a line over MAX_ITEM, which a few compressed bytes can hold, only the start."""
    while line := stream.readline(MAX_ITEM + 1):
        num_bytes = len(line)
        if num_bytes > MAX_ITEM:
            last, line = line[-1:], line[:8000]
            while last != b"\n" and (more := stream.readline(1 << 20)):
                num_bytes, last = num_bytes + len(more), more[-1:]
        yield line, num_bytes


def _text(line: bytes, position: int) -> bytes:
    return line.removeprefix(BOM) if position == 0 else line


def parse(file: SourceFile, locator: str, text: bytes) -> Record | Reject:
    """One record from its JSON."""
    try:
        payload = _loads(text)
    except (ValueError, RecursionError) as error:  # Python's own parser follows nested values by calls
        return bad_json(file, locator, text, str(error))
    if not isinstance(payload, dict):
        return bad_json(file, locator, text, f"a JSON {_kind(payload)}, where an object is expected")
    return file.record(locator, payload)


def _loads(text: bytes) -> object:
    """orjson, which is strict and fast; Python's own parser for the two things that it cannot keep.

    NaN and Infinity are no JSON, but many tools write them, mostly where nothing reads. An integer over
    64 bits becomes a float in orjson, and an id must keep its digits.
    """
    try:
        payload = orjson.loads(text)
    except orjson.JSONDecodeError:
        if not _NOT_A_NUMBER.search(text):
            raise
        return json.loads(text)
    if isinstance(payload, dict) and isinstance(payload.get("id"), float):
        payload["id"] = json.loads(text)["id"]
    return payload


def bad_json(file: SourceFile, locator: str, text: bytes, detail: str) -> Reject:
    """The reject for text that is no JSON object."""
    raw = text[:8000].decode("utf-8", "replace").strip()[:2000]
    return Reject(file.source, locator, file.place(locator), "bad_json", detail, raw)


def _kind(value: object) -> str:
    return {list: "array", str: "string", bool: "boolean", type(None): "null"}.get(type(value), "number")
