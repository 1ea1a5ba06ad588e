"""Microbatches: the plan's microbatches by number, for hosts that sample by index.

    number   = (step × microbatches per step + microbatch) × ranks + rank
    Sampler  0, 1, 2, …    dealt one by one to the ranks: each gets what the plan deals to it

So a host that skips the first n numbers of a plain sampler resumes exactly and reads nothing for it. The
numbers of a step hold the same samples at every number of ranks.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import astuple

from omnidata.loader.loader import PackLoader, Sent, State
from omnidata.loader.microbatch import Microbatch
from omnidata.loader.reader import Work
from omnidata.schema import UserError


class Microbatches:
    """All epochs' microbatches of all ranks, in order; reads one when it is asked for.

    Args:
        loader: with a number of epochs; its rank and workers are not used.
    """

    def __init__(self, loader: PackLoader) -> None:
        if loader.num_epochs is None:
            raise UserError(
                "num_epochs is needed: a host that samples by number must know how many there are"
            )
        self._loader = loader
        steps = [loader.steps_per_epoch(epoch) for epoch in range(loader.num_epochs)]
        self._ends = list(itertools.accumulate(steps))  # steps done after each epoch
        self.num_steps = self._ends[-1]
        self.per_step = loader.microbatches_per_step * loader.world_size
        if not self.num_steps:
            raise UserError(
                f"the epochs have no step: an epoch has {loader.plan.totals.num_packs} packs, a step takes "
                f"{loader.global_batch}; lower global_batch"
            )
        self._steps: Iterator[list[tuple[Work, Sent]]] | None = None
        self._at = -1  # the step of ``_works``
        self._works: list[tuple[Work, Sent]] = []

    def __len__(self) -> int:
        return self.num_steps * self.per_step

    def __getitem__(self, number: int) -> Microbatch:
        if not 0 <= number < len(self):
            raise IndexError(f"microbatch {number} of {len(self)}")
        step, place = divmod(number, self.per_step)
        if self._steps is None or not self._at <= step <= self._at + 1:
            self._steps, self._at = self._from(step), step - 1
        if step > self._at:
            self._works, self._at = next(self._steps), step
        return self._loader.read(*self._works[place])

    def __getstate__(self) -> dict[str, object]:
        """Without the place in the plan: a worker process finds its own."""
        return self.__dict__ | {"_steps": None, "_at": -1, "_works": []}

    def state_at(self, step: int) -> State:
        """The loader's position after ``step`` steps; plans the windows up to there, reads nothing."""
        epoch = bisect_left(self._ends, step)
        done = step - (self._ends[epoch - 1] if epoch else 0)
        packs, plan = done * self._loader.global_batch, self._loader.plan.at_epoch(epoch)
        return State(step, epoch, *astuple(plan.position(packs, self._loader.global_batch)))

    def state_dict(self, step: int) -> dict[str, object]:
        """What ``PackLoader.state_dict()`` says after ``step`` steps."""
        state = self.state_at(step)
        return self._loader.state_dict() | {name: getattr(state, name) for name in State.__slots__}

    def check_state(self, state: dict[str, object]) -> None:
        """UserError if ``state`` is of another plan."""
        position = self._loader.state_dict()
        self._loader.load_state_dict(state)
        self._loader.load_state_dict(position)

    def _from(self, step: int) -> Iterator[list[tuple[Work, Sent]]]:
        """Of each step from ``step`` on: the work of its microbatches, in the order of their numbers."""
        loader = self._loader
        for one, after, places in loader.steps_from(self.state_at(step)):
            ranks = [
                list(loader.works_of_step(one, after, places, rank=rank)) for rank in range(loader.world_size)
            ]
            yield [work for microbatches in zip(*ranks, strict=True) for work in microbatches]
