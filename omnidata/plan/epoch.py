"""EpochPlan: index -> packs -> steps -> ranks, as pure functions of integers.

    plan = EpochPlan("data/llava", seed=0, epoch=0, max_tokens=4096)
    plan.windows()            (1) Blend.draw        the samples of a window, shuffled
                              (2) packing.pack      packs of at most max_tokens and max_images
                              (3) permutation       the packs of the window, shuffled
    plan.steps(world_size=8, global_batch=64)
                              (4) steps.runs        64 packs of like cost a step, for any number of ranks
                              (5) deal              to ranks, so that the work of each is even

A position in the epoch is a few integers (steps.Position). A window is made without those before it, so
resuming anywhere costs one window. No shard is opened.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from omnidata.plan import packing
from omnidata.plan.blend import SHUFFLED, Blend, Draw, Source
from omnidata.plan.catalog import Lengths
from omnidata.plan.order import permutation
from omnidata.plan.oversize import Oversize
from omnidata.plan.sources import open_sources
from omnidata.plan.steps import BEGIN, Position, Run, Step, deal, runs
from omnidata.plan.window import ATTENTION_COST, IMAGE_COST, Pack, Window
from omnidata.schema import UserError

WINDOW_SAMPLES = 1 << 17  # samples shuffled and packed together; about 12 MB of plan
ORDERED_SAMPLES = 1 << 10  # the same where a dataset has an order
ALGORITHM = 2  # of packing and order; part of the digest: no state goes on in another order
_PACK_ORDER = 0x9ACC  # keeps the order of packs unrelated to the order of samples

Tail = Literal["drop", "pad"]


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
        data: object,
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
        settings = (
            ALGORITHM,
            self.seed,
            self.max_tokens,
            self.max_images,
            self.oversize,
            self.window_samples,
        )
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
            lengths.tokens,
            lengths.images,
            max_tokens=self.max_tokens,
            max_images=self.max_images,
            pixels=lengths.pixels,
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

    def __iter__(self) -> Iterator[Pack]:
        """Every pack, in the order in which windows hold them; steps take them in another."""
        for window in self.windows():
            yield from map(window.pack, range(len(window)))

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
        sums: Iterator[int] = map(sum, zip(*parts, strict=True))
        samples, packs, tokens, supervised, images, cut, left_out = sums
        return Totals(samples, packs, tokens, supervised, images, cut, left_out, self.max_tokens)

    def num_steps(self, global_batch: int, *, tail: Tail = "drop") -> int:
        """Steps of the epoch."""
        packs = self.totals.num_packs
        return packs // global_batch if tail == "drop" else -(-packs // global_batch)

    # --- steps --------------------------------------------------------------------------------------------

    def runs(
        self, global_batch: int, *, start: Position = BEGIN, windows: Iterable[Window] | None = None
    ) -> Iterator[Run]:
        """What the steps take from ``start`` on; ``windows``: those from there on, if already made."""
        if windows is None:
            windows = self.windows(start.window)
        return runs(windows, start, global_batch, self.seed, self.epoch)

    def position(self, num_packs: int, global_batch: int) -> Position:
        """The position after so many packs of the epoch's steps, at its end if there are fewer."""
        position = BEGIN
        for run in self.runs(global_batch):
            position = run.after(min(num_packs, len(run.order)))
            if num_packs <= len(run.order):
                break
            num_packs -= len(run.order)
        return position

    def steps(
        self,
        world_size: int = 1,
        *,
        global_batch: int,
        image_cost: float = IMAGE_COST,
        attention_cost: float = ATTENTION_COST,
        tail: Tail = "drop",
        start: Position = BEGIN,
    ) -> Iterator[Step]:
        """The steps of the epoch from ``start`` on.

        The packs of a step depend on neither ``world_size`` nor the costs. A last step with fewer than
        ``global_batch`` packs is dropped, or kept (``tail="pad"``; ranks without a pack get an empty
        microbatch).
        """

        def step(packs: list[Pack], after: Position) -> Step:
            costs = np.array([pack.cost(image_cost, attention_cost) for pack in packs])
            return Step(number, tuple(packs), tuple(map(tuple, deal(costs, world_size))), after)

        number, packs, after = 0, [], start
        for run in self.runs(global_batch, start=start):
            for done in range(run.done, len(run.order)):
                packs.append(run.window.pack(run.order[done]))
                after = run.after(done + 1)
                if len(packs) == global_batch:
                    yield step(packs, after)
                    number, packs = number + 1, []
        if packs and tail == "pad":
            yield step(packs, after)
