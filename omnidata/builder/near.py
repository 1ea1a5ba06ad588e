"""``--dedup near``: samples whose pictures and text nearly repeat an earlier one's are refused, and listed.

The hashes of every sample are columns of the index (near.images, near.text). When all shards are built, the
pairs are found and kept in .build/ before any shard is written anew, so a build that is stopped there goes on
with the same ones. They end as ``near_duplicates.parquet``::

    key, id, source, locator           the sample that was refused
    of_key, of_id, of_source, of_locator   the one that it repeats, which stays
    similarity, distance               of the texts (0 to 1, estimated), of the pictures (bits of 256)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import orjson
import pyarrow as pa

from omnidata.builder.columns import KEPT
from omnidata.builder.layout import ShardTask
from omnidata.builder.worker import ShardResult, part_path
from omnidata.durable import SCRATCH, Store
from omnidata.index import index_schema, read_table, write_tables
from omnidata.near.hashing import IMAGES, TEXT, parse_image_hashes, parse_text_hashes
from omnidata.near.pairs import Hashes, near_pairs
from omnidata.schema import NEAR

_PAIRS = f"{SCRATCH}/{NEAR}"
_PLACE = ("key", "id", "source", "locator")
SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.string(), nullable=False) for name in _PLACE),
        *(pa.field(f"of_{name}", pa.string(), nullable=False) for name in _PLACE),
        pa.field("similarity", pa.float64(), nullable=False),
        pa.field("distance", pa.int64(), nullable=False),
    ]
)

Results = Sequence[tuple[ShardTask, ShardResult]]


def find_near(store: Store, results: Results) -> list[dict[str, object]]:
    """The pairs of the whole build as rows of the ledger; those of an earlier run, if it found them."""
    if not store.exists(_PAIRS):
        rows = _pairs(store, results)
        with store.write(_PAIRS) as file:
            write_tables(file, SCHEMA, [pa.Table.from_pylist(rows, SCHEMA)])
    with store.open(_PAIRS) as file:
        return read_table(file, SCHEMA).to_pylist()


def keep_ledger(store: Store) -> None:
    """Put the pairs beside the dataset's other tables."""
    if store.exists(_PAIRS):
        store.write_bytes(NEAR, store.read_bytes(_PAIRS))


def _pairs(store: Store, results: Results) -> list[dict[str, object]]:
    places: list[dict[str, str]] = []
    values: list[dict[str, str]] = []
    for task, result in results:
        if result.num_samples:
            with store.open(part_path(task)) as file:
                table = read_table(file, index_schema(), columns=[*_PLACE, KEPT], kept=True)
            places += table.select(_PLACE).to_pylist()
            values += map(orjson.loads, table[KEPT].to_pylist())
    order = sorted(range(len(places)), key=lambda at: int(places[at]["key"]))  # of the corpus
    places, values = [places[at] for at in order], [values[at] for at in order]
    if not places:
        return []
    hashes = [value[IMAGES].split() for value in values]
    equal, numbers = parse_text_hashes([value[TEXT] for value in values])
    starts = np.concatenate(([0], np.cumsum([len(each) for each in hashes])))
    found = near_pairs(
        Hashes(equal, numbers, parse_image_hashes([h for each in hashes for h in each]), starts)
    )
    return [
        places[pair.second]
        | {f"of_{name}": places[pair.first][name] for name in _PLACE}
        | {"similarity": pair.similarity, "distance": pair.distance}
        for pair in found
    ]


def why(row: dict[str, object]) -> str:
    """A pair in words."""
    return (
        f"nearly repeats {row['of_source']}, {row['of_locator']} (id {row['of_id']!r}): texts "
        f"{row['similarity']:.0%} alike, pictures differ in at most {row['distance']} of 256 bits"
    )
