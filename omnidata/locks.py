"""Locks: one builder at a time in an output folder, kept by the kernel locally and by a lease elsewhere."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from omnidata.durable import SCRATCH, Store, make_folder
from omnidata.schema import UserError


class LockedError(UserError):
    """Somebody else holds the lock."""


@contextlib.contextmanager
def locked(store: Store, name: str, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold the lock ``.build/NAME.lock``; ``shared`` holders exclude only exclusive ones.

    ``wait`` until it is free (local folders only) instead of raising.

    Locally the kernel keeps it (flock), so it ends with its process however that dies. In a remote store it
    is an object that its holder refreshes; one that was not refreshed for five minutes is void.

    Raises:
        LockedError: somebody else holds it.
    """
    path = f"{SCRATCH}/{name}.lock"
    with _flock(store, path, shared, wait) if store.is_local else _lease(store, path, shared):
        yield


def _holder() -> dict[str, object]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}


@contextlib.contextmanager
def _flock(store: Store, path: str, shared: bool, wait: bool) -> Iterator[None]:
    import fcntl

    final = store.full(path)
    while True:
        file = _open_lock(final)  # closed below; closing it releases the lock
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip()
            file.close()
            raise LockedError(_busy(store, holder)) from None
        # The holder before us may have removed the finished build's folder between our open and our lock.
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(file.fileno()).st_ino == os.stat(final).st_ino:
                break
        file.close()
    try:
        if not shared:
            file.truncate(0)
            file.write(json.dumps(_holder()))
            file.flush()
        yield
    finally:
        file.close()


def _open_lock(final: str, attempts: int = 100) -> IO[str]:
    """The lock's file; its folder may be removed at any moment by the holder before us."""
    for _ in range(attempts - 1):
        with contextlib.suppress(FileNotFoundError):
            make_folder(Path(final).parent)
            return open(final, "a+")
    make_folder(Path(final).parent)
    return open(final, "a+")


LEASE_SECONDS = 300.0


@contextlib.contextmanager
def _lease(store: Store, path: str, shared: bool) -> Iterator[None]:
    if store.exists(path):
        holder = json.loads(store.read_bytes(path))
        if time.time() - holder["time"] < LEASE_SECONDS and not _is_dead_here(holder):
            raise LockedError(_busy(store, json.dumps(holder)))
    if (
        shared
    ):  # each task of a distributed build also holds a lease of its own: build.hold_locks looks at them
        yield
        return
    token = secrets.token_hex(8)
    mine = _holder() | {"token": token}
    store.write_bytes(path, json.dumps(mine).encode())
    if json.loads(store.read_bytes(path)).get("token") != token:
        raise LockedError(_busy(store, "another builder that started at the same time"))
    stop = threading.Event()

    def refresh() -> None:
        while not stop.wait(LEASE_SECONDS / 5):
            store.write_bytes(path, json.dumps(mine | {"time": time.time()}).encode())

    threading.Thread(target=refresh, daemon=True).start()
    try:
        yield
    finally:
        stop.set()
        store.remove(path)


def _is_dead_here(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that is gone."""
    if holder["host"] != socket.gethostname():
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    return False


def _busy(store: Store, holder: str) -> str:
    return (
        f"another builder is at work on {store.url} ({holder or 'unknown'}). "
        "Wait for it, stop it, or choose another --out."
    )
