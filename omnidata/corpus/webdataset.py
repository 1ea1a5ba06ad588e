"""WebDataset tars: members that share a key are one record, a ``.json`` and its pictures.

    0001.json   {"conversations": [...]} or any other record of this project
    0001.jpg    its picture; several are taken in the tar's order (0001.0.jpg, 0001.1.jpg)

Pictures in the tar replace what the JSON says under ``image`` / ``images``; where that names the members, its
order counts. Headers are read by the few lines below and not by ``tarfile``, which takes a corrupt header for
the end of the archive; here it is an error, as is an archive that lacks its end.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from omnidata.corpus.json_lines import parse
from omnidata.corpus.source import UNIT_BYTES, UNIT_RECORDS, SourceFile, Unit
from omnidata.corpus.streams import open_at, skip
from omnidata.schema import Record, Reject, UserError

FORMATS = ("webdataset",)
BLOCK = tarfile.BLOCKSIZE
PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL = tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, b"x", b"g"


@dataclass(frozen=True, slots=True)
class _Member:
    name: str
    start: int  # of its first header, in the uncompressed archive
    data: int  # of its content
    size: int

    @property
    def stop(self) -> int:
        return self.data + -(-self.size // BLOCK) * BLOCK

    @property
    def key(self) -> str:
        """``a/b.0.jpg`` -> ``a/b``: webdataset's rule."""
        path = PurePosixPath(self.name)
        return str(path.parent / path.name.split(".", 1)[0])

    @property
    def extension(self) -> str:
        return self.name.rpartition(".")[2].lower()


def sniff(name: str, head: bytes) -> bool:
    """The magic bytes in the first header."""
    return head[257:262] == b"ustar"


def scan(file: SourceFile) -> Iterator[Unit]:
    """Cost: the headers; in a compressed archive, decompressing it."""
    start = stop = first = records = 0
    with open_at(file) as stream:
        for _, members in groupby(_members(stream, file), key=lambda member: member.key):
            for member in members:
                stop = member.stop
            records += 1
            if records == UNIT_RECORDS or stop - start >= UNIT_BYTES:
                yield Unit(start, stop, first, records)
                start, first, records = stop, first + records, 0
    if records:
        yield Unit(start, stop, first, records)


def read(file: SourceFile, unit: Unit) -> Iterator[Record | Reject]:
    """The records of a unit."""
    with open_at(file, unit.start) as stream:
        contents: dict[str, bytes] = {}
        key = None
        for member in _members(stream, file, unit):
            if member.key != key and contents:
                yield _record(file, contents)
                contents = {}
            key = member.key
            contents[member.name] = _content(stream, member.size, file)
        yield _record(file, contents)


# --- one record -------------------------------------------------------------------------------------------


def _record(file: SourceFile, contents: dict[str, bytes]) -> Record | Reject:
    texts = [name for name in contents if name.lower().endswith(".json")]
    locator = f"member {texts[0] if texts else next(iter(contents))}"
    if len(texts) != 1:
        detail = f"{len(texts)} .json members among {', '.join(contents)}; exactly one holds the conversation"
        return Reject(file.source, locator, f"{file.source}#{locator}", "bad_record", detail)
    record = parse(file, locator, contents[texts[0]])
    pictures = {name: data for name, data in contents.items() if _extension(name) in PICTURES}
    if isinstance(record, Reject) or not pictures:
        return record
    return replace(record, payload=_with_pictures(record.payload, pictures))


def _with_pictures(payload: dict[str, Any], pictures: dict[str, bytes]) -> dict[str, Any]:
    """The members' bytes in place of the names that the JSON gives."""
    named = payload.get("images") or payload.get("image")
    rest = {key: value for key, value in payload.items() if key not in ("image", "images")}
    if isinstance(named, dict):  # MiniCPM-V's {"<image_00>": name}
        found = {placeholder: _find(name, pictures) for placeholder, name in named.items()}
        return rest | {"images": found} if all(found.values()) else rest | {"images": list(pictures.values())}
    names = named if isinstance(named, list) else [named]
    found = [_find(name, pictures) for name in names]
    return rest | {"images": found if all(found) else list(pictures.values())}


def _find(name: Any, pictures: dict[str, bytes]) -> bytes | None:
    if not isinstance(name, str):
        return None
    exact = pictures.get(name)
    return exact if exact is not None else pictures.get(_only(name, pictures))


def _only(name: str, pictures: dict[str, bytes]) -> str:
    """The one member whose file name is that of ``name``, or else ""."""
    same = [member for member in pictures if PurePosixPath(member).name == PurePosixPath(name).name]
    return same[0] if len(same) == 1 else ""


def _extension(name: str) -> str:
    return name.rpartition(".")[2].lower()


# --- headers ----------------------------------------------------------------------------------------------


def _members(stream: BinaryIO, file: SourceFile, unit: Unit | None = None) -> Iterator[_Member]:
    """The files of the archive (or of a unit of it); the caller may read the content of each it gets."""
    position, name, start = (unit.start if unit else 0), None, None
    while unit is None or position < unit.stop:
        skip(stream, position - stream.tell())
        header = stream.read(BLOCK)
        if header == bytes(BLOCK):
            return _check_end(stream, file)
        info = _parse(header, position, file)
        member = _Member(name or info.name, position if start is None else start, position + BLOCK, info.size)
        if info.type in (_LONG_NAME, _PAX):
            name = _long_name(info.type, _content(stream, info.size, file)) or name
            start = member.start
        elif info.type not in (_LONG_LINK, _PAX_GLOBAL):
            if info.isfile():
                yield member
            name = start = None
        position = member.stop
    if stream.tell() < position:  # the content of the last one, if nobody read it
        skip(stream, position - stream.tell())


def _parse(header: bytes, position: int, file: SourceFile) -> tarfile.TarInfo:
    if len(header) < BLOCK:
        raise UserError(f"source {file.source}: the archive is cut off before byte {position + BLOCK}")
    try:
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise UserError(f"source {file.source}: corrupt tar header at byte {position} ({error})") from error


def _content(stream: BinaryIO, size: int, file: SourceFile) -> bytes:
    content = stream.read(size)
    if len(content) < size:
        raise UserError(f"source {file.source}: the archive is cut off in a member of {size} bytes")
    return content


def _long_name(kind: bytes, content: bytes) -> str | None:
    """The name in an extended header: GNU's is the content itself, PAX has ``NN path=name`` lines."""
    if kind == _LONG_NAME:
        return content.rstrip(b"\0").decode("utf-8", "surrogateescape")
    while content:
        length = int(content.split(b" ", 1)[0])
        key, _, value = content[:length].split(b" ", 1)[1].rstrip(b"\n").partition(b"=")
        if key == b"path":
            return value.decode("utf-8", "surrogateescape")
        content = content[length:]
    return None


def _check_end(stream: BinaryIO, file: SourceFile) -> None:
    """Two blocks of zeros end an archive, and only zeros may follow."""
    rest = stream.read(BLOCK)
    if len(rest) < BLOCK:
        raise UserError(f"source {file.source}: the archive is cut off in its end mark")
    while rest:
        if rest.strip(b"\0"):
            raise UserError(
                f"source {file.source}: more data after the end of the archive; one tar a file, please"
            )
        rest = stream.read(1 << 20)
