"""Power cuts: what was not synced is gone, in any of three ways, at every durable operation of a build."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from faults.building import INLINE, Peace, at, go_on, in_child, operations, peace
from faults.disk import Disk
from faults.table import Row

CHOICES = ("old", "new", "random")


def rows(folder: Path, short: bool) -> Iterator[Row]:
    """One row for each way in which a disk may forget."""
    small = peace(folder)
    num_operations = len(operations(small.corpus, folder / "count"))
    step = max(1, num_operations // 9) if short else 1
    for choose in CHOICES:
        numbers = [*range(0, num_operations, step), num_operations]  # the last: when the command has ended
        yield cuts(small, folder / "disk", numbers, choose)


def cuts(small: Peace, disk: Path, numbers: list[int], choose: str) -> Row:
    """A build whose machine loses its power there is completed by the same command."""
    after = disk.with_name("survived")
    with Row("power cut of a build", f"unsynced names: {choose}").timed() as row:
        for number in numbers:
            row.tried += 1
            disk.mkdir()

            def build(number: int = number) -> None:
                def cut() -> None:
                    shim.survivors(after, choose, number)
                    os._exit(0)

                with Disk(at(number, cut), root=disk) as shim:
                    small.corpus.build(disk / "data", options=INLINE)
                    cut()

            if in_child(build) != 0:
                row.fail("not_found", f"operation {number}: the build failed")
            shutil.rmtree(disk)
            after.rename(disk)
            if number == numbers[-1] and not (disk / "data" / "manifest.json").exists():
                row.fail("lost", "a build that has ended is gone")
            go_on(row, small, disk / "data", f"{choose}, operation {number}")
            shutil.rmtree(disk)
    return row
