"""A source: one input file, wherever it lies, and the units that it is cut into.

Everything that knows of paths, URLs and globs is here; the shapes (json_lines, parquet, ...) see bytes.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from omnidata.schema import Record, UserError

# A unit ends at whichever comes first: small enough that shards share out evenly among workers, large enough
# that the plan of a hundred million records stays small.
UNIT_RECORDS = 1000
MAX_ITEM = 256 << 20  # bytes of one record; in an array, more means that a quote or bracket is missing
UNIT_BYTES = 16 << 20

_WHOLE = 1 << 30  # bytes up to which digest() reads the whole file
_SAMPLES, _SAMPLE = 256, 1 << 20  # beyond that: so many evenly spaced samples of so many bytes


class Plain:
    """Travels between processes as a call with its fields, in half the time of a dataclass's own way."""

    __slots__: tuple[str, ...] = ()

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), tuple([getattr(self, name) for name in self.__slots__])


@dataclass(frozen=True, slots=True)
class Unit(Plain):
    """A run of records that can be read on its own. What the numbers count is the shape's business."""

    start: int  # bytes (of the uncompressed file), or rows of a row group
    stop: int
    first: int  # number of the first line / item / row / sample, for locators
    num_records: int
    part: int = 0  # row group


@dataclass(frozen=True, slots=True)
class SourceFile(Plain):
    """One input file."""

    source: str  # its name as the user gave it (what a glob found, for a glob)
    format: str  # llava, messages, parquet, tsv, webdataset
    shape: str  # the module of omnidata.corpus that reads it
    num_bytes: int
    compression: str = ""  # gzip, zstd
    name: str = ""  # as much of its path as tells it from the build's other files; "": its last part

    def digest(self) -> str:
        """Hex hash of the content; of files over 1 GiB the size and 256 MiB of evenly spaced samples."""
        digest = hashlib.blake2b(str(self.num_bytes).encode(), digest_size=16)
        with open_source_bytes(self.source) as stream:
            if self.num_bytes <= _WHOLE:
                while block := stream.read(_SAMPLE):
                    digest.update(block)
            else:
                for i in range(_SAMPLES):
                    stream.seek(i * (self.num_bytes - _SAMPLE) // (_SAMPLES - 1))
                    digest.update(stream.read(_SAMPLE))
        return digest.hexdigest()

    def record(self, locator: str, payload: dict[str, object]) -> Record:
        """A record of this file; without an id of its own it gets one from its place."""
        own = payload.get("id")
        known = isinstance(own, str | int) and not isinstance(own, bool) and own != ""
        return Record(self.source, locator, str(own) if known else self.place(locator), payload)

    def place(self, locator: str) -> str:
        """An id made from the place of a record: the same however the path to the file is typed."""
        return f"{self.name or _parts(self.source)[-1]}#{locator}"


def with_names(files: Sequence[SourceFile]) -> list[SourceFile]:
    """The files with names that tell them apart: the fewest last parts of their paths that do.

    Example: a/x.json and b/x.json are named so; a lone ./data/x.json is named x.json.
    """
    paths = [_parts(file.source) for file in files]
    names, left, length = [""] * len(files), list(range(len(files))), 1
    while left:  # of those that share a name, one more part
        ends = {number: "/".join(paths[number][-length:]) for number in left}
        shared = Counter(ends.values())
        for number, end in ends.items():
            if shared[end] == 1 or length >= len(paths[number]):
                names[number] = end
        left = [number for number in left if not names[number]]
        length += 1
    return [
        SourceFile(file.source, file.format, file.shape, file.num_bytes, file.compression, name)
        for file, name in zip(files, names, strict=True)
    ]


def _parts(source: str) -> list[str]:
    return (source if is_url(source) else os.path.abspath(source)).replace(os.sep, "/").split("/")


def is_url(name: str) -> bool:
    """``s3://bucket/x`` is a URL, ``C:/x`` and ``photos/x`` are not."""
    return "://" in name


def open_source_bytes(name: str) -> BinaryIO:
    """The raw bytes of a file or URL, seekable."""
    if not is_url(name):
        return open(name, "rb")
    import fsspec

    return fsspec.open(name, "rb").open()


def file_size(name: str) -> int:
    """Bytes of a file or URL."""
    if not is_url(name):
        return os.path.getsize(name)
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(name)
    return filesystem.size(path)


def expand(name: str) -> list[str]:
    """The files that a name stands for, in order; UserError when there is none."""
    found = list(_expand_url(name) if is_url(name) else _expand_path(name))
    if not found:
        raise UserError(f"source {name}: no such file" + (" matches" if glob.has_magic(name) else ""))
    return found


def _expand_path(name: str) -> Iterator[str]:
    if os.path.isdir(name):
        raise UserError(
            f"source {name} is a folder; name its files, for example {os.path.join(name, '*.json')}"
        )
    if os.path.exists(name):
        yield name
    elif glob.has_magic(name):
        yield from (path for path in sorted(glob.glob(name, recursive=True)) if os.path.isfile(path))


def _expand_url(name: str) -> Iterator[str]:
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(name)
        if glob.has_magic(path):
            yield from (filesystem.unstrip_protocol(match) for match in sorted(filesystem.glob(path)))
        elif filesystem.isfile(path):
            yield name
    except (OSError, ValueError, ImportError) as error:  # unknown protocol, its package missing, no access
        raise UserError(f"source {name}: cannot be opened ({error})") from error
