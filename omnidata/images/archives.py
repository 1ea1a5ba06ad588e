"""Random access into a zip or a tar, by member name.

An archive is indexed once, when it is opened; a read is then one ranged read of that member's bytes.
Processes share no seek position, so a forked or unpickled archive works as it is.

    archive = open_archive("images.zip")
    archive.read("coco/000000000139.jpg")  # bytes; KeyError if there is no such member
"""

from __future__ import annotations

import hashlib
import os
import struct
import tarfile
import zipfile
import zlib
from dataclasses import astuple, dataclass
from typing import Any, BinaryIO

import fsspec

from omnidata.schema import RejectError, UserError

_ZIP_LOCAL_HEADER = (
    30  # bytes before the member's name; lengths of name and extra field are its last two words
)


class ByteSource:
    """A local file or a URL that can be read at any offset."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._open()

    def _open(self) -> None:
        self._fs: Any = None
        if "://" in self.path:
            self._fs, self._remote_path = fsspec.core.url_to_fs(self.path)
        else:
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)

    def open(self) -> Any:
        """A seekable file object, for indexing."""
        return fsspec.open(self.path, "rb").open() if self._fs else open(self.path, "rb")

    def read(self, offset: int, nbytes: int) -> bytes:
        """Exactly this range; shorter only if the file ends."""
        if self._fs:
            return self._fs.cat_file(self._remote_path, start=offset, end=offset + nbytes)
        return os.pread(self._fd, nbytes, offset)

    def __reduce__(self) -> Any:
        return (ByteSource, (self.path,))


@dataclass(frozen=True, slots=True)
class Member:
    """Where one file lies inside its archive."""

    offset: int  # zip: of the local header; tar: of the data
    nbytes: int  # as stored
    size: int  # unpacked
    method: int = zipfile.ZIP_STORED
    crc: int | None = None


@dataclass(frozen=True)
class Archive:
    """An indexed zip or tar."""

    source: ByteSource
    members: dict[str, Member]
    is_zip: bool

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """One member's content; KeyError if it is absent, RejectError if it is too large or damaged."""
        member = self.members[name]
        if member.size > max_bytes:
            detail = f"{name!r} in {self.source.path}: {member.size:,} bytes; the limit is {max_bytes:,}"
            raise RejectError("image_too_large", detail)
        data = self._read_zip(member) if self.is_zip else self.source.read(member.offset, member.nbytes)
        if (
            data is None
            or len(data) != member.size
            or (member.crc is not None and zlib.crc32(data) != member.crc)
        ):
            detail = f"{name!r} in {self.source.path}: size or checksum is wrong; the archive is damaged"
            raise RejectError("image_corrupt", detail)
        return data

    def digest(self) -> str:
        """Hex hash of names, places and sizes, and for a zip of its members' checksums: of their content.

        A tar has no checksums, so a picture in it that was changed in place, at the same size, goes unseen.
        """
        digest = hashlib.blake2b(digest_size=16)
        for name, member in sorted(self.members.items()):
            digest.update(repr((name, astuple(member))).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def _read_zip(self, member: Member) -> bytes | None:
        head = self.source.read(member.offset, _ZIP_LOCAL_HEADER)
        if len(head) < _ZIP_LOCAL_HEADER or head[:4] != b"PK\x03\x04":
            return None
        start = member.offset + _ZIP_LOCAL_HEADER + sum(struct.unpack("<HH", head[26:30]))
        data = self.source.read(start, member.nbytes)
        if member.method == zipfile.ZIP_STORED:
            return data
        try:
            return zlib.decompressobj(-15).decompress(data, member.size + 1)  # a zip bomb stops here
        except zlib.error:
            return None


def is_archive(path: str) -> bool:
    """Whether an image root is an archive, by its name."""
    return path.lower().endswith((".zip", ".tar"))


def open_archive(path: str) -> Archive:
    """Open and index; UserError if it cannot be read."""
    try:
        source = ByteSource(path)
        is_zip = path.lower().endswith(".zip")
        with source.open() as file:
            return Archive(source, _zip_members(file, path) if is_zip else _tar_members(file), is_zip)
    except (OSError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise UserError(f"--image-root {path}: cannot be read as an archive: {error}") from None


def _zip_members(file: BinaryIO, path: str) -> dict[str, Member]:
    members = {}
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if info.is_dir():
                continue
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
                raise UserError(
                    f"--image-root {path}: member {info.filename!r} is encrypted or packed by method "
                    f"{info.compress_type}; repack it with plain zip (stored or deflated)"
                )
            members[_clean(info.filename)] = Member(
                info.header_offset, info.compress_size, info.file_size, info.compress_type, info.CRC
            )
    return members


def _tar_members(file: BinaryIO) -> dict[str, Member]:
    members = {}
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for info in archive:
            name = _clean(info.name)
            if info.isreg() and not info.issparse():
                members[name] = Member(info.offset_data, info.size, info.size)
            elif info.islnk() and _clean(info.linkname) in members:  # a second name of an earlier member
                members[name] = members[_clean(info.linkname)]
            # tarfile keeps every header it has seen: a gigabyte per million members. typeshed lacks the list.
            archive.members.clear()  # type: ignore[attr-defined]
    return members


def _clean(name: str) -> str:
    """``./a/b.jpg`` -> ``a/b.jpg``."""
    return name.removeprefix("./").lstrip("/")
