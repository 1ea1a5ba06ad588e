"""Catalogs made from arithmetic: for tests of plans that need no shards."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from omnidata.plan.catalog import Lengths


class MadeUpCatalog:
    """``shard_sizes[s]`` samples in shard s; the length of a sample follows from its row."""

    def __init__(self, shard_sizes: Sequence[int], *, name: str = "made-up", shift: int = 0) -> None:
        self.shard_sizes = np.array(shard_sizes, np.int64)
        self.name = self.digest = f"{name}-{shift}-{len(shard_sizes)}"
        self.reads: list[int] = []  # shards read, in order
        self._first_rows = np.concatenate(([0], np.cumsum(self.shard_sizes)))
        self._shift = shift

    def read(self, shards: Sequence[int]) -> Lengths:
        shards = sorted(int(shard) for shard in shards)
        self.reads += shards
        spans = [np.arange(self._first_rows[shard], self._first_rows[shard + 1]) for shard in shards]
        rows = np.concatenate(spans)
        tokens = 50 + (rows * 7919 + self._shift) % 400
        return Lengths(rows, tokens, tokens // 3, rows % 3)

    def longest(self) -> tuple[int, int]:
        return 449, 2

    def shorten(self, row: int, *, max_tokens: int, max_images: int | None) -> tuple[int, int, int] | None:
        return (max_tokens, 1, 0) if row % 2 else None
