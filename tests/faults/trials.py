"""The long trial of training: `make trials`. Kills 20 times and more, stops 40 times and more."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from faults import families
from faults.table import Row
from faults.training import KILL, MOMENTS, STOP, Fault, Trial


def rows(folder: Path, short: bool) -> Iterator[Row]:
    """A row for each signal, whom it reaches, and when."""
    trial = Trial(folder, random.Random())  # other moments every time
    for number, name, at_random in ((KILL, "kill -9 of training", 6), (STOP, "SIGTERM of training", 14)):
        for whom in ("one", "all"):
            planted = [Fault(number, whom, moment) for moment in MOMENTS]
            yield trial.row(f"{name}, {whom}", "at random", [Fault(number, whom, None)] * at_random)
            yield trial.row(f"{name}, {whom}", "at a moment", planted * (1 if number == KILL else 2))
    yield from families.rows(folder / "families", short)
