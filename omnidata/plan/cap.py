"""Cap: at most N samples of a dataset, or of each value of one of its columns, in one pass over it.

A value's samples stand in a shuffled order, and every pass takes the next N of them; when fewer than N are
left, they are shuffled anew. So each pass holds each sample at most once, and over the passes all are seen::

    cap 3, samples a b c d e f g        pass 0  c f a | pass 1  g b e | (d is left)  pass 2  e a d | ...

All of it follows from (rows, values, seed, number of the dataset in the blend, pass).
"""

from __future__ import annotations

import numpy as np

from omnidata.plan.order import hashes


class Cap:
    """Which rows a pass takes.

    Args:
        limit: samples of each value.
        rows: int64 ``[N]``, ascending: the dataset's samples.
        codes: int64 ``[N]``, from 0: the value of each; all 0 to cap the dataset as a whole.
        key: integers that the shuffles follow from.
    """

    def __init__(self, limit: int, rows: np.ndarray, codes: np.ndarray, *, key: tuple[int, ...]) -> None:
        self._rows, self._codes, self._key = rows, codes, key
        self._counts = np.bincount(codes)
        self._takes = np.minimum(self._counts, limit)
        self.size = int(self._takes.sum())  # samples of every pass

    def rows_of(self, number: int) -> np.ndarray:
        """The rows of pass ``number``, ascending."""
        cycles = self._counts // np.maximum(self._takes, 1)  # passes until a value is shuffled anew
        shuffles = number // np.maximum(cycles, 1)
        first = number % np.maximum(cycles, 1) * self._takes
        order = np.empty(len(self._rows), np.uint64)
        of_row = shuffles[self._codes]
        for shuffle in np.unique(shuffles).tolist():
            mine = of_row == shuffle
            order[mine] = hashes(self._rows[mine], *self._key, shuffle)
        by_value = np.lexsort((order, self._codes))
        starts = np.concatenate(([0], np.cumsum(self._counts)))
        codes = self._codes[by_value]
        rank = np.arange(len(by_value)) - starts[codes]
        taken = (rank >= first[codes]) & (rank < first[codes] + self._takes[codes])
        return np.sort(self._rows[by_value[taken]])
