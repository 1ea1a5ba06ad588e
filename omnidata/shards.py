"""Shards: ``write_shard`` and ``read_sample``, the two ends of the same bytes, side by side.

A shard is a plain USTAR tar. Everything in a header that could differ between two builds (time, owner,
mode) is fixed, so a shard's bytes are a function of its samples alone::

    [header][KEY.input_ids.npy, padded][header][KEY.labels.npy …][header][KEY.json …][header][KEY.jpg …]
    ^ offset of the sample                                                              offset + nbytes ^

``write_shard`` returns the (offset, nbytes) of each sample; ``read_sample`` takes exactly those bytes.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import BinaryIO, Protocol

import numpy as np
import xxhash

from omnidata.schema import (
    DIALOGUE,
    IMAGE_EXTENSIONS,
    INPUT_IDS,
    KEY_PATTERN,
    LABELS,
    MAX_MEMBER_NAME,
    Sample,
    image_member,
)

BLOCK = tarfile.BLOCKSIZE
_ZEROS = bytes(tarfile.RECORDSIZE)
_MAX_SIZE = 8**11 - 1  # what eleven octal digits hold


class CorruptSampleError(ValueError):
    """The bytes are not one whole sample of this schema."""


# --- writing ----------------------------------------------------------------------------------------------


def _header_template() -> bytes:
    """A USTAR header by the standard library for an empty name and size, everything else as we fix it."""
    info = tarfile.TarInfo("")
    info.mode, info.uid, info.gid, info.uname, info.gname, info.mtime = 0o644, 0, 0, "", "", 0
    return info.tobuf(format=tarfile.USTAR_FORMAT)


_TEMPLATE = _header_template()
# The checksum counts its own field as eight blanks (POSIX.1-1988, ustar).
_TEMPLATE_SUM = sum(_TEMPLATE[:124]) + sum(_TEMPLATE[136:148]) + 8 * 0x20 + sum(_TEMPLATE[156:])


def tar_header(name: str, size: int) -> bytes:
    """The 512-byte header of a regular file; equals ``TarInfo.tobuf(USTAR_FORMAT)``, several times faster.

    Raises:
        ValueError: the name is not ASCII, or over 100 bytes, or the size over 8 GiB - 1.
    """
    encoded = name.encode("ascii")
    if not 0 < len(encoded) <= MAX_MEMBER_NAME or size > _MAX_SIZE:
        raise ValueError(f"member {name!r} of {size} bytes does not fit a plain USTAR header")
    octal = b"%011o\0" % size
    checksum = _TEMPLATE_SUM + sum(encoded) + sum(octal)
    return b"".join(
        (
            encoded.ljust(MAX_MEMBER_NAME, b"\0"),
            _TEMPLATE[100:124],
            octal,
            _TEMPLATE[136:148],
            b"%06o\0 " % checksum,
            _TEMPLATE[156:],
        )
    )


def prefix_names(members: memoryview, prefix: str) -> None:
    """Put ``prefix`` before the name in each header of whole members, in place; their contents stay.

    The headers must be this module's (``read_sample`` proves it) and their names short enough.
    """
    before, at = prefix.encode("ascii"), 0
    end, total = MAX_MEMBER_NAME - len(before), sum(before)
    while at < len(members):
        header = bytes(members[at : at + BLOCK])
        assert not header[end:MAX_MEMBER_NAME].strip(b"\0"), header[:MAX_MEMBER_NAME]
        checksum = b"%06o\0 " % (int(header[148:154], 8) + total)
        members[at : at + BLOCK] = b"".join((before, header[:end], header[100:148], checksum, header[156:]))
        size = int(header[124:135], 8)
        at += BLOCK + size + -size % BLOCK


_NPY_HEADER = 128  # bytes; numpy pads a vector's header to this
_NPY_MAGIC = b"\x93NUMPY\x01\x00" + (_NPY_HEADER - 10).to_bytes(2, "little")


def npy_bytes(array: np.ndarray) -> bytes:
    """An int32 vector as the bytes of a ``.npy`` file (format 1.0).

    Example: three ids become a 128-byte header and 12 bytes of data.
    """
    # what np.lib.format.write_array writes, in a fifth of its time
    header = b"{'descr': '<i4', 'fortran_order': False, 'shape': (%d,), }" % len(array)
    return _NPY_MAGIC + header.ljust(_NPY_HEADER - 11) + b"\n" + np.ascontiguousarray(array, "<i4").tobytes()


def array_bytes(length: int) -> int:
    """Bytes that a member of ``length`` ids or labels takes in a shard, header and padding included."""
    size = _NPY_HEADER + 4 * length
    return BLOCK + size + -size % BLOCK


def sample_members(sample: Sample) -> Iterator[tuple[str, bytes]]:
    """The (member name, content) pairs of a sample in the order in which they are written.

    Raises:
        ValueError: a key, an image extension, or the array shapes break the contract.
    """
    if not KEY_PATTERN.fullmatch(sample.key):
        raise ValueError(f"key {sample.key!r} has characters outside [A-Za-z0-9_-]")
    if len(sample.input_ids) != len(sample.labels):
        raise ValueError(f"{sample.key}: {len(sample.input_ids)} input_ids but {len(sample.labels)} labels")
    yield f"{sample.key}.{INPUT_IDS}", npy_bytes(sample.input_ids)
    yield f"{sample.key}.{LABELS}", npy_bytes(sample.labels)
    if sample.dialogue:
        yield f"{sample.key}.{DIALOGUE}", sample.dialogue
    for position, (data, extension) in enumerate(zip(sample.images, sample.image_extensions, strict=True)):
        if extension not in IMAGE_EXTENSIONS:
            raise ValueError(f"{sample.key}: image extension {extension!r} is not one of {IMAGE_EXTENSIONS}")
        yield f"{sample.key}.{image_member(position, extension)}", data


def write_shard(file: Writable, samples: Iterable[Sample]) -> list[tuple[int, int]]:
    """Write a whole shard; return each sample's (offset, nbytes).

    The archive ends as ``tarfile`` ends it: two zero blocks, padded to 10,240 bytes.
    """
    spans = write_samples(file, samples)
    end_archive(file, sum(spans[-1]) if spans else 0)
    return spans


def write_samples(file: Writable, samples: Iterable[Sample], *, start: int = 0) -> list[tuple[int, int]]:
    """Write samples to an archive that has ``start`` bytes; return each one's (offset, nbytes)."""
    spans: list[tuple[int, int]] = []
    position = start
    for sample in samples:
        first = position
        for name, content in sample_members(sample):
            padding = -len(content) % BLOCK
            file.write(tar_header(name, len(content)))
            file.write(content)
            file.write(_ZEROS[:padding])
            position += BLOCK + len(content) + padding
        spans.append((first, position - first))
    return spans


