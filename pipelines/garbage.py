"""Python's garbage collector, on every rank after the same steps.

Left alone it runs on each rank whenever that rank has made enough objects: a few tenths of a second in which
all the others wait in a collective. What is alive when training begins is put aside for good.
"""

from __future__ import annotations

import gc

EVERY = 200  # steps between collections


class Garbage:
    """``with Garbage() as garbage: …; garbage.step_finished(step)``."""

    def __enter__(self) -> Garbage:
        gc.collect()
        gc.freeze()
        gc.disable()
        return self

    def __exit__(self, *_: object) -> None:
        gc.enable()
        gc.unfreeze()

    def step_finished(self, step: int) -> None:
        """Collect after every so many steps of the run, which all ranks count alike."""
        if step % EVERY == 0:
            gc.collect()
