"""Two builders in one folder, a repair beside a build: one is refused, the other's bytes are identical."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tiny_corpus import digests

from faults.building import INLINE, Peace, at, in_child, judge, operations, peace
from faults.disk import Disk
from faults.table import Row
from omnidata.schema import MANIFEST, UserError
from omnidata.verify.repair import repair

# Exit codes of whoever comes: it built or repaired something, was refused, or there was nothing left to do.
WORKED, REFUSED, NOTHING_LEFT, UNCLEAR = 0, 3, 4, 5
WORDS = ("another builder", "already holds a complete dataset", MANIFEST)  # of a clear refusal


def rows(folder: Path, short: bool) -> Iterator[Row]:
    """A second builder or a repair at every operation of a build; two that start at once."""
    small, out = peace(folder), folder / "data"
    seen = operations(small.corpus, out)
    numbers = range(0, len(seen), max(1, len(seen) // 3) if short else 1)

    def build() -> bool:
        return small.corpus.build(out, options=INLINE).shards_built > 0

    def mend() -> bool:
        return bool(repair(out, num_workers=1).rebuilt)

    yield at_operations(small, out, "two builders, one folder", numbers, build)
    yield at_operations(small, out, "repair beside a build", numbers, mend)
    yield at_once(small, out, build, 2 if short else 40)
    yield beside_repair(small, out, mend, build)


def at_operations(small: Peace, out: Path, fault: str, numbers: range, second: Callable[[], bool]) -> Row:
    """While a build does this operation, another process comes to the folder."""
    with Row(fault, "at every operation").timed() as row:
        for number in numbers:
            row.tried += 1
            codes = with_another(
                lambda: small.corpus.build(out, options=INLINE).shards_built > 0, second, number
            )
            _judge(row, small, out, codes, f"operation {number}")
            shutil.rmtree(out)
    return row


def with_another(first: Callable[[], bool], second: Callable[[], bool], number: int) -> list[int]:
    """The codes of ``first``, here, and of ``second``, in a child while the first does that operation."""
    disk, codes = Disk(), []

    def come() -> None:
        def work() -> None:
            disk.__exit__()  # the child's own disk is as any
            os._exit(_code(second))

        codes.append(in_child(work))

    disk._hook = at(number, come)
    with disk:
        return [_code(first), *codes]


def at_once(small: Peace, out: Path, build: Callable[[], bool], times: int) -> Row:
    """Two that start within 0, 10, ... 40 ms."""
    with Row("two builders, one folder", "started at once").timed() as row:
        for number in range(times):
            row.tried += 1

            def late(number: int = number) -> int:
                time.sleep(number % 5 / 100)
                return _code(build)

            with ThreadPoolExecutor(2) as pool:
                codes = list(pool.map(in_child, (lambda: os._exit(_code(build)), lambda: os._exit(late()))))
            _judge(row, small, out, codes, f"time {number}")
            shutil.rmtree(out)
    return row


def beside_repair(small: Peace, out: Path, mend: Callable[[], bool], build: Callable[[], bool]) -> Row:
    """A build that comes while derived files are made anew."""
    with Row("a build beside a repair", "at every operation").timed() as row:
        small.corpus.build(out, options=INLINE)
        codes = [WORKED, WORKED]
        while len(codes) == 2:  # until there is no such operation
            for name in small.digests:
                if name.endswith(".idx") or name.startswith(".nv-meta/"):
                    (out / name).unlink()
            codes = with_another(mend, build, row.tried)
            row.tried += len(codes) == 2
            _judge(row, small, out, codes, f"operation {row.tried}")
    return row


def _judge(row: Row, small: Peace, out: Path, codes: list[int], what: str) -> None:
    if codes.count(WORKED) != 1 or not set(codes) <= {WORKED, REFUSED, NOTHING_LEFT}:
        row.fail("not_found", f"{what}: exit codes {codes}")
    judge(row, small, out, digests(out), what)


def _code(work: Callable[[], bool]) -> int:
    """What came of it."""
    try:
        return WORKED if work() else NOTHING_LEFT
    except UserError as error:
        clear = any(word in str(error) for word in WORDS) and "\n" not in str(error)
        return REFUSED if clear else UNCLEAR