def end_archive(file: Writable, position: int) -> None:
    """Write what ends an archive whose members take ``position`` bytes."""
    file.write(_ZEROS[: 2 * BLOCK])
    file.write(_ZEROS[: -(position + 2 * BLOCK) % tarfile.RECORDSIZE])


class Writable(Protocol):
    """A file, as far as shards are written to it."""

    def write(self, data: bytes, /) -> int:
        """As a file's."""
        ...


class HashedFile:
    """Passes writes on; keeps their number of bytes and sha256."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.num_bytes = 0
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes | memoryview, /) -> int:
        """As a file's."""
        self.sha256.update(data)
        self.num_bytes += len(data)
        return self._file.write(data)


# --- reading ----------------------------------------------------------------------------------------------

# How write_array begins an int32 vector short enough for a 128-byte header: parsed without ``ast``.
_NPY_PREFIX = npy_bytes(np.zeros(0, np.int32))[:10] + b"{'descr': '<i4', 'fortran_order': False, 'shape': ("


def read_npy(raw: bytes | memoryview) -> np.ndarray:
    """An int32 ``[L]`` view (no copy) of ``.npy`` bytes. Raises CorruptSampleError for anything else."""
    prefix = bytes(raw[: len(_NPY_PREFIX)])
    if prefix == _NPY_PREFIX:
        length, _, rest = bytes(raw[len(_NPY_PREFIX) : _NPY_HEADER]).partition(b",")
        if length.isdigit() and rest.startswith(b")") and len(raw) == _NPY_HEADER + 4 * int(length):
            return np.frombuffer(raw, dtype="<i4", offset=_NPY_HEADER)
    raise CorruptSampleError(f"not an int32 vector in .npy format ({len(raw)} bytes)")


