"""EpochPlan: index -> packs -> steps -> ranks, as pure functions of integers.

    plan = EpochPlan("data/llava", seed=0, epoch=0, max_tokens=4096)
    plan.windows()            (1) Blend.draw        the samples of a window, shuffled
                              (2) packing.pack      packs of at most max_tokens and max_images
                              (3) permutation       the packs of the window, shuffled
    plan.steps(world_size=8, global_batch=64)
                              (4) the next 64 packs, whatever the number of ranks
                              (5) deal              to ranks, so that the work of each is even

A position in the epoch is (window, packs of it that are done): two integers. A window is made without those
before it, so resuming anywhere costs one window. No shard is opened.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from omnidata.plan import packing
from omnidata.plan.blend import SHUFFLED, Blend, Draw, Source
from omnidata.plan.catalog import IMAGE_PIXELS, Lengths
from omnidata.plan.order import permutation
from omnidata.plan.oversize import Oversize
from omnidata.plan.sources import open_sources
from omnidata.schema import UserError

WINDOW_SAMPLES = 1 << 17  # samples shuffled and packed together; about 12 MB of plan
ORDERED_SAMPLES = 1 << 10  # the same where a dataset has an order
# Tokens that one image weighs (a processor's: 448² pixels): OmniLMM-12B with a frozen tower; 663 trained.
IMAGE_COST = 221.0
_PACK_ORDER = 0x9ACC  # keeps the order of packs unrelated to the order of samples

Tail = Literal["drop", "pad"]


@dataclass(frozen=True, slots=True, eq=False)
class Pack:
    """Samples that share one sequence; int64 ``[D]`` arrays, in the order in which they are laid out."""

    window: Window  # where it comes from
    dataset: np.ndarray  # position in the blend
    passes: np.ndarray  # how many times that dataset had been exhausted before
    lengths: Lengths

    @property
    def num_tokens(self) -> int:
        """Tokens, without padding."""
        return int(self.lengths.tokens.sum())

    @property
    def num_supervised(self) -> int:
        """Supervised tokens."""
        return int(self.lengths.supervised.sum())

    @property
    def num_images(self) -> int:
        """Images."""
        return int(self.lengths.images.sum())

    @property
    def image_load(self) -> float:
        """What the tower is given, in pictures of 448² pixels; OmniLMM: the number of images."""
        return float(self.lengths.pixels.sum()) / IMAGE_PIXELS


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """The packs of one window, in training order; samples of pack p are ``[starts[p], starts[p + 1])``."""

    number: int
    dataset: np.ndarray  # int64 [N], as in Pack
    passes: np.ndarray
    lengths: Lengths
    starts: np.ndarray  # int64 [P+1]
    num_cut: int  # samples shortened to fit a pack
    num_left_out: int  # samples that fit no pack

    def __len__(self) -> int:
        return len(self.starts) - 1

    def pack(self, position: int) -> Pack:
        """Pack ``position`` of this window."""
        span = slice(self.starts[position], self.starts[position + 1])
        return Pack(self, self.dataset[span], self.passes[span], self.lengths.take(span))


@dataclass(frozen=True, slots=True)
class Position:
    """A place in an epoch: the next pack is ``pack`` of ``window``."""

    window: int = 0
    pack: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One update: its packs, and who computes them."""

    number: int  # in the iteration that yielded it, from 0
    packs: tuple[Pack, ...]  # the global batch, in plan order: the same for every world size
    ranks: tuple[tuple[int, ...], ...]  # positions in ``packs`` for each rank, the costliest first
    after: Position  # where the next step begins

    @property
    def num_supervised(self) -> int:
        """Supervised tokens over all ranks: the denominator of the loss."""
        return sum(pack.num_supervised for pack in self.packs)


@dataclass(frozen=True, slots=True)
class Totals:
    """An epoch in numbers."""

    num_samples: int
    num_packs: int
    num_tokens: int
    num_supervised: int
    num_images: int
    num_cut: int  # samples shortened to fit a pack
    num_left_out: int  # samples that fit no pack
    max_tokens: int

    @property
    def fill(self) -> float:
        """Share of the positions of all packs that hold a token."""
        return self.num_tokens / (self.num_packs * self.max_tokens) if self.num_packs else 0.0


