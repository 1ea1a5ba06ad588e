"""Durable files: whatever this module writes is there whole, or not at all, whenever the power goes.

A local file takes four steps, and a crash between any two of them leaves the final name untouched::

    open   .build/tmp/shards_train-00007.tar.4711-9f2c    a name that nobody else uses
    sync   its bytes reach the disk
    rename it gets its final name, at once
    settle the folder's new entry reaches the disk

A file of a remote store is spooled to local disk and put in one call, which object stores make visible at
once. The build writes everything through ``Store``, so that a test can stop it at every one of the steps
(``on_step``) and look at what is left.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from omnidata.files import check_regular
from omnidata.schema import UserError

SCRATCH = ".build"  # the builder's own folder inside a dataset; gone when the dataset is complete
TEMP = f"{SCRATCH}/tmp"
PARTS = f"{SCRATCH}/parts"  # of the index and the rejects, one per shard
BUFFER = 1 << 20
_STREAM = 8 << 20  # bytes after which the disk is told to write
# A full disk, a quota, a limit on file size, a read-only or forbidden folder: trying again cannot help.
HOPELESS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)

on_step: Callable[[str, str], None] | None = None  # called as (step, path) before each step; for tests


def _step(name: str, path: str) -> None:
    if on_step is not None:
        on_step(name, path)


class Store:
    """A local folder, or any fsspec URL, that files are written to durably.

    Args:
        url: ``data/mix``, ``s3://bucket/mix``, ``memory://mix`` …

    Every path below is relative to it and uses forward slashes.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        import fsspec
        from fsspec.implementations.local import LocalFileSystem

        self.url = os.fspath(url).rstrip("/") or "/"
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise UserError(f"cannot open {self.url}: {error}") from error
        self.is_local = isinstance(self._fs, LocalFileSystem)
        # What one process writes to memory:// no other process can see.
        self.is_private = "memory" in _protocols(self._fs)

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def full(self, path: str) -> str:
        """The path as the file system underneath takes it."""
        return f"{self._root}/{path}" if path else self._root

    # --- writing ------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def write(self, path: str) -> Iterator[BinaryIO]:
        """A binary file that appears under ``path`` when the block ends, and not at all if it raises."""
        with (self._write_local if self.is_local else self._write_remote)(path) as file:
            yield file

    @contextlib.contextmanager
    def _write_local(self, path: str) -> Iterator[BinaryIO]:
        final = Path(self.full(path))
        temporary = Path(self.full(f"{TEMP}/{temp_name(path)}"))
        make_folder(temporary.parent)
        make_folder(final.parent)
        _step("open", path)
        try:
            with io.BufferedWriter(_Streamed(temporary, "xb"), BUFFER) as file:
                yield file
                _step("sync", path)
                file.flush()
                os.fsync(file.fileno())
            _step("rename", path)
            os.replace(temporary, final)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _step("settle", path)
        sync(final.parent)

    @contextlib.contextmanager
    def _write_remote(self, path: str) -> Iterator[BinaryIO]:
        with tempfile.TemporaryDirectory(prefix="omnidata-") as folder:
            spool = os.path.join(folder, "spool")
            _step("open", path)
            with open(spool, "xb", buffering=BUFFER) as file:
                yield file
            _step("put", path)
            self._fs.put_file(spool, self.full(path))
            written, size = os.path.getsize(spool), self.size(path)
            if written != size:
                raise OSError(errno.EIO, f"{written} bytes were put but {size} arrived", self.full(path))

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write a whole small file."""
        with self.write(path) as file:
            file.write(data)

    def write_folder(self, path: str, folder: str) -> None:
        """Write each file of a local folder under ``path``."""
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                self.write_bytes(f"{path}/{file.relative_to(folder).as_posix()}", file.read_bytes())

    # --- reading ------------------------------------------------------------------------------------------

    def open(self, path: str) -> BinaryIO:
        """The file, opened for reading with seeks."""
        self._check_regular(path)
        return self._fs.open(self.full(path), "rb")

    def read_bytes(self, path: str) -> bytes:
        """A whole small file."""
        self._check_regular(path)
        return self._fs.cat_file(self.full(path))

    def _check_regular(self, path: str) -> None:
        if self.is_local:
            check_regular(self.full(path))

    def size(self, path: str) -> int | None:
        """Bytes of the file, or None if there is none."""
        try:
            return self._fs.info(self.full(path))["size"]
        except FileNotFoundError:
            return None

    def exists(self, path: str) -> bool:
        """Whether a file (or, locally, a folder) of that name is there."""
        return self._fs.exists(self.full(path))

    def names(self, path: str = "") -> list[str]:
        """Names right under a folder, sorted; none if it does not exist."""
        self._fs.invalidate_cache()  # another builder may have added some
        try:
            entries = self._fs.ls(self.full(path), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted({entry.rstrip("/").rpartition("/")[2] for entry in entries} - {""})

    def local_copy(self, path: str) -> str:
        """The folder ``path`` as a local folder: itself, or a copy in the temporary directory."""
        if self.is_local:
            return self.full(path)
        folder = tempfile.mkdtemp(prefix="omnidata-")
        for entry in self._fs.find(self.full(path)):
            target = Path(folder, entry.rpartition(f"{self.full(path).lstrip('/')}/")[2])
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(self._fs.cat_file(entry))
        return folder

    # --- removing -----------------------------------------------------------------------------------------

    def remove(self, path: str) -> None:
        """Remove a file or a folder with all that is in it, for good; fine if it is not there."""
        _step("remove", path)
        if not self._fs.exists(self.full(path)):
            return
        if self.is_local and os.path.isdir(self.full(path)):
            shutil.rmtree(self.full(path), ignore_errors=False)
        else:
            self._fs.rm(self.full(path), recursive=True)
        if self.is_local:  # what comes back after a power cut would vouch for files that are written next
            sync(Path(self.full(path)).parent)

    def remove_temps(self, path: str) -> None:
        """Remove what writers of ``path`` left behind when they were killed."""
        if self.is_local:
            for file in Path(self.full(TEMP)).glob(f"{temp_stem(path)}.*"):
                file.unlink(missing_ok=True)


def temp_stem(path: str) -> str:
    """The part of a temporary name that tells whose it is: ``shards/a.tar`` -> ``shards_a.tar``."""
    return path.replace("/", "_")


def temp_name(path: str) -> str:
    """A temporary name for ``path`` that no other writer will ever use."""
    return f"{temp_stem(path)}.{os.getpid()}-{secrets.token_hex(4)}"


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


class _Streamed(io.FileIO):
    """Has the disk write what is written while more is made, so that the sync at the end finds little to do.

    Half a gigabyte that waits in memory for its sync keeps a worker idle for as long as the disk takes.
    """

    _waiting = 0

    def write(self, data: Any) -> int:
        written = super().write(data)
        self._waiting += written
        if self._waiting >= _STREAM and hasattr(os, "posix_fadvise"):
            # Starts writing this range; pages that are not on the disk yet stay in memory.
            os.posix_fadvise(
                self.fileno(), self.tell() - self._waiting, self._waiting, os.POSIX_FADV_DONTNEED
            )
            self._waiting = 0
        return written


def sync(path: Path) -> None:
    """Make a local file's bytes, or a folder's names, outlast a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, whose names outlast a power cut; fine if it is there."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    # A folder may be written to and not be read: then its file system must do without being asked.
    with contextlib.suppress(PermissionError):
        sync(path.parent)