def parse_header(header: bytes, *, position: int) -> tuple[str, int]:
    """The (name, content size) in a member's header; ``position`` is for the message.

    Raises:
        CorruptSampleError: the header is not what ``write_shard`` writes.
    """
    name = header[:MAX_MEMBER_NAME].rstrip(b"\0")
    try:  # our headers have no freedom beyond name and size, so equality proves every byte of them
        size = int(header[124:135], 8)
        intact = header == tar_header(name.decode("ascii"), size)
    except ValueError:
        intact = False
    if not intact:
        raise CorruptSampleError(f"no header of this schema at byte {position} (it begins {name[:40]!r})")
    return name.decode("ascii"), size


def iter_members(raw: bytes | memoryview, *, start: int = 0) -> Iterator[tuple[str, int, int]]:
    """The (name, content offset, content size) of each member until a zero block or the end of ``raw``.

    Raises:
        CorruptSampleError: a header is not what ``write_shard`` writes, or a member is cut short.
    """
    view = memoryview(raw)
    position = start
    while position < len(view):
        header = bytes(view[position : position + BLOCK])
        if not header.strip(b"\0"):
            return
        name, size = parse_header(header, position=position)
        content = position + BLOCK
        position = content + size + -size % BLOCK
        if position > len(view):
            raise CorruptSampleError(f"member {name!r} at byte {content - BLOCK} is cut short")
        yield name, content, size


def read_sample(raw: bytes | memoryview) -> Sample:
    """Parse one sample from exactly its byte range in a shard.

    Returns:
        A Sample whose arrays are read-only views of ``raw``.

    Raises:
        CorruptSampleError: what is there is not one whole sample (says which member).
    """
    view = memoryview(raw)
    members = [(name, view[at : at + size]) for name, at, size in iter_members(view)]
    if len(members) < 2:
        raise CorruptSampleError(f"{len(members)} members where a sample has at least two")
    key = members[0][0].partition(".")[0]
    if [name for name, _ in members[:2]] != [f"{key}.{INPUT_IDS}", f"{key}.{LABELS}"]:
        raise CorruptSampleError(f"sample {key!r} begins with {[name for name, _ in members[:2]]}")
    extensions, dialogue, images = [], b"", members[2:]
    if images and images[0][0] == f"{key}.{DIALOGUE}":
        dialogue, images = bytes(images[0][1]), images[1:]
    for position, (name, _) in enumerate(images):
        extension = name.rpartition(".")[2]
        if name != f"{key}.{image_member(position, extension)}" or extension not in IMAGE_EXTENSIONS:
            raise CorruptSampleError(f"sample {key!r}: unexpected member {name!r} at image {position}")
        extensions.append(extension)
    return Sample(
        key=key,
        input_ids=read_npy(members[0][1]),
        labels=read_npy(members[1][1]),
        images=tuple(bytes(content) for _, content in images),
        image_extensions=tuple(extensions),
        dialogue=dialogue,
    )


def content_hash(sample: Sample) -> str:
    """xxh3-128, in hex, of a sample's ids, labels and images, each after its length.

    It tells damage and repeats apart, thirty times as fast as sha256. It is no proof against forgery: the
    manifest's sha256 of each shard is. ``KEY.json`` is not in it (``dialogue_hash`` is its own): two samples
    that teach the same are repeats whatever their ids and kept columns say, and training never reads it.
    """
    digest = xxhash.xxh3_128()
    arrays = (np.ascontiguousarray(array, "<i4").data for array in (sample.input_ids, sample.labels))
    for content in (*arrays, *(memoryview(image) for image in sample.images)):
        digest.update(content.nbytes.to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def dialogue_hash(dialogue: bytes) -> str:
    """xxh3-64, in hex, of a ``KEY.json``; "" if there is none."""
    return xxhash.xxh3_64_hexdigest(dialogue) if dialogue else ""


def with_images(sample: Sample, stored: Sample, num_images: int) -> Sample:
    """A view's sample, with the first images and the conversation of its base's, ``stored``."""
    images, extensions = stored.images[:num_images], stored.image_extensions[:num_images]
    return replace(sample, images=images, image_extensions=extensions, dialogue=stored.dialogue)
