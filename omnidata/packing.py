"""Packing: which samples share a pack, so that almost no position is padding.

Best fit, longest first: a sample goes into the fullest pack that still has room for its tokens and its
images, else into a new one. Samples of equal length and image count are interchangeable, so they are placed
together, class by class; a million lengths take about a second.

>>> pack_of, num_packs = best_fit(np.array([7, 5, 3, 3, 2]), np.zeros(5, int), max_tokens=10)
>>> pack_of.tolist(), num_packs                       # 7 + 3, 5 + 3 + 2
([0, 1, 0, 1, 1], 2)
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator

import numpy as np


def best_fit(
    tokens: np.ndarray, images: np.ndarray, *, max_tokens: int, max_images: int | None = None
) -> tuple[np.ndarray, int]:
    """Assign every sample to a pack.

    Args:
        tokens: ``[N]``, each at least 1 and at most ``max_tokens``.
        images: ``[N]``, each at most ``max_images``.
        max_tokens: tokens that a pack holds.
        max_images: images that a pack holds; None does not limit them.

    Returns:
        The pack of each sample, int64 ``[N]``, packs numbered by first use; and the number of packs.
    """
    tokens, images = np.asarray(tokens, np.int64), np.asarray(images, np.int64)
    if max_images is None:  # a limit of zero on zero images costs nothing and binds nothing
        images, max_images = np.zeros_like(tokens), 0
    assert len(tokens) == len(images)
    if len(tokens):
        assert tokens.min() >= 1 and tokens.max() <= max_tokens and images.max() <= max_images
    order = np.argsort(-(tokens * (max_images + 1) + images), kind="stable")
    placed: list[int] = []  # the pack of each sample, in ``order``
    room = _Room(max_tokens, max_images)
    for num_tokens, num_images, count in _classes(tokens[order], images[order]):
        placed += room.place(num_tokens, num_images, count)
    pack_of = np.empty(len(tokens), np.int64)
    pack_of[order] = placed
    return pack_of, room.num_packs


def _classes(tokens: np.ndarray, images: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Runs of equal (tokens, images) as (tokens, images, how many)."""
    changes = np.flatnonzero((np.diff(tokens) != 0) | (np.diff(images) != 0)) + 1
    starts = np.concatenate(([0], changes)) if len(tokens) else changes
    counts = np.diff(np.append(starts, len(tokens)))
    yield from zip(tokens[starts].tolist(), images[starts].tolist(), counts.tolist(), strict=True)


class _Room:
    """Open packs by what they still hold: ``packs[free tokens][free images]`` lists them.

    Packs without room for an image serve text alone, so they are kept apart: no search for a place for
    an image wades through them.
    """

    def __init__(self, max_tokens: int, max_images: int) -> None:
        self.max_tokens, self.max_images = max_tokens, max_images
        self.num_packs = 0
        self._packs: tuple[dict, dict] = ({}, {})  # [no room for images, room for some]
        self._free: tuple[list[int], list[int]] = ([], [])  # the sorted keys of each

    def place(self, tokens: int, images: int, count: int) -> list[int]:
        """Place ``count`` equal samples; return the pack of each."""
        placed: list[int] = []
        while left := count - len(placed):
            found = self._tightest(tokens, images)
            free_tokens, free_images = found or self._open(tokens, images, left)
            # The tightest pack stays the tightest while it has room, so it takes all that it can hold.
            each = free_tokens // tokens if not images else min(free_tokens // tokens, free_images // images)
            number, each = (left // each, each) if left >= each else (1, left)
            packs = self._remove(free_tokens, free_images, number)
            self._add(free_tokens - each * tokens, free_images - each * images, packs)
            placed += packs if each == 1 else [pack for pack in packs for _ in range(each)]
        return placed

    def _tightest(self, tokens: int, images: int) -> tuple[int, int] | None:
        """Of the open packs with enough room, what the one with the fewest free tokens has free."""
        best = None
        for packs, free in zip(self._packs[images > 0 :], self._free[images > 0 :], strict=True):
            for position in range(bisect_left(free, tokens), len(free)):
                free_tokens = free[position]
                if best and free_tokens >= best[0]:
                    break
                enough = [free_images for free_images in packs[free_tokens] if free_images >= images]
                if enough:
                    best = free_tokens, min(enough)
                    break
        return best

    def _open(self, tokens: int, images: int, count: int) -> tuple[int, int]:
        """Open as many packs as ``count`` such samples need."""
        each = min(self.max_tokens // tokens, self.max_images // images if images else count)
        needed = -(-count // max(each, 1))
        self._add(self.max_tokens, self.max_images, range(self.num_packs, self.num_packs + needed))
        self.num_packs += needed
        return self.max_tokens, self.max_images

    def _add(self, free_tokens: int, free_images: int, new: Iterable[int]) -> None:
        packs, free = self._packs[free_images > 0], self._free[free_images > 0]
        if free_tokens == 0:
            return  # full
        if free_tokens not in packs:
            packs[free_tokens] = {}
            insort(free, free_tokens)
        packs[free_tokens].setdefault(free_images, []).extend(new)

    def _remove(self, free_tokens: int, free_images: int, number: int) -> list[int]:
        """At most ``number`` of the packs with exactly this room, oldest first."""
        packs, free = self._packs[free_images > 0], self._free[free_images > 0]
        same = packs[free_tokens][free_images]
        removed = same[:number]
        del same[:number]
        if not same:
            del packs[free_tokens][free_images]
            if not packs[free_tokens]:
                del packs[free_tokens], free[bisect_left(free, free_tokens)]
        return removed
