"""Steps: packs of a window -> stretches of a few steps -> steps of packs of like cost -> the deal to ranks.

    window      |. . . . . . . . . . . . . . . . . . . . . . . . . . . . .|     its packs, shuffled
    stretches   |------- 8 steps of G packs -------|--- as many --| . . . |     the rest: fewer than G
    stretch     its packs by cost, cut into steps of G packs, the steps shuffled

So the packs of a step cost alike, and ranks hardly wait for each other at one pack a rank; neighbouring steps
differ a little. The rest of a window and the first packs of the next make one step. Nothing of it depends on
the number of ranks; the sequence of steps depends on G, the global batch, so a position names the G that made
the stretch in which it lies (``Position``), and a run may go on with another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from omnidata.plan.order import permutation
from omnidata.plan.window import Pack, Window

STRETCH = 8  # steps
_STEP_ORDER = 0x57E9  # keeps the order of steps unrelated to the orders of packs and samples


@dataclass(frozen=True, slots=True)
class Position:
    """A place in an epoch: ``done`` packs of the stretch that begins with ``pack`` of ``window`` are done."""

    window: int = 0
    pack: int = 0
    done: int = 0
    batch: int = 0  # packs of a step of that stretch; 0 if none of it is done


BEGIN = Position()


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One update: its packs, and who computes them."""

    number: int  # in the iteration that yielded it, from 0
    packs: tuple[Pack, ...]  # the global batch: the same for every world size
    ranks: tuple[tuple[int, ...], ...]  # positions in ``packs`` for each rank, the costliest first
    after: Position  # where the next step begins

    @property
    def num_supervised(self) -> int:
        """Supervised tokens over all ranks: the denominator of the loss."""
        return sum(pack.num_supervised for pack in self.packs)


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """Packs of one window that steps take one after the other: a stretch, or what completes a step."""

    window: Window
    first: int  # they are the packs [first, first + len(order)) of the window
    order: np.ndarray  # int64: positions in the window, as steps take them
    done: int  # how many of them are done already
    batch: int  # packs of a step of this stretch; 0: no stretch, taken in the window's order

    def after(self, done: int) -> Position:
        """The position after so many of the packs."""
        if done == len(self.order) or not self.batch:
            return Position(self.window.number, self.first + done)
        return Position(self.window.number, self.first, done, self.batch if done else 0)


def runs(windows: Iterable[Window], start: Position, global_batch: int, *key: int) -> Iterator[Run]:
    """What the steps take from ``start`` on, window by window.

    Args:
        windows: from that of ``start`` on.
        start: the beginning of a step.
        global_batch: packs of a step.
        key: integers that the order of steps follows from.
    """
    first, done, missing = start.pack, start.done, 0  # packs that the step begun still misses
    for window in windows:
        while first < len(window):
            batch = start.batch if done else global_batch
            num_steps = 0 if missing else min(STRETCH, (len(window) - first) // batch)
            if num_steps:
                order = _stretch(window, first, num_steps, batch, key)
            else:
                order = np.arange(first, min(first + (missing or global_batch), len(window)))
            yield Run(window, first, order, done, batch if num_steps else 0)
            missing = (missing - len(order) + done) % global_batch
            first, done = first + len(order), 0
        first = 0


def _stretch(window: Window, first: int, num_steps: int, batch: int, key: tuple[int, ...]) -> np.ndarray:
    """The packs ``[first, first + num_steps × batch)``, grouped by cost, the groups shuffled."""
    by_cost = first + np.argsort(window.costs[first : first + num_steps * batch], kind="stable")
    place = permutation(num_steps, *key, window.number, first, _STEP_ORDER)
    return by_cost.reshape(num_steps, batch)[place].ravel()


def deal(costs: np.ndarray, world_size: int) -> list[list[int]]:
    """Deal packs to ranks so that sums of cost are even, and so are the costs of each rank's n-th packs.

    Round by round, the next ``world_size`` packs in order of cost: the costliest goes to the rank that has
    least so far. Ranks that compute in lockstep (sharded parameters) wait for the costliest n-th pack, which
    is hardly costlier than the others of its round.

    Example: costs [5, 1, 4, 2] for 2 ranks -> [[0, 1], [2, 3]], 6 each.
    """
    order = np.argsort(-costs, kind="stable")
    loads = np.zeros(world_size)
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    for start in range(0, len(order), world_size):
        dealt = order[start : start + world_size]
        takers = np.argsort(loads, kind="stable")[: len(dealt)]
        loads[takers] += costs[dealt]
        for rank, pack in zip(takers.tolist(), dealt.tolist(), strict=True):
            ranks[rank].append(pack)
    return ranks
