"""Groups: under which name each document of a microbatch is counted, say for a loss per source.

    group_by="dataset"        the datasets of the blend, by path
    group_by="source"         the files that they were built from, or another column of the index: task, lang

``names[code]`` is a group's name. The most common values have a code each, the others share OTHER; samples
without a value are NONE. A column is read whole, once, when the plan is made: a byte or two per sample.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from omnidata.plan.blend import Source

DATASET, OTHER, NONE = "dataset", "(others)", "(none)"
MAX_GROUPS = 64


class Groups:
    """The groups of a blend.

    Args:
        sources: the datasets.
        by: "dataset", or a column of every dataset's index.

    Raises:
        UserError: a dataset has no such column.
    """

    def __init__(self, sources: Sequence[Source], by: str) -> None:
        self._by = by
        self.names: tuple[str, ...]
        if by == DATASET:
            self.names = _told_apart([source.catalog.name for source in sources])
            return
        columns = [source.index.texts_of(by) for source in sources]
        counts: Counter[str] = Counter()
        for values, codes in columns:
            found = np.bincount(codes, minlength=len(values)).tolist()
            counts.update(
                {NONE if value is None else value: n for value, n in zip(values, found, strict=True)}
            )
        ranked = sorted((name for name, n in counts.items() if n), key=lambda name: (-counts[name], name))
        names = ranked if len(ranked) <= MAX_GROUPS else [*ranked[: MAX_GROUPS - 1], OTHER]
        self.names = tuple(names)
        code_of = {name: code for code, name in enumerate(names)}
        self._codes = []  # of each dataset, the group of each row
        for values, codes in columns:
            places = [code_of.get(NONE if value is None else value, len(names) - 1) for value in values]
            self._codes.append(np.array(places, np.uint8)[codes])

    def codes(self, dataset: int, rows: np.ndarray) -> list[int]:
        """The group of each of these rows."""
        return [dataset] * len(rows) if self._by == DATASET else self._codes[dataset][rows].tolist()


def _told_apart(names: Sequence[str]) -> tuple[str, ...]:
    """Names that are there again get a number: a, a -> a, a #2."""
    seen: Counter[str] = Counter()
    told = []
    for name in names:
        seen[name] += 1
        told.append(name if seen[name] == 1 else f"{name} #{seen[name]}")
    return tuple(told)
