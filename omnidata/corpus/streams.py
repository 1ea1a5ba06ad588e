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
from typing import Any, BinaryIO, cast

from omnidata.corpus.source import SourceFile, open_source_bytes
from omnidata.schema import UserError

_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_BLOCK = 1 << 20
_PIECE = 1 << 10  # compressed bytes at a time: four of them may stand for 128 KiB
_KEPT = 4  # streams
_kept: dict[tuple[int, str], Any] = {}  # (process, source) -> a stream that stands after its last unit


def compression_of(head: bytes) -> str:
    """gzip or zstd by a file's first bytes, else ""."""
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), "")


def read_head(name: str, num_bytes: int) -> tuple[bytes, str]:
    """The first uncompressed bytes of a file, and its compression."""
    with _errors_named(name), open_source_bytes(name) as raw:
        compression = compression_of(raw.read(4))
        raw.seek(0)
        return _decompressed(raw, compression).read(num_bytes), compression


@contextmanager
def open_at(file: SourceFile, offset: int = 0) -> Iterator[BinaryIO]:
    """The uncompressed bytes of a file from an offset; UserError if they cannot be read."""
    key = (os.getpid(), file.source)  # a forked child must not move its parent's stream
    with _errors_named(file.source):
        stream = _open(file, key, offset)
        try:
            yield stream
        except BaseException:
            stream.close()
            raise
    _keep(key, stream) if file.compression else stream.close()


def skip(stream: BinaryIO, num_bytes: int) -> None:
    """Move forwards; past the end of the data is no error, as in files."""
    if num_bytes > 0 and stream.seekable():
        stream.seek(num_bytes, io.SEEK_CUR)
        return
    while num_bytes > 0 and (block := stream.read(min(num_bytes, _BLOCK))):
        num_bytes -= len(block)


class Limited:
    """The next bytes of a stream, and no more."""

    def __init__(self, stream: BinaryIO, num_bytes: int) -> None:
        self._stream, self._left = stream, num_bytes

    def read(self, size: int) -> bytes:
        block = self._stream.read(min(size, self._left))
        self._left -= len(block)
        return block


@contextmanager
def _errors_named(name: str) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"source {name}: the compressed data is broken or cut off ({error})") from error
    except OSError as error:
        raise UserError(f"source {name}: cannot be read ({error})") from error


def _open(file: SourceFile, key: tuple[int, str], offset: int) -> BinaryIO:
    kept = _kept.pop(key, None) if file.compression else None
    if kept is not None and kept.tell() <= offset:
        stream = kept
    else:
        stream = _decompressed(open_source_bytes(file.source), file.compression)
    skip(stream, offset - stream.tell())
    return stream


def _keep(key: tuple[int, str], stream: BinaryIO) -> None:
    while len(_kept) >= _KEPT:
        _kept.pop(next(iter(_kept))).close()
    _kept[key] = stream


def _decompressed(raw: BinaryIO, compression: str) -> BinaryIO:
    if compression == "gzip":
        return io.BufferedReader(_closing(gzip.GzipFile(fileobj=raw), raw), _BLOCK)
    if compression == "zstd":
        return io.BufferedReader(_ZstdFile(raw), _BLOCK)
    # Files of fsspec are raw ones at heart: their readline knows no limit.
    return raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(cast("io.RawIOBase", raw), _BLOCK)


def _closing(reader: Any, raw: BinaryIO) -> Any:
    reader.myfileobj = raw  # GzipFile then closes it with itself
    return reader


class _ZstdFile(io.RawIOBase):
    """zstd frames, one after the other; unlike the library's reader it notices that the last is cut off."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw, self._ready, self._position = raw, memoryview(b""), 0
        self._pending = memoryview(b"")
        self._frame: Any = None

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        while not self._ready and self._more():
            pass
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        self._position += count
        return count

    def _more(self) -> bool:
        """Decompress some more; False at the end."""
        import zstandard

        data = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
        if not data:
            self._pending = self._pending or memoryview(self._raw.read(64 << 10))
            data, self._pending = bytes(self._pending[:_PIECE]), self._pending[_PIECE:]
        if not data:
            if self._frame is not None and not self._frame.eof:
                raise EOFError("the last zstd frame has no end")
            return False
        if self._frame is None or self._frame.eof:
            self._frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            self._ready = memoryview(self._frame.decompress(data))
        except zstandard.ZstdError as error:
            raise EOFError(str(error)) from error
        return True

    def close(self) -> None:
        self._raw.close()
        super().close()
