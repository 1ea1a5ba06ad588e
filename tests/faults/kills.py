"""kill -9 and a full disk: at every durable operation of a build (before, amid, after it), at random."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from faults.building import INLINE, Peace, at, die, go_on, in_child, operations, peace
from faults.disk import Disk
from faults.table import Row
from omnidata.schema import MANIFEST, UserError

RANDOM_KILLS = 100
WRITING = ("write", "fsync", "rename")  # what may find the disk full


def rows(folder: Path, short: bool) -> Iterator[Row]:
    """Kills at operations, a full disk at operations, kills at random."""
    small = peace(folder)
    seen = operations(small.corpus, folder / "count")
    step = max(1, len(seen) // 6) if short else 1
    yield at_operations(small, folder / "data", range(0, len(seen), step))
    full = [i for i, (when, name, _) in enumerate(seen) if name in WRITING and when != "after"]
    yield full_disk(small, folder / "data", full[:: max(1, len(full) // 5) if short else 1])
    if not short:
        for target in ("parent", "worker", "group"):
            yield at_random(small, folder / target, target)


def at_operations(small: Peace, out: Path, numbers: range) -> Row:
    """A build that is killed there is completed by the same command."""
    with Row("kill -9 of a build", "at every operation").timed() as row:
        for number in numbers:
            row.tried += 1

            def build(number: int = number) -> None:
                with Disk(at(number, die)):
                    small.corpus.build(out, options=INLINE)

            if in_child(build) != -signal.SIGKILL:
                row.fail("not_found", f"operation {number} was never reached")
            go_on(row, small, out, f"operation {number}")
    return row


def full_disk(small: Peace, out: Path, numbers: list[int]) -> Row:
    """A full disk is one clear line, and when there is room again the same command goes on."""

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Row("ENOSPC of a build", "at every writing operation").timed() as row:
        for number in numbers:
            row.tried += 1
            try:
                with Disk(at(number, full)):
                    small.corpus.build(out, options=INLINE)
                row.fail("not_found", f"operation {number}: not a word")
            except UserError as error:
                if "run the same command again" not in str(error):
                    row.fail("not_found", f"operation {number}: {error}")
            go_on(row, small, out, f"operation {number}")
    return row


def at_random(small: Peace, folder: Path, target: str) -> Row:
    """A real build with workers, killed after a random time, again and again until one is done."""
    dice, out = random.Random(target), folder / "data"
    folder.mkdir()
    with Row("kill -9 of a build", f"at random: {target}").timed() as row:
        while row.tried < RANDOM_KILLS // 3 + 1:
            process = subprocess.Popen(
                command(small, out),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            # Builds take about two seconds, of which most are spent on starting; shots go to all of them.
            time.sleep(dice.uniform(0.3, 2.5))
            if process.poll() is None:
                row.tried += 1
                _shoot(process, target, dice)
            if target == "worker":  # the build itself goes on, or says which worker was lost
                process.wait(timeout=120)
            process.wait(timeout=120)
            _end(process)
            if (out / MANIFEST).exists():
                go_on(row, small, out, f"after {row.tried} kills")
        go_on(row, small, out, "the last")
    return row


def command(small: Peace, out: Path) -> list[str]:
    """The build as a user types it."""
    settings = small.corpus.settings
    return [
        *(
            sys.executable,
            "-m",
            "omnidata.cli",
            "build-shards",
            *settings.source,
            "--out",
            str(out),
            "--quiet",
        ),
        *("--tokenizer", settings.tokenizer, "--image-root", str(settings.image_root), "--num-query", "4"),
        *("--image-size", "32", "--samples-per-shard", "11", "--dedup", "exact", "--workers", "2"),
    ]


def _shoot(process: subprocess.Popen, target: str, dice: random.Random) -> None:
    if target == "group":
        os.killpg(process.pid, signal.SIGKILL)
        return
    children = _children(process.pid)
    victim = dice.choice(children) if target == "worker" and children else process.pid
    with contextlib.suppress(ProcessLookupError):
        os.kill(victim, signal.SIGKILL)


def _children(pid: int) -> list[int]:
    """Children and theirs: workers are the fork server's."""
    found = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        pass
    return found + [grandchild for child in found for grandchild in _children(child)]


def _end(process: subprocess.Popen) -> None:
    """Whatever of the group is left; the next build must find nobody at work."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
