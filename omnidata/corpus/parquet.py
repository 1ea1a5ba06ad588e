"""Parquet, as Hugging Face datasets stores it: one record a row.

    image / images                 struct{bytes, path} or binary or string, or a list of those
    conversations / messages       list<struct{from, value}> / list<struct{role, content}>
    texts                          list<struct{user, assistant, source}>          The Cauldron
    text                           JSON {"question", "chosen", "rejected"}        RLHF-V
    question, answer / chosen      strings

A unit is a run of rows inside one row group. Rows of a group can only be reached from its start, so the
iterator that has just read rows 0-999 is kept for whoever asks for row 1000 next.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from omnidata.corpus.source import UNIT_RECORDS, SourceFile, Unit, is_url, open_source_bytes
from omnidata.schema import Record, UserError

FORMATS = ("parquet",)
_BATCH = 32  # rows parsed at a time: with pictures, some megabytes
_Rows = Iterator[dict[str, Any]]
_kept: dict[tuple[int, str, int], tuple[int, _Rows]] = {}  # (process, source, row group) -> (next row, rows)


@dataclass(frozen=True, slots=True)
class Unread:
    """Stands for a column that is not read; it is named in the build's report like any key."""

    type: str  # Arrow's name


def sniff(name: str, head: bytes) -> bool:
    """The format's magic bytes."""
    return head.startswith(b"PAR1")


def scan(file: SourceFile) -> Iterator[Unit]:
    """Cost: the footer only."""
    parquet = _open(file)
    first = 0
    for group in range(parquet.metadata.num_row_groups):
        rows = parquet.metadata.row_group(group).num_rows
        for start in range(0, rows, UNIT_RECORDS):
            stop = min(start + UNIT_RECORDS, rows)
            yield Unit(start, stop, first + start, stop - start, part=group)
        first += rows


def read(file: SourceFile, unit: Unit) -> Iterator[Record]:
    """The records of a unit."""
    key = (os.getpid(), file.source, unit.part)
    position, rows = _kept.pop(key, (0, None))
    if rows is None or position > unit.start:
        position, rows = 0, _rows(file, unit.part)
    for _ in range(unit.start - position):
        next(rows)
    for number in range(unit.num_records):
        yield file.record(f"row {unit.first + number}", next(rows))
    _kept.clear()  # one row group at a time: each may hold megabytes
    _kept[key] = (unit.stop, rows)


def _rows(file: SourceFile, group: int) -> _Rows:
    from pyarrow import ArrowException  # by name: a kept iterator may be closed when modules are gone

    parquet = _open(file)
    schema = parquet.schema_arrow
    unread = {field.name: Unread(str(field.type)) for field in schema if _is_numbers(field.type)}
    columns = [name for name in schema.names if name not in unread]
    try:
        if not columns:
            yield from [unread] * parquet.metadata.row_group(group).num_rows
            return
        for batch in parquet.iter_batches(_BATCH, row_groups=[group], columns=columns, use_threads=False):
            yield from (row | unread for row in batch.to_pylist()) if unread else batch.to_pylist()
    except (ArrowException, OSError) as error:
        raise UserError(f"source {file.source}: row group {group} cannot be read ({error})") from error


def _is_numbers(type: Any) -> bool:
    """Lists of numbers (log-probabilities, embeddings) may be large and hold neither text nor media."""
    from pyarrow import types

    depth = 0
    while types.is_list(type) or types.is_large_list(type) or types.is_fixed_size_list(type):
        type, depth = type.value_type, depth + 1
    return depth > 0 and (types.is_floating(type) or types.is_integer(type) or types.is_boolean(type))


def _open(file: SourceFile) -> Any:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        # Arrow reads local files by itself. A small buffer and no pre-buffering: pages are read as they are
        # needed, not whole column chunks.
        content = open_source_bytes(file.source) if is_url(file.source) else pyarrow.OSFile(file.source)
        return ParquetFile(content, buffer_size=1 << 20, pre_buffer=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"source {file.source}: not a readable Parquet file ({error})") from error
