"""One run per folder: ``RUN/run.lock`` names the process that trains there.

The kernel's lock ends with its process, however that dies, so a lock that a dead process left is taken over.
Some shared file systems keep locks per host only; therefore the holder also touches the file, and a file of
another host that was touched a moment ago belongs to a run that lives.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path
from types import TracebackType

from omnidata.schema import UserError

from .parallel import World

TOUCH_SECONDS = 20.0
LIVE_SECONDS = 90.0  # a file of another host that is younger belongs to a run that lives


class RunLock:
    """A context manager of all ranks: rank 0 holds the lock, all of them refuse if it can't.

    Raises:
        UserError: another run trains in this folder; names its host and process.
    """

    def __init__(self, run_dir: Path, world: World) -> None:
        self.path, self._world = run_dir / "run.lock", world
        self._ended = threading.Event()

    def __enter__(self) -> RunLock:
        problem = self._take() if self._world.is_main else None
        if self._world.sum([problem is not None])[0]:
            raise UserError(problem or f"another run trains in {self.path.parent}; rank 0 says which")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._world.is_main:
            self._ended.set()
            self._file.truncate(0)
            self._file.close()
            if self._is_new and os.listdir(self.path.parent) == [
                self.path.name
            ]:  # refused: nothing was begun
                self.path.unlink()
                self.path.parent.rmdir()

    def _take(self) -> str | None:
        """None, or why the folder is somebody else's."""
        self._is_new = not self.path.parent.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return self._refusal(self._holder())
        holder = self._holder()
        age = time.time() - self.path.stat().st_mtime
        if holder.get("host", socket.gethostname()) != socket.gethostname() and age < LIVE_SECONDS:
            return self._refusal(holder)
        self._file.truncate(0)
        self._file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        self._file.flush()
        threading.Thread(target=self._touch, daemon=True).start()
        return None

    def _holder(self) -> dict[str, str]:
        self._file.seek(0)
        try:
            return json.loads(self._file.read() or "{}")
        except ValueError:  # cut off while it was written
            return {}

    def _refusal(self, holder: dict[str, str]) -> str:
        return (
            f"another run trains in {self.path.parent}: process {holder.get('pid', '?')} on host "
            f"{holder.get('host', '?')}. Wait for it, stop it, or give this one another run.dir"
        )

    def _touch(self) -> None:
        while not self._ended.wait(TOUCH_SECONDS):
            os.utime(self.path)
