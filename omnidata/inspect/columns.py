"""The kept columns of an index in numbers: a histogram of numbers, a table of texts and of true and false."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from omnidata.inspect.distributions import NUM_BINS, Bin, Distribution, count_distribution
from omnidata.near.hashing import COLUMNS as NEAR_COLUMNS

if TYPE_CHECKING:
    import pyarrow as pa

    from omnidata.dataset import Dataset

NUM_VALUES = 10  # of a table
MOST_COUNTED = 1 << 20  # a wider span of whole numbers has bins of equal width instead


@dataclass(frozen=True, slots=True)
class ValueCount:
    """A value and the samples that have it."""

    value: str  # numbers, true and false as text, too
    count: int


@dataclass(frozen=True, slots=True)
class ColumnSummary:
    """One kept column."""

    name: str
    type: str  # bool, int64, double or string
    num_missing: int  # samples without a value
    num_distinct: int  # values
    distribution: Distribution | None  # of numbers
    values: tuple[ValueCount, ...]  # the most common of texts, and of true and false; none of numbers


def summarize_columns(dataset: Dataset) -> tuple[ColumnSummary, ...]:
    """Every kept column, by name."""
    names = [name for name in dataset.kept_columns if name not in NEAR_COLUMNS]
    if not names:
        return ()
    table = dataset.index_columns(names)
    return tuple(_summary(name, table[name]) for name in names)


def _summary(name: str, column: pa.ChunkedArray) -> ColumnSummary:
    import pyarrow as pa

    values = column.combine_chunks().drop_null()
    is_number = pa.types.is_integer(values.type) or pa.types.is_floating(values.type)
    found = values.value_counts()
    counts = found.field("counts").to_numpy()
    top = [] if is_number else np.argsort(-counts, kind="stable")[:NUM_VALUES].tolist()
    return ColumnSummary(
        name=name,
        type=str(values.type),
        num_missing=column.null_count,
        num_distinct=len(counts),
        distribution=number_distribution(values.to_numpy()) if is_number else None,
        values=tuple(ValueCount(_text(found.field("values")[i].as_py()), int(counts[i])) for i in top),
    )


def _text(value: str | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else value


def number_distribution(values: np.ndarray) -> Distribution:
    """Of any numbers: whole ones in round bins as ``count_distribution``, others in bins of equal width."""
    if len(values) == 0:
        return Distribution(0, 0, 0, 0, 0, histogram=())
    low, high = values.min().item(), values.max().item()
    if values.dtype.kind == "i" and high - low < MOST_COUNTED:
        return count_distribution(values)
    ordered = np.sort(values)
    median, p95 = (ordered[round(q * (len(values) - 1))].item() for q in (0.5, 0.95))
    counts, edges = np.histogram(values.astype(np.float64), NUM_BINS if high > low else 1)
    pairs = zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True)
    bins = tuple(Bin(first, last, count) for first, last, count in pairs)
    return Distribution(low, median, float(values.mean(dtype=np.float64)), p95, high, histogram=bins)
