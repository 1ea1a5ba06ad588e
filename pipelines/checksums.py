"""The checksums of a checkpoint: each rank's of what it writes, rank 0's of the rest, one marker over all.

    __1_0.distcp              rank 1 writes it, and hashes what goes into it on the way
    __1_0.distcp.sha256       its sum; gone once rank 0 has taken it into …
    sha256sums, COMPLETE      … the list of all, and the sum of that list

So nobody reads a file again to hash it, and a bit that a disk or a network flips after the write is found.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem

from omnidata.durable import sync

SUMS, COMPLETE = "sha256sums", "COMPLETE"
_DATA, _OWN_SUM = ".distcp", ".sha256"


class CheckpointWriter(dcp.FileSystemWriter):
    """``dcp.FileSystemWriter`` that leaves the sum of every file of tensors beside it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.fs = _HashingFiles()


class _HashingFiles(FileSystem):
    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        with super().create_stream(path, mode) as file, ThreadPoolExecutor(1) as pool:
            hashed = _HashedFile(file, pool)
            yield cast(io.IOBase, hashed)
        path = Path(path)
        if path.suffix == _DATA:  # the table of contents is rank 0's
            line = f"{hashed.digest.hexdigest()}  {path.name}\n"
            path.with_name(path.name + _OWN_SUM).write_text(line)


class _HashedFile:
    """A file that is only appended to, and hashed while it is written."""

    def __init__(self, file: io.IOBase, pool: ThreadPoolExecutor) -> None:
        self.digest, self._pool = hashlib.sha256(), pool
        self._file: Any = file
        self.tell, self.flush, self.fileno, self.close = file.tell, file.flush, file.fileno, file.close

    def write(self, data: Any) -> int:
        hashing = self._pool.submit(self.digest.update, data)
        written = self._file.write(data)
        hashing.result()
        return written


def complete(folder: Path) -> None:
    """Write the checksums of all files, make everything durable, then write the completion marker.

    Files that a CheckpointWriter wrote are neither read nor synced again: their writers did so.
    """
    sums: dict[str, str] = {}
    for own in sorted(folder.glob(f"*{_OWN_SUM}")):
        digest, name = own.read_text().split()
        sums[name] = digest
        own.unlink()
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    rest = {name: path for name, path in files.items() if name not in sums}
    sums |= zip(rest, _sha256s(rest.values()), strict=True)
    text = "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))
    (folder / SUMS).write_text(text)
    for path in (*rest.values(), folder / SUMS):
        sync(path)
    (folder / COMPLETE).write_text(hashlib.sha256(text.encode()).hexdigest() + "\n")
    sync(folder / COMPLETE)
    sync(folder)


def verify(folder: Path) -> str | None:
    """None if ``folder`` is complete and undamaged, else what is wrong with it."""
    try:
        sums = (folder / SUMS).read_bytes()
        marker = (folder / COMPLETE).read_bytes().strip()
    except OSError as error:  # also a folder in its place, or no permission
        return f"{Path(error.filename).name} cannot be read ({error.strerror})"
    if hashlib.sha256(sums).hexdigest().encode() != marker:
        return f"{SUMS} does not match {COMPLETE}"
    lines = [line.split("  ", 1) for line in sums.decode().splitlines()]
    expected = {name: digest for digest, name in lines}
    missing = [name for name in expected if not (folder / name).is_file()]
    if missing:
        return f"{missing[0]} is missing"
    for digest, name in zip(_sha256s(folder / name for name in expected), expected, strict=True):
        if digest != expected[name]:
            return f"{name} does not have its checksum"
    return None


def _sha256s(paths: Iterable[Path]) -> list[str]:
    def one(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(8) as pool:  # hashing releases the interpreter lock
        return list(pool.map(one, paths))
