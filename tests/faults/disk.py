"""Disk: a shim under omnidata/durable.py that sees every operation, and knows what a power cut would leave.

    with Disk(hook) as disk:          hook("before" | "middle" | "after", operation, path) at each of them
        build(...)                    operations: write, fsync, rename, remove
    disk.survivors(target, choose)    a copy of the tree as it might be after a power cut at this moment

What is durable: a file's bytes at its last fsync; a folder's names at its last fsync. Of the rest the disk
may have kept anything, so a survivor takes for every name and every file the old or the new.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omnidata import durable

Hook = Callable[[str, str, str], None]
Key = tuple[int, int]  # device and inode


class _Changed:
    """A module with a few functions of ours."""

    def __init__(self, module: Any, **changed: Any) -> None:
        self._module = module
        self.__dict__.update(changed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class Disk:
    """A context in which durable.py writes through this shim."""

    def __init__(self, hook: Hook = lambda when, operation, path: None, *, root: Path | None = None) -> None:
        self._hook, self._root = hook, root
        self._bytes: dict[Key, bytes] = {}  # of a file, at its last fsync
        self._names: dict[Key, dict[str, tuple[Key, bool]]] = {}  # of a folder, at its last fsync
        self._held: list[int] = []  # descriptors, so that no inode is used again
        if root is not None:
            for path in (root, *root.rglob("*")):
                self._settle(os.open(path, os.O_RDONLY))

    def __enter__(self) -> Disk:
        self._before = durable.os, durable.shutil, durable._Streamed
        durable.os = _Changed(os, fsync=self._fsync, replace=self._replace)
        durable.shutil = _Changed(shutil, rmtree=self._rmtree)
        durable._Streamed = self._streamed(durable._Streamed)
        return self

    def __exit__(self, *_: object) -> None:
        durable.os, durable.shutil, durable._Streamed = self._before

    # --- operations ---------------------------------------------------------------------------------------

    def _streamed(self, base: type) -> type:
        hook = self._hook

        class Streamed(base):
            def write(self, data: Any) -> int:
                hook("before", "write", str(self.name))
                data = memoryview(data)
                half = super().write(data[: len(data) // 2])
                hook("middle", "write", str(self.name))
                half += super().write(data[half:])
                hook("after", "write", str(self.name))
                return half

        return Streamed

    def _fsync(self, descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        self._hook("before", "fsync", name)
        if self._root is not None:
            self._settle(os.dup(descriptor))
        self._hook("after", "fsync", name)

    def _replace(self, source: Any, target: Any) -> None:
        self._hook("before", "rename", str(target))
        os.replace(source, target)
        self._hook("after", "rename", str(target))

    def _rmtree(self, path: Any, **_: Any) -> None:
        self._hook("before", "remove", str(path))
        files = sorted(file for file in Path(path).rglob("*") if file.is_file())
        for file in files[: len(files) // 2]:
            file.unlink()
        self._hook("middle", "remove", str(path))
        shutil.rmtree(path)
        self._hook("after", "remove", str(path))

    # --- what is durable ----------------------------------------------------------------------------------

    def _settle(self, descriptor: int) -> None:
        key, path = _key(os.fstat(descriptor)), f"/proc/self/fd/{descriptor}"
        self._held.append(descriptor)
        if os.path.isdir(path):
            self._names[key] = _names(path)
        else:
            self._bytes[key] = Path(path).read_bytes()

    def survivors(self, target: Path, choose: str, seed: int = 0) -> None:
        """Write to ``target`` what may be left: ``old`` names, ``new`` names, or of each at ``random``."""
        assert self._root is not None
        self._copy(_key(os.stat(self._root)), self._root, target, choose, random.Random(seed))

    def _copy(self, key: Key, now: Path | None, target: Path, choose: str, dice: random.Random) -> None:
        target.mkdir()
        old, new = self._names.get(key, {}), {}
        if now is not None and now.is_dir() and _key(os.stat(now)) == key:
            new = _names(now)
        for name in sorted(old.keys() | new.keys()):
            kept = old if choose == "old" or (choose == "random" and dice.random() < 0.5) else new
            if name not in kept:
                continue
            child, is_folder = kept[name]
            path = None if now is None else now / name
            if is_folder:
                self._copy(child, path, target / name, choose, dice)
            else:
                (target / name).write_bytes(self._content(child, path, choose, dice))

    def _content(self, key: Key, path: Path | None, choose: str, dice: random.Random) -> bytes:
        if key in self._bytes or choose != "random" or path is None or not path.is_file():
            return self._bytes.get(key, b"")
        data = path.read_bytes()  # never synced: any part of it may have come to the disk
        return data[: dice.randrange(len(data) + 1)]


def _key(status: os.stat_result) -> Key:
    return status.st_dev, status.st_ino


def _names(folder: Any) -> dict[str, tuple[Key, bool]]:
    with os.scandir(folder) as entries:
        return {entry.name: (_key(entry.stat()), entry.is_dir()) for entry in entries}
