"""A shard read from its bytes alone, front to back, in one pass that also hashes it.

``verify --deep`` and ``verify --repair`` trust no index: they walk the headers::

    walk = ShardWalk(file)
    for found in walk: ...      # Span(key, offset, raw) of each sample, Damage(offset, what) of what is none
    walk.sha256, walk.num_bytes

After damage the walk goes on at the next of the ``known_starts`` (sample offsets that an index claims), and
without any it stops: a tar has no other way to find the next header.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from omnidata.shards import BLOCK, CorruptSampleError, parse_header

READ_SIZE = 1 << 20


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive members that share a key: one sample, if it parses."""

    key: str
    offset: int
    raw: bytes


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes from ``offset`` on that are no member of the schema."""

    offset: int
    what: str


class ShardWalk:
    """Iterate once; then ``sha256`` and ``num_bytes`` are those of the whole file."""

    def __init__(self, file: BinaryIO, *, known_starts: Sequence[int] = ()) -> None:
        self._file = file
        self._starts = sorted(known_starts)
        self._known = frozenset(known_starts)
        self._hash = hashlib.sha256()
        self.num_bytes = 0  # read so far

    @property
    def sha256(self) -> str:
        """Hex digest of what was read so far."""
        return self._hash.hexdigest()

    def __iter__(self) -> Iterator[Span | Damage]:
        pending: Span | None = None
        while True:
            at = self.num_bytes
            try:
                member = self._read_member()
            except CorruptSampleError as error:
                if pending and at in self._known:  # the sample before the damage is whole
                    yield pending
                    pending = None
                yield Damage(pending.offset if pending else at, str(error))
                pending = None
                if not self._skip_to_next_start(at):
                    break
                continue
            if member is None:
                break
            name, raw = member
            key = name.partition(".")[0]
            if pending and pending.key == key and at not in self._known:
                pending = Span(key, pending.offset, pending.raw + raw)
                continue
            if pending:
                yield pending
            pending = Span(key, at, raw)
        if pending:
            yield pending
        yield from self._tail()

    def _read(self, count: int) -> bytes:
        data = self._file.read(count)
        self._hash.update(data)
        self.num_bytes += len(data)
        return data

    def _read_member(self) -> tuple[str, bytes] | None:
        """The next member's name and all its bytes, header and padding included; None at the end marker."""
        at = self.num_bytes
        header = self._read(BLOCK)
        if len(header) == BLOCK and not header.strip(b"\0"):
            return None
        if len(header) < BLOCK:
            raise CorruptSampleError(f"the file ends at byte {self.num_bytes} without the end of an archive")
        name, size = parse_header(header, position=at)
        content = self._read(size + -size % BLOCK)
        if len(content) < size + -size % BLOCK:
            raise CorruptSampleError(f"member {name!r} at byte {at} is cut short at byte {self.num_bytes}")
        return name, header + content

    def _skip_to_next_start(self, damaged: int) -> bool:
        """Read on to a sample start after the damage; False (and at the end of the file) if none is known."""
        start = next((start for start in self._starts if start >= self.num_bytes and start > damaged), None)
        if start is None:
            while self._read(READ_SIZE):
                pass
            return False
        while self.num_bytes < start:
            if not self._read(min(READ_SIZE, start - self.num_bytes)):
                return False
        return True

    def _tail(self) -> Iterator[Damage]:
        """What follows the end marker must be zeros."""
        dirty = None
        while data := self._read(READ_SIZE):
            if dirty is None and data.strip(b"\0"):
                dirty = self.num_bytes - len(data)
        if dirty is not None:
            yield Damage(dirty, "data after the end of the archive")
