"""Cache: remote samples kept on a local disk, shared by the ranks and workers of a node, under a size cap.

    cache_dir/size             bytes accounted for; guarded by an exclusive lock on cache_dir/lock
    cache_dir/3f/3f9c...       one file per sample, named by the hash of where it came from

A file appears under its name only when it is whole. Bytes are accounted for before they are written, so a
killed process can only make the account too high; the next eviction counts anew and mends it. The least
recently used files go first.
"""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

_EVICT_TO = 0.9  # of the cap: one sweep makes room for many writes


class SampleCache:
    """A size-capped folder of byte strings. Safe to use from many processes at once."""

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int) -> None:
        self.folder, self.max_bytes = Path(folder), max_bytes
        self.folder.mkdir(parents=True, exist_ok=True)

    def _path(self, name: str) -> Path:
        digest = blake2b(name.encode(), digest_size=16).hexdigest()
        return self.folder / digest[:2] / digest

    def get(self, name: str) -> bytes | None:
        """What was put under ``name``, or None."""
        path = self._path(name)
        try:
            raw = path.read_bytes()
            os.utime(path)  # marks the use
        except FileNotFoundError:
            return None
        return raw

    def put(self, name: str, raw: bytes) -> None:
        """Keep ``raw``, making room for it; nothing is kept that is larger than the whole cache."""
        path = self._path(name)
        if len(raw) > self.max_bytes or path.exists():
            return
        with self._locked():
            size = self._size() + len(raw)
            if size > self.max_bytes:
                size = self._evict(int(self.max_bytes * _EVICT_TO) - len(raw)) + len(raw)
            (self.folder / "size").write_text(str(size))
            # Written under the lock: an eviction never counts a file that is about to appear.
            path.parent.mkdir(exist_ok=True)
            temporary = path.with_name(f".{uuid.uuid4().hex}")
            temporary.write_bytes(raw)
            temporary.replace(path)

    def discard(self, name: str) -> None:
        """Forget what turned out to be damaged."""
        self._path(name).unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _size(self) -> int:
        try:
            return int((self.folder / "size").read_text())
        except (FileNotFoundError, ValueError):  # the first put, or a process killed while writing it
            return self._evict(self.max_bytes)

    def _evict(self, keep_bytes: int) -> int:
        """Remove the least recently used files until ``keep_bytes`` are left; return the bytes left."""
        files = [(stat.st_mtime_ns, stat.st_size, path) for path, stat in self._files()]
        left = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if left <= keep_bytes:
                break
            path.unlink(missing_ok=True)
            left -= size
        return left

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self.folder.glob("??/*"):
            try:
                yield path, path.stat()
            except FileNotFoundError:  # discarded by another process meanwhile
                continue
