"""Pairs: near duplicates among many samples, without comparing all with all.

    samples with equal hashes of text are one group     compared with the group's leaders, picture by picture
    groups that share a band of MinHash numbers          compared if the texts are near, leaders with leaders

Two samples are near duplicates if their texts are (``similarity``), what must be equal is, and they have as
many pictures, each near the other's of its place (``distance``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from omnidata.near.hashing import IMAGE_WORDS, MAX_COLOUR, MAX_DISTANCE, NUM_NUMBERS, a_colour, distances

MIN_SIMILARITY = 0.7  # share of the runs of five characters that near texts have in common
BAND = 4  # numbers of a band: 16 bands find 99.9 % of the pairs with a similarity of 0.8
MAX_BUCKET = 200  # groups of one band that are compared with all the others


class Pair(NamedTuple):
    """A near duplicate and the sample that it repeats."""

    first: int
    second: int  # comes later
    similarity: float  # of the texts, estimated: 0 to 1
    distance: int  # of their least alike pictures, bits of 256; 0 without pictures


@dataclass(frozen=True, eq=False)
class Hashes:
    """Of N samples, in corpus order."""

    equal: np.ndarray  # uint64 [N]: what must be equal
    numbers: np.ndarray  # uint16 [N, NUM_NUMBERS]
    images: np.ndarray  # uint64 [M, IMAGE_WORDS], sample by sample
    starts: np.ndarray  # int64 [N + 1]: a sample's images are images[starts[i]:starts[i + 1]]

    def images_of(self, sample: int) -> np.ndarray:
        """Hashes of a sample's pictures."""
        return self.images[self.starts[sample] : self.starts[sample + 1]]

    def distance(self, first: int, second: int) -> int | None:
        """The largest of two samples' pictures; None: too large, or another number of pictures."""
        mine, other = self.images_of(first), self.images_of(second)
        if len(mine) != len(other):
            return None
        most = int(distances(mine, other).max(initial=0))
        return most if most <= MAX_DISTANCE else None


def near_pairs(hashes: Hashes) -> list[Pair]:
    """Every sample that repeats one further in front, with that one; sorted by ``second``.

    A sample that is itself a repeat has no repeats of its own: what is near it is compared with the others.
    """
    repeats: dict[int, Pair] = {}
    leaders: dict[int, list[int]] = {}  # first member of a group -> its members that repeat none of the group
    for members in _groups(hashes):
        group = _Leaders(len(hashes.images_of(members[0])))
        leaders[members[0]] = group.samples
        for sample in members:
            found = group.nearest(hashes.images_of(sample))
            if found is None:
                group.add(sample, hashes.images_of(sample))
            else:
                repeats[sample] = Pair(found[0], sample, 1.0, found[1])
    edges: dict[int, list[Pair]] = defaultdict(list)
    for one, other, similarity in _near_groups(hashes, sorted(leaders)):
        for sample in leaders[one]:
            for second in leaders[other]:
                distance = hashes.distance(sample, second)
                if distance is not None:
                    first, last = sorted((sample, second))
                    edges[last].append(Pair(first, last, similarity, distance))
    for second in sorted(edges):
        kept = [pair for pair in edges[second] if pair.first not in repeats]
        if kept:
            repeats[second] = max(kept, key=lambda pair: (pair.similarity, -pair.distance, -pair.first))
    return [_rooted(repeats, pair) for _, pair in sorted(repeats.items())]


def _rooted(repeats: dict[int, Pair], pair: Pair) -> Pair:
    """The pair with a sample that stays: a leader may have become a repeat of another group's."""
    while pair.first in repeats:
        pair = pair._replace(first=repeats[pair.first].first)
    return pair


def _groups(hashes: Hashes) -> Iterator[list[int]]:
    """Samples with equal hashes of text and as many pictures, ascending; groups by their first."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    counts = np.diff(hashes.starts)
    for sample, numbers in enumerate(hashes.numbers):
        groups[hashes.equal[sample].tobytes() + counts[sample].tobytes() + numbers.tobytes()].append(sample)
    yield from groups.values()


class _Leaders:
    """The samples of a group that repeat none of it, with their pictures side by side."""

    def __init__(self, num_images: int) -> None:
        self.samples: list[int] = []
        self._images = np.zeros((1, num_images, IMAGE_WORDS), np.uint64)
        self._colours = np.zeros(1, np.int16)  # one of the first picture's: passes over most at once

    def add(self, sample: int, images: np.ndarray) -> None:
        """One more."""
        if len(self.samples) == len(self._images):
            self._images = np.concatenate([self._images, np.zeros_like(self._images)])
            self._colours = np.concatenate([self._colours, np.zeros_like(self._colours)])
        self._images[len(self.samples)] = images
        self._colours[len(self.samples)] = a_colour(images)
        self.samples.append(sample)

    def nearest(self, images: np.ndarray) -> tuple[int, int] | None:
        """The first that is near a sample with these pictures, and how far it is."""
        if not self.samples:
            return None
        if not len(images):
            return self.samples[0], 0
        apart = np.abs(self._colours[: len(self.samples)] - a_colour(images))
        alike = np.flatnonzero(apart <= MAX_COLOUR)
        most = distances(self._images[alike], images).max(axis=1)
        near = np.flatnonzero(most <= MAX_DISTANCE)
        return (self.samples[alike[near[0]]], int(most[near[0]])) if len(near) else None


def _near_groups(hashes: Hashes, firsts: list[int]) -> Iterator[tuple[int, int, float]]:
    """Pairs of groups (by their first members) whose texts are near, each once, and how near."""
    numbers, equal = hashes.numbers[firsts], hashes.equal[firsts]
    counts = np.diff(hashes.starts)[firsts]
    seen: set[tuple[int, int]] = set()
    for band in range(0, NUM_NUMBERS, BAND):
        key = np.ascontiguousarray(numbers[:, band : band + BAND]).view(np.uint64).ravel()
        order = np.lexsort((np.arange(len(key)), counts, equal, key))
        same = (np.diff(key[order]) == 0) & (np.diff(equal[order]) == 0) & (np.diff(counts[order]) == 0)
        starts = np.concatenate(([0], np.flatnonzero(~same) + 1, [len(order)]))
        for run in np.flatnonzero(np.diff(starts) > 1).tolist():
            bucket = order[starts[run] : starts[run + 1]]
            for at, one in enumerate(bucket[:MAX_BUCKET].tolist()):
                others = bucket[at + 1 :]
                similar = (numbers[others] == numbers[one]).mean(axis=1)
                for other, similarity in zip(others.tolist(), similar.tolist(), strict=True):
                    if similarity >= MIN_SIMILARITY and (one, other) not in seen:
                        seen.add((one, other))
                        yield firsts[one], firsts[other], round(similarity, 3)
