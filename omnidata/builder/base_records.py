"""Base records: the samples of a dataset as records, so that they can be rendered again without their corpus.

    index.parquet, row group 7 (a shard)  ─▶ rows           Unit: rows [start, stop) of the group ``part``
    the shard's KEY.json members          ─▶ Dialogue       read without the pictures between them
    Record(source, locator and id as they were, payload {"dialogue": Dialogue, "row": the index row})

Where KEY.json lies follows from the row: it stands behind two arrays whose length is known. Those of
neighbours are read together if little lies between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

from omnidata.builder.layout import Stretch
from omnidata.corpus.source import UNIT_RECORDS, SourceFile, Unit
from omnidata.dataset import Dataset
from omnidata.dialogue import DialogueError, read_dialogue
from omnidata.index import index_schema, open_parquet, read_table, reading_table
from omnidata.schema import DIALOGUE, INDEX, Record, Reject, UserError
from omnidata.shards import BLOCK, CorruptSampleError, array_bytes, dialogue_hash, parse_header

BASE_SHAPE = "base"  # a SourceFile of this shape is a dataset
Row = dict[str, Any]
GAP = 64 << 10  # bytes between two members that are read rather than left out
RUN = 8 << 20  # bytes of one read at most
REMOTE_READS = 16  # at once, where the base is not on a local disk


def base_stretches(base: Dataset, splits: Sequence[str]) -> tuple[Stretch, ...]:
    """The rows of the base, cut into units; each lies in one shard and so in one split.

    Raises:
        UserError: index and manifest disagree.
    """
    shards = [shard for shard in base.manifest.shards if shard.num_samples]
    with base.open_table(INDEX) as file, reading_table(f"{base.path}/{INDEX}"):
        metadata = open_parquet(file)[0].metadata
    found = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    if found != [shard.num_samples for shard in shards]:
        raise UserError(f"{base.path}: index and manifest disagree: the dataset is damaged, verify it")
    stretches: list[Stretch] = []
    first = 0
    for group, shard in enumerate(shards):
        record_bytes = 2 * array_bytes(shard.num_tokens // shard.num_samples)
        for start in range(0, shard.num_samples, UNIT_RECORDS):
            count = min(UNIT_RECORDS, shard.num_samples - start)
            unit = Unit(start, start + count, first, count, part=group)
            counts = tuple(count if split == shard.split else 0 for split in splits)
            stretches.append(Stretch(0, unit, first, count, counts, record_bytes))
            first += count
    return tuple(stretches)


def base_file(base: Dataset) -> SourceFile:
    """The base as a source of records."""
    num_bytes = sum(shard.num_bytes for shard in base.manifest.shards)
    return SourceFile(base.path, "dataset", BASE_SHAPE, num_bytes)


def read_base(file: SourceFile, unit: Unit) -> Iterator[Record | Reject]:
    """The records of a unit, in order."""
    path = file.source
    base = _dataset(path)
    rows = _rows(path, unit.part)[unit.start : unit.stop]
    spans = [_span(row) for row in rows]
    for row, raw in zip(rows, _read_spans(base, rows, spans), strict=True):
        place = (row["source"], row["locator"], row["id"])
        try:
            dialogue = read_dialogue(_content(row, raw))
        except (CorruptSampleError, DialogueError) as error:
            detail = f"sample {row['key']} of {path}/{row['shard']}: {error}"
            yield Reject(*place, "bad_dialogue", detail)
        else:
            yield Record(*place, {"dialogue": dialogue, "row": row})


@lru_cache(maxsize=2)
def _dataset(path: str) -> Dataset:
    return Dataset(path)


@lru_cache(maxsize=2)
def _rows(path: str, group: int) -> list[Row]:
    with _dataset(path).open_table(INDEX) as file:
        return read_table(file, index_schema(), kept=True, row_groups=[group]).to_pylist()


def _span(row: Row) -> tuple[int, int]:
    """First and end byte of a sample's KEY.json with its header; an empty span if it has none."""
    first = row["offset"] + 2 * array_bytes(row["n_tokens"])
    return first, first + (BLOCK + row["dialogue_bytes"] if row["dialogue_bytes"] else 0)


def _read_spans(base: Dataset, rows: Sequence[Row], spans: Sequence[tuple[int, int]]) -> Iterator[Any]:
    """The bytes of each span, or why there are none."""
    runs = list(_runs(rows, spans))

    def read(run: tuple[int, int]) -> bytes | CorruptSampleError:
        start, stop = run
        try:
            first, end = spans[start][0], spans[stop - 1][1]
            return base.read_range(rows[start]["shard"], first, end - first)
        except CorruptSampleError as error:
            return error

    if base.local_root is None and len(runs) > 1:
        with ThreadPoolExecutor(REMOTE_READS) as pool:
            raws = list(pool.map(read, runs))
    else:
        raws = map(read, runs)  # type: ignore[assignment]
    for (start, stop), raw in zip(runs, raws, strict=True):
        for first, end in spans[start:stop]:
            at = first - spans[start][0]
            yield raw if isinstance(raw, CorruptSampleError) else raw[at : at + end - first]


def _runs(rows: Sequence[Row], spans: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """(start, stop) of samples whose KEY.json are read together."""
    start = 0
    for at in range(1, len(rows) + 1):
        if (
            at == len(rows)
            or spans[at][0] - spans[at - 1][1] > GAP
            or spans[at][0] < spans[at - 1][1]
            or spans[at][1] - spans[start][0] > RUN
        ):
            yield start, at
            start = at


def _content(row: Row, raw: Any) -> bytes:
    if isinstance(raw, CorruptSampleError):
        raise raw
    if not raw:
        raise DialogueError("it was built with --no-conversation")
    name, size = parse_header(raw[:BLOCK], position=0)
    content = raw[BLOCK:]
    if name != f"{row['key']}.{DIALOGUE}" or size != len(content):
        raise CorruptSampleError(f"member {name!r} of {size} bytes is where KEY.json should be")
    if dialogue_hash(content) != row["dialogue_hash"]:
        raise CorruptSampleError("KEY.json is not what its hash in the index says")
    return content
