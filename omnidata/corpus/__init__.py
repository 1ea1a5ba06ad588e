"""Corpora: files on disk (or at any URL) -> records. One module a source shape, one registry.

    open_source(name)  -> [SourceFile]       globs expanded, formats detected from the bytes        source.py
    scan(file)         -> Unit, Unit, ...    cuts a file into runs of records, cheaply
    read(file, unit)   -> Record | Reject    parses one of them; any process, any order

    json_lines   one JSON object per line, LLaVA or chat keys        scan reads every byte, parses nothing
    json_array   one JSON array of such objects, streamed          the same; {"data": [...]} is unwrapped
    parquet      Hugging Face datasets                             scan reads the footer
    tsv          Muffin, RLHF-V: base64 pictures in a table        scan reads every byte
    webdataset   tar shards of .json and pictures                  scan reads the headers

gzip and zstd are read through (streams.py). To add a shape: write a module with FORMATS, ``sniff``, ``scan``
and ``read`` as ``SourceShape`` below has them, name it in ``_SHAPES``, and test it in tests/test_corpus.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import PurePosixPath
from typing import Protocol

from omnidata.corpus.json_lines import BOM
from omnidata.corpus.source import SourceFile, Unit, expand, file_size
from omnidata.corpus.streams import read_head
from omnidata.schema import Record, Reject, UserError

__all__ = ["FORMATS", "SourceFile", "Unit", "expand", "open_file", "open_source", "read", "scan"]

FORMATS = ("auto", "llava", "messages", "parquet", "tsv", "webdataset")
_SHAPES = (
    "parquet",
    "webdataset",
    "tsv",
    "json_array",
    "json_lines",
)  # the first that recognises a file takes it
_HEAD = 64 << 10  # bytes that sniff gets to see


class SourceShape(Protocol):
    """What a module of this package provides."""

    FORMATS: tuple[str, ...]  # what --format may call it

    def sniff(self, name: str, head: bytes) -> bool:
        """Is this a file of the shape? ``head`` holds its first 64 KiB, uncompressed."""

    def scan(self, file: SourceFile) -> Iterator[Unit]:
        """Cut the file into units, in order; together they hold every record once."""

    def read(self, file: SourceFile, unit: Unit) -> Iterator[Record | Reject]:
        """The ``unit.num_records`` records of a unit, each with its locator."""


def open_source(source: str, *, format: str = "auto") -> list[SourceFile]:
    """The files that a source names: a path, a glob, or a URL of either.

    Raises:
        UserError: nothing is there, or it is of no known shape.
    """
    if format not in FORMATS:
        raise UserError(f"--format {format} is unknown; choose one of {', '.join(FORMATS)}")
    return [open_file(name, format=format) for name in expand(source)]


def scan(file: SourceFile) -> Iterator[Unit]:
    """The units of a file; what it costs is in the module's docstring."""
    return _shape(file.shape).scan(file)


def read(file: SourceFile, unit: Unit) -> Iterator[Record | Reject]:
    """The records of a unit, in order."""
    return _shape(file.shape).read(file, unit)


def _shape(name: str) -> SourceShape:
    return import_module(f"omnidata.corpus.{name}")


def open_file(name: str, *, format: str = "auto") -> SourceFile:
    """One file, its format detected from its bytes; UserError if it is of no known shape."""
    head, compression = read_head(name, _HEAD)
    if not head.removeprefix(BOM).strip():
        return _open_empty(name, format, compression)
    for candidate in _SHAPES:
        shape = _shape(candidate)
        if format in ("auto", *shape.FORMATS) and shape.sniff(name, head):
            return SourceFile(name, _format(shape, format, head), candidate, file_size(name), compression)
    wanted = "any known format" if format == "auto" else f"--format {format}"
    remedy = "write one object per line, or all of them in an array (under 'data' in an object)"
    hint = f"; {remedy}" if head.lstrip()[:1] == b"{" else ""
    raise UserError(f"source {name}: its first bytes {head[:20]!r} are not those of {wanted}{hint}")


def _open_empty(name: str, format: str, compression: str) -> SourceFile:
    """A file of nothing, or of blanks, holds no record if text is expected of it; else something is lost."""
    parts = PurePosixPath(name).name.lower().split(".")[1:]
    if format in ("llava", "messages", "tsv") or {"json", "jsonl", "ndjson", "tsv"} & set(parts):
        found = "llava" if format == "auto" else format
        return SourceFile(name, found, "json_lines", file_size(name), compression)
    raise UserError(f"source {name}: the file is empty; take it out of the sources, or get it again")


def _format(shape: SourceShape, format: str, head: bytes) -> str:
    """What to call the file: JSON is llava or messages by the keys near its start."""
    if format != "auto" or len(shape.FORMATS) == 1:
        return shape.FORMATS[0] if format == "auto" else format
    messages, conversations = head.find(b'"messages"'), head.find(b'"conversations"')
    return "messages" if messages >= 0 and (conversations < 0 or messages < conversations) else "llava"
