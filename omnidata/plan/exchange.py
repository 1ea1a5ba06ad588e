"""Exchange: samples that change places until all packs hold alike.

Rounds of meetings of two packs. Of a few samples of each, the swap is made that helps most; a free place is a
sample of nothing, so samples also move.

(1) even out   the fullest pack meets the emptiest, and so on inwards, by tokens and by pixels in turn:
               best is what brings both nearest to the mean pack
(2) limits     each pack over a limit meets one that is under all: best is what lessens the excess

A swap is judged by the change of ``sum over amounts of weight × (held / mean)²``; with amounts h and l of the
two packs and d more given than taken, that of one amount is ``2 × weight × d × (d - (h - l)) / mean²``.

All of it is elementwise arithmetic on whole numbers held as float64, so every machine finds the same packs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

EVEN_ROUNDS = 12
LIMIT_ROUNDS = 40
WIDTH = 8  # samples of each pack that a meeting looks at: others in the next round
TOLERANCE = 0.02  # of the mean pack: amounts this near to it are even
_EXCESS = 30.0  # what being over a limit by a mean pack weighs, in the units of the sum above
_IDLE = 0.05  # part (2) ends when so few of the meetings help, three rounds in a row
_STRIDE = 37  # from round to round, how far on in the order of fullness the partners begin
_FREE = 2  # free places of each pack
_BLOCK = 2048  # meetings at a time: what they look at fits a core's cache


@dataclass(frozen=True, slots=True)
class Amount:
    """Something that packs hold."""

    values: np.ndarray  # int64 [N], of each sample
    weight: float  # how much evenness counts; 0: only the limit
    limit: float = np.inf  # what a pack may hold

    @property
    def grain(self) -> int:
        """All values are multiples of it: packs cannot be nearer to their mean."""
        return int(np.gcd.reduce(self.values)) if len(self.values) else 0


def exchange(pack_of: np.ndarray, num_packs: int, amounts: Sequence[Amount]) -> np.ndarray:
    """The pack of each sample, int64 ``[N]``, evened out.

    Packs over a limit may stay so where no swap of the kind helps; none comes to be over a limit in the
    second part.
    """
    if num_packs < 2 or not any(amount.weight and amount.values.any() for amount in amounts):
        return pack_of
    places = _Places(pack_of, num_packs, amounts)
    for number in range(EVEN_ROUNDS):
        places.even_out(number)
    met = idle = 0
    for number in range(LIMIT_ROUNDS):
        meetings, helped = places.meet_limits(number, met)
        met += meetings
        idle = 0 if helped > _IDLE * meetings else idle + 1
        if not meetings or idle == 3:
            break
    return places.pack_of


class _Places:
    """Who is where: pack p has the places ``starts[p]`` … of ``sample``, a free one holds number N."""

    def __init__(self, pack_of: np.ndarray, num_packs: int, amounts: Sequence[Amount]) -> None:
        counts = np.bincount(pack_of, minlength=num_packs)
        order = np.argsort(pack_of, kind="stable")
        self.sizes = counts + _FREE
        self.starts = np.cumsum(self.sizes) - self.sizes
        within = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        self.sample = np.full(int(self.sizes.sum()), len(pack_of))
        self.sample[np.repeat(self.starts, counts) + within] = order
        self.width = min(WIDTH, -(-len(self.sample) // num_packs))  # of small packs, not twice the same place
        self.amounts = amounts
        self.values = [np.append(amount.values, 0).astype(np.float64) for amount in amounts]
        self.held = [np.bincount(pack_of, amount.values, num_packs) for amount in amounts]
        self.means = [max(float(held.sum()) / num_packs, 1.0) for held in self.held]
        # Where values are coarse, the next multiple above the mean is as even as it gets.
        self.slack = [
            max(TOLERANCE * mean, 0.99 * a.grain) for a, mean in zip(amounts, self.means, strict=True)
        ]
        self.limits = [
            min(amount.limit, mean + slack)
            if amount.weight and not np.isfinite(amount.limit)
            else amount.limit
            for amount, mean, slack in zip(amounts, self.means, self.slack, strict=True)
        ]
        self._evened = [number for number, amount in enumerate(amounts) if amount.weight]

    @property
    def pack_of(self) -> np.ndarray:
        """The pack of each sample."""
        found = np.empty(len(self.values[0]), np.int64)
        found[self.sample] = np.repeat(np.arange(len(self.sizes)), self.sizes)
        return found[:-1]

    def even_out(self, number: int) -> None:
        """One round of part (1)."""
        order = np.argsort(self.held[self._evened[number % len(self._evened)]], kind="stable")
        half = len(order) // 2
        poor, rich = order[:half], order[::-1][:half]
        uneven = np.zeros(len(order), bool)
        for k in self._evened:
            uneven |= np.abs(self.held[k] - self.means[k]) > self.slack[k]
        meeting = uneven[poor] | uneven[rich]
        self._meet(rich[meeting], poor[meeting], number, excess=0.0)

    def meet_limits(self, number: int, met: int) -> tuple[int, int]:
        """One round of part (2), after ``met`` meetings of it; its number of meetings, and of swaps."""
        is_over = np.zeros(len(self.sizes), bool)
        for held, limit in zip(self.held, self.limits, strict=True):
            is_over |= held > limit
        over, under = np.flatnonzero(is_over), np.flatnonzero(~is_over)
        fullness = sum(self.held[k][under] / self.means[k] for k in self._evened)
        under = under[np.argsort(fullness, kind="stable")]
        meetings = min(len(over), len(under))
        ours, theirs = np.roll(over, -met)[:meetings], np.roll(under, -_STRIDE * number)[:meetings]
        return meetings, self._meet(ours, theirs, number, excess=_EXCESS)

    def _meet(self, ours: np.ndarray, theirs: np.ndarray, number: int, *, excess: float) -> int:
        """Pair by pair; no pack may be in two pairs."""
        blocks = [slice(start, start + _BLOCK) for start in range(0, len(ours), _BLOCK)]
        return sum(self._swap(ours[block], theirs[block], number, excess) for block in blocks)

    def _swap(self, ours: np.ndarray, theirs: np.ndarray, number: int, excess: float) -> int:
        """Of each pair of packs, make the best swap, if one helps; how many did."""
        at_ours, at_theirs = self._looked_at(ours, number), self._looked_at(theirs, 3 * number)
        given, taken = self.sample[at_ours], self.sample[at_theirs]
        worse = np.zeros((len(ours), at_ours.shape[1] * at_theirs.shape[1]))
        moved = []  # of each amount: what goes over with each swap
        for k, amount in enumerate(self.amounts):
            values, mean, limit = self.values[k], self.means[k], self.limits[k]
            held, others = self.held[k][ours, None], self.held[k][theirs, None]
            more = (values[given][:, :, None] - values[taken][:, None, :]).reshape(worse.shape)
            moved.append(more)
            if amount.weight:
                worse += (2 * amount.weight / (mean * mean)) * more * (more - (held - others))
            if excess and np.isfinite(limit):
                before = np.maximum(held - limit, 0) + np.maximum(others - limit, 0)
                after = np.maximum(held - more - limit, 0) + np.maximum(others + more - limit, 0)
                worse += (excess / mean) * (after - before)
        best = np.argmin(worse, axis=1)
        helped = np.flatnonzero(worse[np.arange(len(best)), best] < -1e-12)
        best = best[helped]
        i, j = np.divmod(best, at_theirs.shape[1])
        self.sample[at_ours[helped, i]], self.sample[at_theirs[helped, j]] = (
            taken[helped, j],
            given[helped, i],
        )
        for held, more in zip(self.held, moved, strict=True):
            held[ours[helped]] -= more[helped, best]
            held[theirs[helped]] += more[helped, best]
        return len(helped)

    def _looked_at(self, packs: np.ndarray, turn: int) -> np.ndarray:
        """``[packs, width]`` places, evenly spread over each pack; others at the next turn."""
        sizes = self.sizes[packs][:, None]
        return self.starts[packs][:, None] + (np.arange(self.width) * sizes // self.width + turn) % sizes
