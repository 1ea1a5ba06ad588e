"""Blend: several datasets as one sequence of samples.

Every dataset is an endless stream: all its samples in a shuffled order, then all of them again in another
order, and so on; so each is exhausted before it repeats. An epoch of the blend takes the next stretch of
every stream, and a window takes the same share of each of these stretches::

    dataset 0, 2 epochs    |0 . . . . . . . . .|. . . . . . . . . .|
    dataset 1, 1 epoch     |1 . . . . .|
    windows                [ w0 ][ w1 ][ w2 ][ w3 ][ w4 ]             each has 2 : 1 passes of both

All of it is integer arithmetic on (epoch, window), so any window can be made without those before it.

A stream's order: its shards are permuted, gathered in groups of about ``window_samples`` samples, and the
samples of a group are permuted. Memory is bounded by the window, reads stay within few shards. A stream with
an ``order`` is sorted by a column instead, ties shuffled, and its lengths are held whole: 40 bytes each.

With ``cap`` every pass is over another part of the dataset (cap.py); with ``weights`` the stretches of an
epoch follow from a schedule (phases.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from omnidata.plan.cap import Cap
from omnidata.plan.catalog import Catalog, IndexCatalog, Lengths
from omnidata.plan.order import permutation
from omnidata.plan.phases import Phase, Schedule
from omnidata.schema import UserError

SHUFFLED, LENGTH = "shuffled", "length"
_CAP = 0xCA9  # keeps what a pass takes unrelated to its order


@dataclass(frozen=True, slots=True)
class Source:
    """One dataset of a blend; ``weight(s)`` or ``epochs``, the same kind for the whole blend."""

    catalog: Catalog
    weight: float | None = None  # share of the samples of an epoch, relative to the other weights
    epochs: float | None = None  # passes over the dataset in one epoch of the blend
    weights: tuple[Phase, ...] = ()  # weights that change over the run
    cap: int | None = None  # samples of one pass …
    cap_by: str | None = None  # … of each value of this column
    order: str = SHUFFLED  # or "length", or a column; "-length": the longest first

    @property
    def extras(self) -> tuple[Any, ...]:
        """What decides the order besides catalog and share; empty if nothing does."""
        given = (self.weights, self.cap, self.cap_by, self.order)
        return () if given == ((), None, None, SHUFFLED) else given

    def __post_init__(self) -> None:
        if self.cap is None and self.cap_by is None:
            return
        if type(self.cap) is not int or self.cap < 1:
            name = self.catalog.name
            raise UserError(
                f"{name}: `cap` is {self.cap}; give a number of samples (of each value of `cap_by`)"
            )

    @property
    def index(self) -> IndexCatalog:
        """The catalog of a dataset that can be read; TypeError if this one is of lengths alone."""
        if not isinstance(self.catalog, IndexCatalog):
            raise TypeError(f"{self.catalog.name}: {type(self.catalog).__name__} has no samples to read")
        return self.catalog

    def capped(self, seed: int, number: int) -> Cap:
        """Which samples each pass takes; there is a ``cap``."""
        assert self.cap is not None, "asked only of a source with a cap"
        rows, codes = self.catalog.values(self.cap_by)
        return Cap(min(self.cap, len(rows)), rows, codes, key=(seed, number, _CAP))


def quotas(sources: list[Source], sizes: list[int] | None = None) -> list[Fraction]:
    """Samples that each dataset gives to one epoch, exact; of weights that change, in the first phase.

    With weights an epoch has as many samples as all the datasets together.

    Example: 300 and 100 samples at weights 1 and 1 give 200 and 200; at epochs 1 and 2, 300 and 200.
    """
    sizes = sizes or [int(source.catalog.shard_sizes.sum()) for source in sources]
    for source, size in zip(sources, sizes, strict=True):
        _check(source, size)
    weights = [source.weights[0].weight if source.weights else source.weight for source in sources]
    given = [_fraction(weight) for weight in weights if weight is not None]
    if not given:
        return [_fraction(source.epochs or 1) * n for source, n in zip(sources, sizes, strict=True)]
    if len(given) < len(weights):
        raise UserError(
            "every dataset of a blend needs a `weight`, or none does (then `epochs` counts, 1 each)"
        )
    total = sum(given)
    if not total:
        return [Fraction(0)] * len(sources)  # the schedule says when
    return [weight * sum(sizes) / total for weight in given]


def _check(source: Source, size: int) -> None:
    name = source.catalog.name
    if not size:
        raise UserError(f"{name} has no sample left to train on: see its `where` and `exclude`")
    given = [what for what in ("weight", "weights", "epochs") if getattr(source, what) not in (None, ())]
    if len(given) > 1:
        raise UserError(f"{name} has both `{given[0]}` and `{given[1]}`: give one of them")
    for what in ("weight", "epochs"):
        value = getattr(source, what)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise UserError(f"{name}: `{what}` is {value!r}, it must be a positive number")


def _fraction(value: float | Fraction) -> Fraction:
    """What the user wrote: 0.1 is 1/10, not the nearest binary fraction."""
    return Fraction(str(value))


@dataclass(frozen=True, slots=True, eq=False)
class Draw:
    """Samples of one window, in stream order; parallel int64 ``[N]``."""

    dataset: np.ndarray  # position in the blend
    passes: np.ndarray  # how many times the dataset had been exhausted before
    lengths: Lengths

    def take(self, positions: np.ndarray) -> Draw:
        """The samples at ``positions``, in that order."""
        return Draw(self.dataset[positions], self.passes[positions], self.lengths.take(positions))


class Stream:
    """The endless order of one dataset: a function of (seed, number of the dataset in the blend)."""

    def __init__(self, source: Source, *, seed: int, number: int, window_samples: int) -> None:
        self.catalog, self.number = source.catalog, number
        self._key = (seed, number)
        self._window_samples = window_samples
        self._cap = source.capped(seed, number) if source.cap is not None else None
        self._order = source.order
        self.size = self._cap.size if self._cap else int(source.catalog.shard_sizes.sum())
        self._passes: dict[int, Catalog] = {}
        self._layouts: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self._groups: dict[tuple[int, int], Lengths] = {}  # the last two: neighbouring windows share one

    def take(self, start: int, stop: int) -> Iterator[tuple[int, Lengths]]:
        """Positions ``[start, stop)`` of the stream as (pass, lengths) pieces."""
        while start < stop:
            number, within = divmod(start, self.size)
            _, _, ends = self._layout(number)
            group = int(np.searchsorted(ends, within, side="right"))
            first = int(ends[group - 1]) if group else 0
            upto = min(int(ends[group]), within + stop - start)
            lengths = self._group(number, group)
            yield number, lengths.take(np.arange(within - first, upto - first))
            start += upto - within

    def _of_pass(self, number: int) -> Catalog:
        """What pass ``number`` goes over."""
        if self._cap is None:
            return self.catalog
        if number not in self._passes:
            self._passes = {number: self.catalog.subset(self._cap.rows_of(number))}
        return self._passes[number]

    def _layout(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pass ``number``: its shards in order, the shard that ends each group, and where groups end."""
        if number not in self._layouts:
            sizes = self._of_pass(number).shard_sizes
            shards = permutation(len(sizes), *self._key, number)
            ends = np.cumsum(sizes[shards])
            num_groups = max(1, round(self.size / self._window_samples))
            if self._order != SHUFFLED:
                num_groups = 1
            targets = np.arange(1, num_groups + 1) * self.size // num_groups
            last_shards = np.unique(np.searchsorted(ends, targets))
            self._layouts = {number: (shards, last_shards, ends[last_shards])}
        return self._layouts[number]

    def _group(self, number: int, group: int) -> Lengths:
        if (number, group) not in self._groups:
            shards, last_shards, _ = self._layout(number)
            first = last_shards[group - 1] + 1 if group else 0
            lengths = self._of_pass(number).read(shards[first : last_shards[group] + 1].tolist())
            shuffled = lengths.take(permutation(len(lengths.rows), *self._key, number, group))
            shuffled = self._sorted(shuffled)
            self._groups = dict([*self._groups.items(), ((number, group), shuffled)][-2:])
        return self._groups[number, group]

    def _sorted(self, lengths: Lengths) -> Lengths:
        """By the stream's order; those without a value last, ties as they stand."""
        if self._order == SHUFFLED:
            return lengths
        column, sign = self._order.removeprefix("-"), -1 if self._order.startswith("-") else 1
        values = lengths.tokens if column == LENGTH else self.catalog.numbers_of(column, lengths.rows)
        return lengths.take(np.argsort(sign * values.astype(np.float64), kind="stable"))