class EpochPlan:
    """The order, packing and distribution of one epoch.

    Args:
        data: a path, a Dataset, ``{"path", "split", "where", …}`` (plan.sources), a Catalog, or a list
            of those. A path means its ``train`` split.
        seed, epoch: the shuffle; equal numbers give equal plans on any machine.
        max_tokens, max_images: what a pack may hold.
        oversize: samples that no pack can hold are refused, cut after a reply, or left out and counted.
        window_samples: samples shuffled and packed together.

    Raises:
        UserError: no such dataset, datasets that do not fit together, or an oversize sample to refuse.
    """

    def __init__(
        self,
        data: Any,
        *,
        seed: int = 0,
        epoch: int = 0,
        max_tokens: int = 4096,
        max_images: int | None = None,
        oversize: Oversize = "refuse",
        window_samples: int = WINDOW_SAMPLES,
    ) -> None:
        self.sources: list[Source] = open_sources(data)
        self.seed, self.epoch = seed, epoch
        self.max_tokens, self.max_images = max_tokens, max_images
        self.oversize, self.window_samples = oversize, window_samples
        has_order = any(source.order != SHUFFLED for source in self.sources)
        # Packs of a window are shuffled: an order shows from one to the next.
        draw_samples = min(ORDERED_SAMPLES, window_samples) if has_order else window_samples
        self.windows_a_read = window_samples // draw_samples  # how many to look up at once
        self._blend = Blend(
            self.sources, seed=seed, epoch=epoch, window_samples=window_samples, draw_samples=draw_samples
        )
        self._cuts: dict[tuple[int, int], tuple[int, int, int]] = {}  # (dataset, row) -> lengths to keep
        if oversize == "refuse":
            self._refuse_oversize()

    def at_epoch(self, epoch: int) -> EpochPlan:
        """The same plan for another epoch."""
        return EpochPlan(
            self.sources,
            seed=self.seed,
            epoch=epoch,
            max_tokens=self.max_tokens,
            max_images=self.max_images,
            oversize=self.oversize,
            window_samples=self.window_samples,
        )

    @cached_property
    def digest(self) -> str:
        """Equal for plans whose epochs have equal packs in equal order (the epoch's number left out)."""
        settings = (self.seed, self.max_tokens, self.max_images, self.oversize, self.window_samples)
        shares = self._blend.shares  # of one dataset the same, whatever its weight
        blend = [
            (source.catalog.digest, str(share), *map(str, source.extras))
            for source, share in zip(self.sources, shares, strict=True)
        ]
        return hashlib.blake2b(repr((settings, blend)).encode(), digest_size=16).hexdigest()

    # --- packs --------------------------------------------------------------------------------------------

    @property
    def num_windows(self) -> int:
        """Windows of the epoch."""
        return self._blend.num_windows

    def rows_of_read(self, read: int, window: Window) -> dict[int, np.ndarray]:
        """Of each dataset, the rows of the ``windows_a_read`` windows that are looked up with ``window``."""
        if self.windows_a_read == 1:
            parts = [(window.dataset, window.lengths.rows)]
        else:
            first = read * self.windows_a_read
            draws = map(self._blend.draw, range(first, min(first + self.windows_a_read, self.num_windows)))
            parts = [(draw.dataset, draw.lengths.rows) for draw in draws]
        dataset, rows = (np.concatenate(column) for column in zip(*parts, strict=True))
        return {number: np.unique(rows[dataset == number]) for number in np.unique(dataset).tolist()}

    def window(self, number: int) -> Window:
        """Window ``number``, made from the index alone."""
        draw, num_cut, num_left_out = self._fit(self._blend.draw(number))
        lengths = draw.lengths
        pack_of, num_packs = packing.pack(
            lengths.tokens, lengths.images, max_tokens=self.max_tokens, max_images=self.max_images
        )
        place = permutation(num_packs, self.seed, self.epoch, number, _PACK_ORDER)
        pack_of = place[pack_of]
        order = np.argsort(pack_of, kind="stable")
        starts = np.concatenate(([0], np.cumsum(np.bincount(pack_of, minlength=num_packs))))
        samples = draw.take(order)
        return Window(number, samples.dataset, samples.passes, samples.lengths, starts, num_cut, num_left_out)

    def windows(self, first: int = 0) -> Iterator[Window]:
        """The windows of the epoch from ``first`` on."""
        yield from map(self.window, range(first, self.num_windows))

    def packs(self, start: Position = Position()) -> Iterator[tuple[Pack, Position]]:
        """Every pack from ``start`` on, and the position after it."""
        begin = start.pack
        for window in self.windows(start.window):
            for number in range(begin, len(window)):
                yield window.pack(number), Position(window.number, number + 1)
            begin = 0

    def __iter__(self) -> Iterator[Pack]:
        for pack, _ in self.packs():
            yield pack

    # --- oversize samples ---------------------------------------------------------------------------------

    def _oversize(self, lengths: Lengths) -> np.ndarray:
        too_long = lengths.tokens > self.max_tokens
        return too_long if self.max_images is None else too_long | (lengths.images > self.max_images)

    def _refuse_oversize(self) -> None:
        for source in self.sources:
            tokens, images = source.catalog.longest()
            if tokens > self.max_tokens or (self.max_images is not None and images > self.max_images):
                most = "any number" if self.max_images is None else self.max_images
                raise UserError(
                    f"{source.catalog.name} has a sample of {tokens} tokens and one of {images} images, a "
                    f"pack holds {self.max_tokens} and {most}: raise max_tokens or max_images, or "
                    "say oversize=cut or oversize=leave_out (`omnidata plan` counts them)"
                )

    def _fit(self, draw: Draw) -> tuple[Draw, int, int]:
        """Cut or leave out what no pack holds; return also how many of each."""
        over = np.flatnonzero(self._oversize(draw.lengths))
        if not len(over):
            return draw, 0, 0
        lengths = draw.lengths.copy()
        for position in over.tolist():
            kept = self._cut(int(draw.dataset[position]), int(lengths.rows[position]))
            share = kept[2] / max(1, lengths.images[position])
            lengths.tokens[position], lengths.supervised[position], lengths.images[position] = kept
            lengths.pixels[position] = round(lengths.pixels[position] * share)
        fitted = replace(draw, lengths=lengths).take(np.flatnonzero(lengths.tokens))
        num_left_out = len(lengths.tokens) - len(fitted.dataset)
        return fitted, len(over) - num_left_out, num_left_out

    def _cut(self, dataset: int, row: int) -> tuple[int, int, int]:
        if self.oversize == "leave_out":
            return 0, 0, 0
        if (dataset, row) not in self._cuts:
            catalog = self.sources[dataset].catalog
            kept = catalog.shorten(row, max_tokens=self.max_tokens, max_images=self.max_images)
            self._cuts[dataset, row] = kept or (0, 0, 0)
        return self._cuts[dataset, row]

    @cached_property
    def totals(self) -> Totals:
        """The epoch in numbers: plans every window once."""
        parts = [
            (
                len(window.dataset),
                len(window),
                *(
                    int(x.sum())
                    for x in (window.lengths.tokens, window.lengths.supervised, window.lengths.images)
                ),
                window.num_cut,
                window.num_left_out,
            )
            for window in self.windows()
        ]
        return Totals(*map(sum, zip(*parts, strict=True)), max_tokens=self.max_tokens)

    def num_steps(self, global_batch: int, *, tail: Tail = "drop") -> int:
        """Steps of the epoch."""
        packs = self.totals.num_packs
        return packs // global_batch if tail == "drop" else -(-packs // global_batch)

    # --- steps --------------------------------------------------------------------------------------------

    def steps(
        self,
        world_size: int = 1,
        *,
        global_batch: int,
        image_cost: float = IMAGE_COST,
        tail: Tail = "drop",
        start: Position = Position(),
    ) -> Iterator[Step]:
        """The steps of the epoch from ``start`` on.

        The packs of a step do not depend on ``world_size``. A last step with fewer than ``global_batch``
        packs is dropped, or kept (``tail="pad"``; ranks without a pack get an empty microbatch).
        """
        number, batch, after = 0, [], start
        for pack, after in self.packs(start):
            batch.append(pack)
            if len(batch) == global_batch:
                yield _step(number, batch, world_size, image_cost, after)
                number, batch = number + 1, []
        if batch and tail == "pad":
            yield _step(number, batch, world_size, image_cost, after)


def _step(number: int, packs: list[Pack], world_size: int, image_cost: float, after: Position) -> Step:
    costs = np.array([pack.num_tokens + image_cost * pack.image_load for pack in packs])
    ranks = tuple(map(tuple, deal(costs, world_size)))
    return Step(number, tuple(packs), ranks, after)


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
