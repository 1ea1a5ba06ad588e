"""Packing: which samples share a pack, so that almost no position is padding and no pack is an outlier.

Two ways, and ``pack`` takes the better for the samples at hand:

``best_fit``  longest first, each into the fullest pack that still has room for its tokens and images. The
              least padding; but the short samples, dense in images, end up together.
``even_fit``  longest first, dealt round by round to all the packs at once, the longest of a round to the
              pack that has least so far; then packs exchange samples until all hold as many tokens and as
              many pixels (exchange.py). All cost the same, whatever a pixel costs, which is what ranks that
              wait for each other need. What does not fit is placed by best fit.

Even packs are worth a little padding: ``pack`` takes them unless they need over 2 % more packs. Without any
image full packs are even, and it takes the fewest.

>>> pack_of, num_packs = best_fit(np.array([7, 5, 3, 3, 2]), np.zeros(5, int), max_tokens=10)
>>> pack_of.tolist(), num_packs                       # 7 + 3, 5 + 3 + 2
([0, 1, 0, 1, 1], 2)
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator

import numpy as np

from omnidata.plan.exchange import Amount, exchange

EVENNESS = 1.02  # times the packs of best fit that even packs may take
_TARGET_FILL = 0.993  # of the packs that even_fit deals to: a little slack saves many misfits
_MOST_IMAGES = 1.3  # times the images of the mean pack that an even pack may hold
_TOKENS_WEIGH = 4.0  # evenness of tokens, beside that of pixels: packs are nearly full

Packed = tuple[np.ndarray, int]  # the pack of each sample, int64 [N]; and the number of packs


def pack(
    tokens: np.ndarray,
    images: np.ndarray,
    *,
    max_tokens: int,
    max_images: int | None = None,
    pixels: np.ndarray | None = None,
) -> Packed:
    """Assign every sample to a pack: even packs if they are almost as few, else the fewest.

    Args:
        tokens: ``[N]``, each at least 1 and at most ``max_tokens``.
        images: ``[N]``, each at most ``max_images``.
        max_tokens: tokens that a pack holds.
        max_images: images that a pack holds; None does not limit them.
        pixels: ``[N]``, values of the images' pixel tensors; None: all images have as many.
    """
    if not np.any(images):
        return best_fit(tokens, images, max_tokens=max_tokens)
    even = even_fit(tokens, images, max_tokens=max_tokens, max_images=max_images, pixels=pixels)
    bound = max(np.sum(tokens) / max_tokens, np.sum(images) / (max_images or np.inf))
    if even[1] <= EVENNESS * bound:  # no packing takes fewer than ``bound``
        return even
    fewest = best_fit(tokens, images, max_tokens=max_tokens, max_images=max_images)
    return even if even[1] <= EVENNESS * fewest[1] else fewest


def best_fit(
    tokens: np.ndarray, images: np.ndarray, *, max_tokens: int, max_images: int | None = None
) -> Packed:
    """Best fit, longest first. Equal samples are placed together: a million take half a second."""
    tokens, images, max_images = _checked(tokens, images, max_tokens, max_images)
    room = _Room(max_tokens, max_images)
    pack_of = np.empty(len(tokens), np.int64)
    _place(np.arange(len(tokens)), tokens, images, room, pack_of)
    return pack_of, room.num_packs


def even_fit(
    tokens: np.ndarray,
    images: np.ndarray,
    *,
    max_tokens: int,
    max_images: int | None = None,
    pixels: np.ndarray | None = None,
) -> Packed:
    """Deal samples to few more packs than they need at least, even them out, place the rest by best fit."""
    tokens, images = np.asarray(tokens, np.int64), np.asarray(images, np.int64)
    bound = np.inf if max_images is None else max(max_images, 1)
    needed = max(tokens.sum() / max_tokens, images.sum() / bound)
    num_packs = min(len(tokens), max(int(np.ceil(needed)), round(needed / _TARGET_FILL)))
    pack_of = exchange(
        _deal(tokens, num_packs),
        num_packs,
        [
            Amount(tokens, _TOKENS_WEIGH, max_tokens),
            Amount(images if pixels is None else np.asarray(pixels, np.int64), 1.0),
            Amount(images, 0.0, bound),
        ],
    )
    # No pack may end with many more images than the mean one, limited or not: ranks would wait for it.
    most = int(max(_MOST_IMAGES * images.sum() / max(needed, 1), images.max(initial=1))) + 1
    tokens, images, max_images = _checked(
        tokens, images, max_tokens, most if max_images is None else min(most, max(max_images, 1))
    )
    misfits = _misfits(pack_of, tokens, images, max_tokens, max_images)
    if len(misfits):
        fitting = np.ones(len(tokens), bool)
        fitting[misfits] = False
        used = [
            np.bincount(pack_of[fitting], x[fitting], num_packs).astype(np.int64) for x in (tokens, images)
        ]
        room = _Room(max_tokens, max_images)
        room.open_used(*used)
        _place(misfits, tokens, images, room, pack_of)
    is_used = np.bincount(pack_of) > 0  # samples that moved may leave a pack empty
    return (np.cumsum(is_used) - 1)[pack_of], int(np.count_nonzero(is_used))


def _checked(
    tokens: np.ndarray, images: np.ndarray, max_tokens: int, max_images: int | None
) -> tuple[np.ndarray, np.ndarray, int]:
    tokens, images = np.asarray(tokens, np.int64), np.asarray(images, np.int64)
    if max_images is None:  # a limit of zero on zero images binds nothing
        images, max_images = np.zeros_like(tokens), 0
    if len(tokens):
        assert tokens.min() >= 1 and tokens.max() <= max_tokens and images.max() <= max_images
    return tokens, images, max_images


def _deal(tokens: np.ndarray, num_packs: int) -> np.ndarray:
    """Round by round, longest samples first: the longest of a round to the pack that has least so far."""
    order = np.argsort(-tokens, kind="stable")
    held = np.zeros(num_packs, np.int64)
    pack_of = np.empty(len(tokens), np.int64)
    for start in range(0, len(order), max(num_packs, 1)):
        samples = order[start : start + num_packs]
        packs = np.argsort(held, kind="stable")[: len(samples)]
        pack_of[samples] = packs
        held[packs] += tokens[samples]
    return pack_of


def _misfits(
    pack_of: np.ndarray, tokens: np.ndarray, images: np.ndarray, max_tokens: int, max_images: int
) -> np.ndarray:
    """The samples with which, counted longest first, their pack is over a limit."""
    columns = ((tokens, max_tokens), (images, max_images))
    if all(np.bincount(pack_of, column).max(initial=0) <= limit for column, limit in columns):
        return np.zeros(0, np.int64)
    order = np.lexsort((-tokens, pack_of))
    starts = np.searchsorted(pack_of[order], pack_of[order])  # where the pack of each sample begins
    over = np.zeros(len(order), bool)
    for column, limit in columns:
        total = np.concatenate(([0], np.cumsum(column[order])))
        over |= total[1:] - total[starts] > limit
    return order[over]


def _place(
    samples: np.ndarray, tokens: np.ndarray, images: np.ndarray, room: _Room, pack_of: np.ndarray
) -> None:
    """Best fit ``samples`` into ``room``, longest first, and note their packs in ``pack_of``."""
    order = samples[np.lexsort((-images[samples], -tokens[samples]))]
    placed: list[int] = []
    for num_tokens, num_images, count in _classes(tokens[order], images[order]):
        placed += room.place(num_tokens, num_images, count)
    pack_of[order] = placed


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

    def open_used(self, tokens: np.ndarray, images: np.ndarray) -> None:
        """Open one pack for each (tokens, images) already in it."""
        for number, (used_tokens, used_images) in enumerate(
            zip(tokens.tolist(), images.tolist(), strict=True)
        ):
            self._add(self.max_tokens - used_tokens, self.max_images - used_images, [number])
        self.num_packs = len(tokens)

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
