"""Blend: several datasets as one sequence of samples.

Every dataset is an endless stream: all its samples in a shuffled order, then all of them again in another
order, and so on; so each is exhausted before it repeats. An epoch of the blend takes the next stretch of
every stream, and a window takes the same share of each of these stretches::

    dataset 0, 2 epochs    |0 . . . . . . . . .|. . . . . . . . . .|
    dataset 1, 1 epoch     |1 . . . . .|
    windows                [ w0 ][ w1 ][ w2 ][ w3 ][ w4 ]             each has 2 : 1 passes of both

All of it is integer arithmetic on (epoch, window), so any window can be made without those before it.

A stream's order: its shards are permuted, gathered in groups of about ``window_samples`` samples, and the
samples of a group are permuted. Memory is bounded by the window, reads stay within few shards.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from omnidata.plan.catalog import Catalog, Lengths
from omnidata.plan.order import permutation
from omnidata.schema import UserError


@dataclass(frozen=True, slots=True)
class Source:
    """One dataset of a blend; ``weight`` or ``epochs``, not both, and the same kind for the whole blend."""

    catalog: Catalog
    weight: float | None = None  # share of the samples of an epoch, relative to the other weights
    epochs: float | None = None  # passes over the dataset in one epoch of the blend


def quotas(sources: list[Source]) -> list[Fraction]:
    """Samples that each dataset gives to one epoch, exact.

    With weights an epoch has as many samples as all the datasets together.

    Example: 300 and 100 samples at weights 1 and 1 give 200 and 200; at epochs 1 and 2, 300 and 200.
    """
    sizes = [int(source.catalog.shard_sizes.sum()) for source in sources]
    for source, size in zip(sources, sizes, strict=True):
        _check(source, size)
    weights = [source.weight for source in sources]
    if all(weight is None for weight in weights):
        return [_fraction(source.epochs or 1) * n for source, n in zip(sources, sizes, strict=True)]
    if any(weight is None for weight in weights):
        raise UserError(
            "every dataset of a blend needs a `weight`, or none does (then `epochs` counts, 1 each)"
        )
    total = sum(map(_fraction, weights))
    return [_fraction(weight) * sum(sizes) / total for weight in weights]


def _check(source: Source, size: int) -> None:
    name = source.catalog.name
    if not size:
        raise UserError(f"{name} has no sample left to train on: see its `where` and `exclude`")
    if source.weight is not None and source.epochs is not None:
        raise UserError(f"{name} has both `weight` and `epochs`: give one of them")
    for what in ("weight", "epochs"):
        value = getattr(source, what)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{name}: `{what}` is {value}, it must be positive")


def _fraction(value: float) -> Fraction:
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

    def __init__(self, catalog: Catalog, *, seed: int, number: int, window_samples: int) -> None:
        self.catalog, self.number = catalog, number
        self._key = (seed, number)
        self._window_samples = window_samples
        self._size = int(catalog.shard_sizes.sum())
        self._layouts: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self._groups: dict[tuple[int, int], Lengths] = {}  # the last two: neighbouring windows share one

    def take(self, start: int, stop: int) -> Iterator[tuple[int, Lengths]]:
        """Positions ``[start, stop)`` of the stream as (pass, lengths) pieces."""
        while start < stop:
            number, within = divmod(start, self._size)
            _, _, ends = self._layout(number)
            group = int(np.searchsorted(ends, within, side="right"))
            first = int(ends[group - 1]) if group else 0
            upto = min(int(ends[group]), within + stop - start)
            lengths = self._group(number, group)
            yield number, lengths.take(np.arange(within - first, upto - first))
            start += upto - within

    def _layout(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pass ``number``: its shards in order, the shard that ends each group, and where groups end."""
        if number not in self._layouts:
            shards = permutation(len(self.catalog.shard_sizes), *self._key, number)
            ends = np.cumsum(self.catalog.shard_sizes[shards])
            num_groups = max(1, round(self._size / self._window_samples))
            targets = np.arange(1, num_groups + 1) * self._size // num_groups
            last_shards = np.unique(np.searchsorted(ends, targets))
            self._layouts = {number: (shards, last_shards, ends[last_shards])}
        return self._layouts[number]

    def _group(self, number: int, group: int) -> Lengths:
        if (number, group) not in self._groups:
            shards, last_shards, _ = self._layout(number)
            first = last_shards[group - 1] + 1 if group else 0
            lengths = self.catalog.read(shards[first : last_shards[group] + 1])
            shuffled = lengths.take(permutation(len(lengths.rows), *self._key, number, group))
            self._groups = dict([*self._groups.items(), ((number, group), shuffled)][-2:])
        return self._groups[number, group]


class Blend:
    """The samples of an epoch, window by window."""

    def __init__(self, sources: list[Source], *, seed: int, epoch: int, window_samples: int) -> None:
        self._streams = [
            Stream(source.catalog, seed=seed, number=number, window_samples=window_samples)
            for number, source in enumerate(sources)
        ]
        spans = [(int(epoch * quota), int((epoch + 1) * quota)) for quota in quotas(sources)]
        self.spans = spans  # the stretch of each stream that this epoch takes
        self.num_samples = sum(stop - start for start, stop in spans)
        self.num_windows = max(1, round(self.num_samples / window_samples))

    def draw(self, window: int) -> Draw:
        """The samples of one window."""
        pieces = []
        for stream, (start, stop) in zip(self._streams, self.spans, strict=True):
            cut = [start + (stop - start) * edge // self.num_windows for edge in (window, window + 1)]
            pieces += [(stream.number, number, lengths) for number, lengths in stream.take(*cut)]
        counts = [len(lengths.rows) for _, _, lengths in pieces]
        columns = [
            np.concatenate([getattr(piece, name) for *_, piece in pieces]) for name in Lengths.__slots__
        ]
        return Draw(
            dataset=np.repeat(np.array([number for number, _, _ in pieces], np.int64), counts),
            passes=np.repeat(np.array([number for _, number, _ in pieces], np.int64), counts),
            lengths=Lengths(*columns),
        )
