"""Last words: a note of the record that a worker reads, on disk, so that it outlives a worker that dies."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator

from omnidata.builder.layout import ShardTask
from omnidata.durable import SCRATCH, Store

READING = f"{SCRATCH}/reading"


@contextlib.contextmanager
def reading(store: Store, task: ShardTask) -> Iterator[Callable[[str], object]]:
    """A note of the record that is being read, on disk, so that it outlives a worker that dies of it."""
    path = reading_path(store, task)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        yield lambda text: os.pwrite(handle, text.encode("utf-8", "replace")[:500].ljust(512), 0)
    finally:
        os.close(handle)
    os.unlink(path)


def reading_path(store: Store, task: ShardTask) -> str:
    """Where the note is: with the build, or in the temporary folder if that is remote."""
    name = f"{task.split}-{task.number:05d}"
    if store.is_local:
        return store.full(f"{READING}/{name}")
    build = hashlib.blake2b(store.url.encode(), digest_size=8).hexdigest()
    return os.path.join(tempfile.gettempdir(), f"omnidata-reading-{build}", name)


def last_words(store: Store, task: object) -> str:
    """The note that a dead worker left."""
    if isinstance(task, ShardTask):
        with contextlib.suppress(FileNotFoundError), open(reading_path(store, task), "rb") as file:
            return file.read().decode("utf-8", "replace").strip()
    return ""
