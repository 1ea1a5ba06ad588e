"""Layout: which samples go to which shard, from the index alone, before any byte is copied.

In each split the inputs follow each other, each in the order of its index::

    train-00000: a train 0..990, b train 0..10      val-00000: a val 0..10, b val 0..15
    train-00001: b train 10..985
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from omnidata.builder.layout import AUTO_SHARDS, MAX_AUTO_BYTES, MAX_AUTO_SAMPLES, MIN_AUTO_BYTES
from omnidata.copier.settings import CopySettings
from omnidata.schema import shard_name


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """Rows of one input's index, ascending."""

    input: int
    rows: np.ndarray  # int64


@dataclass(frozen=True, slots=True, eq=False)
class CopyTask:
    """One shard to write."""

    split: str
    number: int
    selections: tuple[Selection, ...]
    num_bytes: int  # of its samples

    @property
    def path(self) -> str:
        """The shard's path in the dataset."""
        return shard_name(self.split, self.number)

    @property
    def num_samples(self) -> int:
        """Samples that it will hold."""
        return sum(len(selection.rows) for selection in self.selections)

    def __str__(self) -> str:
        return self.path


def cut_shards(
    chosen: Sequence[dict[str, np.ndarray]], nbytes: Sequence[np.ndarray], settings: CopySettings
) -> list[CopyTask]:
    """All shards, split by split: train first, then in the order in which the inputs name them.

    Args:
        chosen: of each input, split -> the rows to copy, ascending.
        nbytes: of each input, the bytes of every row of its index.
    """
    total = sum(
        int(sizes[rows].sum())
        for by_split, sizes in zip(chosen, nbytes, strict=True)
        for rows in by_split.values()
    )
    room, most = _limits(total, settings)
    tasks = []
    for split in splits_of(chosen):
        mine = [by_split.get(split, np.zeros(0, np.int64)) for by_split in chosen]
        rows = np.concatenate(mine)
        owners = np.repeat(np.arange(len(mine)), [len(each) for each in mine])
        sizes = np.concatenate([sizes[each] for sizes, each in zip(nbytes, mine, strict=True)])
        for number, (start, stop) in enumerate(cuts(sizes, room, most)):
            selections = tuple(
                Selection(int(owner), rows[start:stop][owners[start:stop] == owner])
                for owner in np.unique(owners[start:stop])
            )
            tasks.append(CopyTask(split, number, selections, int(sizes[start:stop].sum())))
    return tasks


def splits_of(chosen: Sequence[dict[str, np.ndarray]]) -> list[str]:
    """The splits that hold a sample: train first, then in the order of the inputs."""
    names = dict.fromkeys(split for by_split in chosen for split, rows in by_split.items() if len(rows))
    return sorted(names, key=lambda split: split != "train")


def _limits(total: int, settings: CopySettings) -> tuple[int, int]:
    """Bytes and samples that a shard may hold; as a build cuts a corpus whose sizes are known."""
    if settings.samples_per_shard:
        return 1 << 62, settings.samples_per_shard
    if settings.shard_bytes:
        return settings.shard_bytes, 1 << 62
    return min(MAX_AUTO_BYTES, max(MIN_AUTO_BYTES, total // AUTO_SHARDS)), MAX_AUTO_SAMPLES


def cuts(sizes: np.ndarray, room: int, most: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of runs of at most ``room`` bytes and ``most`` samples; of one sample if that is larger.

    >>> list(cuts(np.array([3, 3, 3, 9, 1]), room=6, most=10))
    [(0, 2), (2, 3), (3, 4), (4, 5)]
    """
    ends, start = np.cumsum(sizes, dtype=np.int64), 0
    while start < len(sizes):
        used = int(ends[start - 1]) if start else 0
        stop = int(np.searchsorted(ends, used + room, side="right"))
        stop = max(start + 1, min(stop, start + most))
        yield start, stop
        start = stop