class Blend:
    """The samples of an epoch, window by window.

    Args:
        sources: the datasets.
        window_samples: samples that are shuffled together …
        draw_samples: … and samples of one window; fewer where an order must show.
    """

    def __init__(
        self,
        sources: list[Source],
        *,
        seed: int,
        epoch: int,
        window_samples: int,
        draw_samples: int | None = None,
    ) -> None:
        self._streams = [
            Stream(source, seed=seed, number=number, window_samples=window_samples)
            for number, source in enumerate(sources)
        ]
        sizes = [stream.size for stream in self._streams]
        self.shares = shares = quotas(sources, sizes)
        draw_samples = draw_samples or window_samples
        if any(source.weights for source in sources):
            edges = _scheduled(sources, sizes, epoch, draw_samples)
        else:
            spans = [(int(epoch * quota), int((epoch + 1) * quota)) for quota in shares]
            num_windows = max(1, round(sum(stop - start for start, stop in spans) / draw_samples))
            edges = [
                [start + (stop - start) * edge // num_windows for edge in range(num_windows + 1)]
                for start, stop in spans
            ]
        self._edges = edges  # of each stream, where windows begin and the last one ends
        self.num_samples = sum(edge[-1] - edge[0] for edge in edges)
        self.num_windows = len(edges[0]) - 1

    def draw(self, window: int) -> Draw:
        """The samples of one window."""
        pieces = []
        for stream, edges in zip(self._streams, self._edges, strict=True):
            found = stream.take(edges[window], edges[window + 1])
            pieces += [(stream.number, number, lengths) for number, lengths in found]
        counts = [len(lengths.rows) for _, _, lengths in pieces]
        columns = [
            np.concatenate([getattr(piece, name) for *_, piece in pieces]) for name in Lengths.__slots__
        ]
        return Draw(
            dataset=np.repeat(np.array([number for number, _, _ in pieces], np.int64), counts),
            passes=np.repeat(np.array([number for _, number, _ in pieces], np.int64), counts),
            lengths=Lengths(*columns),
        )


def _scheduled(sources: list[Source], sizes: list[int], epoch: int, draw_samples: int) -> list[list[int]]:
    """Of each stream, where the windows of an epoch with changing weights begin and the last one ends."""
    phases = [source.weights or (_constant(source),) for source in sources]
    names = [source.catalog.name for source in sources]
    schedule = Schedule(phases, total=sum(sizes), names=names)
    num_windows = max(1, round(sum(sizes) / draw_samples))
    times = {epoch + Fraction(edge, num_windows) for edge in range(num_windows + 1)}
    times |= {time for time in schedule.times if epoch < time < epoch + 1}
    rows: list[list[int]] = []
    for time in sorted(times):
        row = [schedule.given(number, time) for number in range(len(sources))]
        if not rows or sum(row) > sum(rows[-1]):  # a window has a sample
            rows.append(row)
    return [list(column) for column in zip(*rows, strict=True)]


def _constant(source: Source) -> Phase:
    assert source.weight is not None, "quotas() refuses a blend in which some have weights and others none"
    return Phase(None, _fraction(source.weight))
