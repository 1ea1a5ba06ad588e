"""WebDataset tars: members that share a key are one record, a ``.json`` and its pictures.

    0001.json   {"conversations": [...]} or any other record of this project
    0001.jpg    its picture; several (0001.0.jpg, 0001.1.jpg) in the natural order of their names
    0001.txt    instead of a .json: a caption, for --caption-prompt

Pictures in the tar replace what the JSON says under ``image`` / ``images``; if that names the members, its
order counts. A picture is known by its first bytes or, if those tell nothing, by a name of media. The same
key twice in a row is two records. Headers are read by the few lines below and not by ``tarfile``, which takes
a corrupt header for the end of the archive; here it is an error, as is an archive that lacks its end.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from omnidata.corpus.json_lines import parse
from omnidata.corpus.keys import is_empty
from omnidata.corpus.source import UNIT_BYTES, UNIT_RECORDS, SourceFile, Unit
from omnidata.corpus.streams import open_at, skip
from omnidata.images.header import sniff as sniff_image
from omnidata.schema import Record, Reject, RejectError, UserError

FORMATS = ("webdataset",)
BLOCK = tarfile.BLOCKSIZE
PICTURES = frozenset(  # by name, also such as no build takes: those are rejects and never left out
    (
        *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff"),
        *("avif", "heic", "heif", "jp2", "jxl", "ppm", "pgm", "svg", "ico"),
    )
)
_TEXTS = frozenset(("json", "txt", "caption"))
_SMALL_TEXT = 64 << 10  # bytes of another member that are looked at as text
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
        for members in _samples(_members(stream, file)):
            stop = members[-1].stop
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
            if contents and (member.key != key or member.name in contents):
                yield _record(file, contents)
                contents = {}
            key = member.key
            contents[member.name] = _content(stream, member.size, file)
        yield _record(file, contents)


def _samples(members: Iterator[_Member]) -> Iterator[list[_Member]]:
    """Members of one key each; a name that comes again begins the next sample, as in ``read``."""
    sample: list[_Member] = []
    for member in members:
        if sample and (member.key != sample[0].key or member.name in {other.name for other in sample}):
            yield sample
            sample = []
        sample.append(member)
    if sample:
        yield sample


# --- one record -------------------------------------------------------------------------------------------


def _record(file: SourceFile, contents: dict[str, bytes]) -> Record | Reject:
    texts = [name for name in contents if _extension(name) == "json"]
    captions = [name for name in contents if _extension(name) in ("txt", "caption")]
    locator = f"member {(texts or captions or list(contents))[0]}"

    def refused(reason: str, detail: str) -> Reject:
        return Reject(file.source, locator, file.place(locator), reason, detail)

    if len(texts) > 1 or not (texts or captions):
        detail = f"{len(texts)} .json members among {', '.join(contents)}; exactly one holds the conversation"
        return refused("bad_record", detail)
    record = parse(file, locator, contents[texts[0]]) if texts else file.record(locator, {})
    if isinstance(record, Reject):
        return record
    payload, read = record.payload, captions[:1]
    if captions and not any(payload.get(key) is not None for key in _CONVERSATIONS):
        try:
            payload = payload | {"caption": contents[captions[0]].decode("utf-8").strip()}
        except UnicodeDecodeError as error:
            return refused("bad_content", f"{captions[0]} is no UTF-8: {error}")
    else:
        read = []
    pictures = {name: data for name, data in contents.items() if _is_picture(name, data)}
    rest = {name: data for name, data in contents.items() if name not in {*texts, *pictures, *read}}
    try:
        payload = _with_pictures(payload, pictures) if pictures else payload
    except RejectError as error:
        return refused(error.reason, error.detail)
    return replace(record, payload=payload | _others(rest))


_CONVERSATIONS = ("conversations", "messages", "conversation", "texts", "question", "instruction", "text")


def _others(rest: dict[str, bytes]) -> dict[str, object]:
    """Members that are neither the record nor pictures, as keys of it: small texts as text, else bytes."""
    others: dict[str, object] = {}
    for name, data in rest.items():
        try:
            is_text = len(data) < _SMALL_TEXT and b"\0" not in data
            others[f"member {_suffix(name)}"] = data.decode("utf-8") if is_text else data
        except UnicodeDecodeError:
            others[f"member {_suffix(name)}"] = data
    return others


def _is_picture(name: str, data: bytes) -> bool:
    return _extension(name) in PICTURES or (_extension(name) not in _TEXTS and sniff_image(data) is not None)


def _with_pictures(payload: dict[str, Any], pictures: dict[str, bytes]) -> dict[str, object]:
    """The members' bytes in place of the names that the JSON gives.

    Raises:
        RejectError: the JSON names other pictures than the members, so that it is not certain which is which.
    """
    named = payload.get("images") or payload.get("image")
    rest = {key: value for key, value in payload.items() if key not in ("image", "images")}
    in_order = [pictures[name] for name in sorted(pictures, key=natural)]
    if is_empty(named):
        return rest | {"images": in_order}
    names = list(named.values()) if isinstance(named, dict) else named if isinstance(named, list) else [named]
    if any(isinstance(name, bytes) for name in names) or (isinstance(named, dict) and "bytes" in named):
        raise RejectError("unread_media", "the JSON holds pictures of its own besides those of the tar")
    members = [_find(name, pictures) for name in names]
    found = [member for member in members if member]
    if len(found) == len(names) and len(set(found)) == len(found):
        if left := sorted(pictures.keys() - set(found)):
            raise RejectError("unread_media", f"the JSON names other pictures and not the member {left[0]}")
        values = [pictures[member] for member in found]
    elif not found and len(names) == len(pictures) and (len(names) == 1 or _are_numbered(pictures)):
        values = in_order  # named as they were before they came into the tar
    else:
        detail = f"the JSON names {_listed(names)}; the members are {_listed(sorted(pictures, key=natural))}"
        raise RejectError("placeholder_mismatch", f"{detail}: it is not certain which is which")
    return rest | {"images": dict(zip(named, values, strict=True)) if isinstance(named, dict) else values}


def _find(name: Any, pictures: dict[str, bytes]) -> str | None:
    """The one member that a name stands for: its whole name, its file name, or what follows its key."""
    if not isinstance(name, str):
        return None
    if name in pictures:
        return name
    last = PurePosixPath(name).name
    for same in (
        [member for member in pictures if PurePosixPath(member).name == last],
        [member for member in pictures if _suffix(member) == last],
    ):
        if len(same) == 1:
            return same[0]
    return None


def _are_numbered(pictures: dict[str, bytes]) -> bool:
    """Do all members but at most the first carry a number, as 0001.jpg, 0001.1.jpg, 0001.2.jpg?"""
    numbered = [
        bool(re.search(r"\d", _suffix(name).rpartition(".")[0])) for name in sorted(pictures, key=natural)
    ]
    return all(numbered[1:])


def _listed(names: list[Any]) -> str:
    return ", ".join(str(name)[:80] for name in names[:5]) + (", …" if len(names) > 5 else "")


def natural(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts numbers by value: 0001.2.png comes before 0001.10.png, 0001.png before both."""
    stem = name.rpartition(".")[0]
    return [
        (0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", stem) if part
    ]


def _suffix(name: str) -> str:
    """What follows the key: ``a/0001.left.jpg`` -> ``left.jpg``."""
    return PurePosixPath(name).name.partition(".")[2]


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
