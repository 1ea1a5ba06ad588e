"""Streams: a file's uncompressed bytes from any offset, gzip and zstd included.

A compressed file can only be read forwards, so reading its unit 7 means decompressing all before it. The
stream that has just read unit 6 is therefore kept: a process that takes a file's units in order decompresses
it once. Out of order is correct too, only slower.
"""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from omnidata.corpus.source import SourceFile, open_source_bytes
from omnidata.schema import UserError

_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_BLOCK = 1 << 20
_KEPT = 4  # streams
_kept: dict[tuple[int, str], Any] = {}  # (process, source) -> a stream that stands after its last unit


def compression_of(head: bytes) -> str:
    """gzip or zstd by a file's first bytes, else ""."""
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), "")


def decompressed(raw: BinaryIO, compression: str) -> BinaryIO:
    """A forward stream over what a compressed one holds."""
    if compression == "gzip":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), _BLOCK)
    if compression == "zstd":
        import zstandard

        return io.BufferedReader(
            zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True), _BLOCK
        )
    return raw


@contextmanager
def open_at(file: SourceFile, offset: int = 0) -> Iterator[BinaryIO]:
    """The uncompressed bytes of a file from an offset; UserError when the compression is broken."""
    key = (os.getpid(), file.source)  # a forked child must not move its parent's stream
    stream = _open(file, key, offset)
    try:
        yield stream
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        stream.close()
        raise UserError(
            f"source {file.source}: the {file.compression} data is broken or cut off ({error})"
        ) from error
    except BaseException:
        stream.close()
        raise
    _keep(key, stream) if file.compression else stream.close()


def _open(file: SourceFile, key: tuple[int, str], offset: int) -> BinaryIO:
    kept = _kept.pop(key, None) if file.compression else None
    if kept is not None and kept.tell() <= offset:
        stream = kept
    else:
        stream = decompressed(open_source_bytes(file.source), file.compression)
    if file.compression:
        _skip(stream, offset - stream.tell())
    else:
        stream.seek(offset)
    return stream


def _skip(stream: BinaryIO, num_bytes: int) -> None:
    while num_bytes > 0 and (block := stream.read(min(num_bytes, _BLOCK))):
        num_bytes -= len(block)


def _keep(key: tuple[int, str], stream: BinaryIO) -> None:
    while len(_kept) >= _KEPT:
        _kept.pop(next(iter(_kept))).close()
    _kept[key] = stream
