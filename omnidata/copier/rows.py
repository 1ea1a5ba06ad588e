"""Rows: samples of a dataset by their rows of the index, read in runs of neighbours and checked.

A sample that is not what its index says ends a copy: damage must not get a new, fitting checksum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from omnidata.dataset import Dataset
from omnidata.index import index_schema, open_parquet, read_table, reading_table
from omnidata.schema import INDEX, UserError
from omnidata.shards import CorruptSampleError, content_hash, dialogue_hash, read_sample

RUN_BYTES = 8 << 20  # read at once, where samples are adjacent


class Place(NamedTuple):
    """Where a sample is, and what is there."""

    shard: str
    offset: int
    nbytes: int
    key: str
    content_hash: str
    dialogue_hash: str

    @property
    def end(self) -> int:
        """The byte after its last."""
        return self.offset + self.nbytes


def places_of(table: pa.Table) -> list[Place]:
    """The places of index rows."""
    return list(map(Place, *(table[name].to_pylist() for name in Place._fields)))


def read_rows(dataset: Dataset, rows: np.ndarray) -> pa.Table:
    """These rows (ascending) of a dataset's index, kept columns included; only their row groups are read."""
    with dataset.open_table(INDEX) as file, reading_table(f"{dataset.path}/{INDEX}"):
        metadata = open_parquet(file)[0].metadata
        counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        ends = np.cumsum(counts)
        groups, owners = np.unique(np.searchsorted(ends, rows, side="right"), return_inverse=True)
        sizes = np.array(counts)[groups]
        shift = (ends[groups] - sizes) - (np.cumsum(sizes) - sizes)  # of each group's first row
        table = read_table(file, index_schema(), kept=True, row_groups=groups.tolist())
    return table.take(pa.array(rows - shift[owners]))


def replaced(table: pa.Table, columns: Mapping[str, list[Any]]) -> pa.Table:
    """The table with these columns' values."""
    for name, values in columns.items():
        field = table.schema.field(name)
        table = table.set_column(table.column_names.index(name), field, pa.array(values, field.type))
    return table


def runs(places: Sequence[Place]) -> Iterator[Sequence[Place]]:
    """Samples that lie beside each other in a shard, at most RUN_BYTES in all, or one that is larger."""
    start = 0
    for at in range(1, len(places) + 1):
        if (
            at == len(places)
            or places[at].shard != places[start].shard
            or places[at].offset != places[at - 1].end
            or places[at].end - places[start].offset > RUN_BYTES
        ):
            yield places[start:at]
            start = at


def read_run(dataset: Dataset, run: Sequence[Place]) -> bytes:
    """All bytes of neighbours, by one read."""
    first = run[0].offset
    try:
        return dataset.read_range(run[0].shard, first, run[-1].end - first)
    except CorruptSampleError as error:
        what = f"{error}: the dataset is damaged, run `omnidata verify {dataset.path}`"
        raise UserError(what) from error


def read_places(dataset: Dataset, places: Sequence[Place]) -> Iterator[tuple[Place, memoryview]]:
    """Each place and the bytes there, not checked."""
    for run in runs(places):
        raw = memoryview(read_run(dataset, run))
        for place in run:
            yield place, raw[place.offset - run[0].offset :][: place.nbytes]


def check_sample(raw: memoryview, place: Place, *, where: str) -> None:
    """Refuse bytes that are not the sample of this place's key and hashes.

    Raises:
        UserError: names the sample and says what to do.
    """
    try:
        sample = read_sample(raw)
    except CorruptSampleError as error:
        raise UserError(f"{where}, sample {place.key}: {error}; {_REMEDY}") from error
    found = content_hash(sample), dialogue_hash(sample.dialogue)
    if sample.key != place.key:
        raise UserError(f"{where}, sample {place.key}: the key is {sample.key}; {_REMEDY}")
    if found != (place.content_hash, place.dialogue_hash):
        raise UserError(f"{where}, sample {place.key}: it is not what its hashes say; {_REMEDY}")


_REMEDY = (
    "damage is not copied. `omnidata verify --deep` lists all of it; build the dataset again, or leave such "
    "samples out with `omnidata subset --exclude`"
)
