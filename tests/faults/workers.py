"""Loader workers that are killed, stopped, or have no memory left: replaced or named, in time."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tiny_dataset import build_tiny_dataset

from faults.table import Row
from omnidata.loader import PackLoader
from omnidata.loader.reader import LoadError
from omnidata.loader.squares import Squares

TIMEOUT = 0.5  # seconds
SLACK = 5.0  # seconds that a new worker may take until it answers, on a machine with much to do


def rows(folder: Path, short: bool) -> Iterator[Row]:
    """Signals at random microbatches, from outside; a worker whose memory is limited."""
    data = build_tiny_dataset(folder / "data", num_samples=48)
    whole = list(map(_content, loader(data, num_workers=0)))
    times = 2 if short else 30
    for number in (signal.SIGKILL, signal.SIGSTOP):
        yield signalled(data, whole, number, times)
    for how, limit in (("MemoryError", _raise), ("RLIMIT_AS", _limit)):
        yield without_memory(data, how, limit, 1 if short else 10)


def loader(data: Path, **settings: Any) -> PackLoader:
    """Small packs, two workers."""
    settings = {"num_workers": 2, "worker_timeout": TIMEOUT, "num_epochs": 1} | settings
    return PackLoader(str(data), global_batch=2, max_tokens=400, image_size=24, **settings)


def _content(each: Any) -> tuple:
    return each.keys, each.input_ids.tolist(), each.images.numpy().tobytes()


def signalled(data: Path, whole: list[tuple], number: signal.Signals, times: int) -> Row:
    """One worker gets the signal at a random microbatch."""
    with Row("loader worker", number.name).timed() as row:
        for time_number in range(times):
            row.tried += 1
            dice = random.Random(time_number)
            shot, found, last = dice.randrange(len(whole) // 2), [], time.monotonic()
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                for microbatch in loader(data):
                    if time.monotonic() - last > TIMEOUT + SLACK:
                        row.fail("not_found", f"{time_number}: waited {time.monotonic() - last:.1f} s")
                    if len(found) == shot:
                        os.kill(dice.choice(multiprocessing.active_children()).pid, number)
                    found.append(_content(microbatch))
                    last = time.monotonic()
            _compare(row, whole, found, f"{time_number}")
            if told and not any("reading" in str(one.message) for one in told):
                row.fail("not_found", f"{time_number}: nobody is named")
    return row


def _compare(row: Row, whole: list[tuple], found: list[tuple], what: str) -> None:
    if found == whole:
        return
    keys = [key for microbatch in found for key in microbatch[0]]
    doubled = len(keys) - len(set(keys))
    row.fail("doubled" if doubled else "lost", f"{what}: other microbatches", doubled or 1)


def without_memory(data: Path, how: str, limit: Callable[[], None], times: int) -> Row:
    """From some microbatch on; the sample is named, and none is left out."""
    with Row("loader worker", f"out of memory: {how}").timed() as row:
        for number in range(times):
            row.tried += 1
            with _changed(limit, number), warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                try:
                    list(loader(data, on_error="skip"))
                    row.fail("lost", f"{number}: not a word")
                except LoadError as error:
                    if "sample-" not in str(error) or "\n" in str(error):
                        row.fail("not_found", f"{number}: {error}")
    return row


class _changed:
    """Squares.fill, which meets ``limit`` after a few microbatches of a worker."""

    def __init__(self, limit: Callable[[], None], after: int) -> None:
        self._limit, self._left, self._parent = limit, after % 4, os.getpid()

    def __enter__(self) -> None:
        self._before = before = Squares.fill

        def fill(squares: Squares, *arguments: Any, **named: Any) -> None:
            self._left -= 1
            if self._left < 0 and os.getpid() != self._parent:
                self._limit()
            before(squares, *arguments, **named)

        Squares.fill = fill

    def __exit__(self, *_: object) -> None:
        Squares.fill = self._before


def _raise() -> None:
    raise MemoryError


def _limit() -> None:
    """No more room than there is, and then something that needs some."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now, resource.RLIM_INFINITY))
    bytearray(64 << 20)
