"""Indexes: ``index.parquet`` and ``rejects.parquet`` (the dataset's tables), and Energon's ``.tar.idx``.

The Arrow schemas are made from ``omnidata.schema``; one row group per shard lets a reader take one shard's
rows, and lets the builder append shard after shard with flat memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from omnidata.files import check_regular
from omnidata.schema import INDEX_COLUMNS, REJECT_COLUMNS, Column, UserError

_DEFAULTS = {
    column.name: list(column.default) if isinstance(column.default, tuple) else column.default
    for column in INDEX_COLUMNS
    if column.default is not None
}

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq


def _arrow_schema(columns: Sequence[Column]) -> pa.Schema:
    import pyarrow as pa

    types = {
        "string": pa.string(),
        "int32": pa.int32(),
        "int64": pa.int64(),
        "list<int32>": pa.list_(pa.int32()),
        "list<int64>": pa.list_(pa.int64()),
        "list<list<int32>>": pa.list_(pa.list_(pa.int32())),
    }
    return pa.schema([pa.field(column.name, types[column.type], nullable=False) for column in columns])


def index_schema() -> pa.Schema:
    """The Arrow schema of ``index.parquet``."""
    return _arrow_schema(INDEX_COLUMNS)


def reject_schema() -> pa.Schema:
    """The Arrow schema of ``rejects.parquet``."""
    return _arrow_schema(REJECT_COLUMNS)


def index_table(rows: Iterable[dict[str, object]], schema: pa.Schema | None = None) -> pa.Table:
    """Index rows (one dict a sample, keys as INDEX_COLUMNS) as a table; ``schema`` may have kept columns."""
    import pyarrow as pa

    return pa.Table.from_pylist([_DEFAULTS | row for row in rows], schema=schema or index_schema())


def kept_fields(found: pa.Schema, where: str = "the table") -> list[pa.Field]:
    """The columns of an index beyond INDEX_COLUMNS: those that ``--keep-column`` kept.

    Raises:
        UserError: one holds neither numbers, texts nor true and false.
    """
    import pyarrow as pa

    own = {column.name for column in INDEX_COLUMNS}
    kinds = [
        getattr(pa.types, f"is_{name}")
        for name in ("boolean", "integer", "floating", "string", "large_string")
    ]
    fields = []
    for field in found:
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        if field.name in own:
            continue
        if not any(is_kind(kind) for is_kind in kinds):
            raise UserError(
                f"{where}: {field.name} is a column of {kind}, which no build writes: it is damaged"
            )
        fields.append(pa.field(field.name, kind))
    return fields


def reject_table(rows: Iterable[dict[str, object]]) -> pa.Table:
    """Reject rows (one dict a record, keys as REJECT_COLUMNS) as a table."""
    import pyarrow as pa

    return pa.Table.from_pylist(list(rows), schema=reject_schema())


def write_tables(file: BinaryIO, schema: pa.Schema, tables: Iterable[pa.Table]) -> int:
    """Write ``tables`` to a Parquet file, one row group each (empty ones left out).

    Returns:
        The number of rows written.
    """
    import pyarrow.parquet as pq

    num_rows = 0
    # A flipped bit in a page would otherwise pass as another id, offset or hash.
    with pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer:
        for table in tables:
            if table.num_rows:
                writer.write_table(table, row_group_size=table.num_rows)
                num_rows += table.num_rows
    return num_rows


def open_native(path: str) -> pa.NativeFile:
    """A local file that Arrow reads by itself: its threads then hold nothing of Python's.

    A thread of Arrow's that still holds a Python file when the interpreter ends takes the process with it.
    """
    import pyarrow as pa

    check_regular(path)
    return pa.OSFile(path, "rb")


def open_parquet(file: BinaryIO | pa.NativeFile, **options: Any) -> tuple[pq.ParquetFile, bool]:
    """A Parquet file, and whether Arrow may read it in threads: never through a file of Python's."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    native = isinstance(file, pa.NativeFile)
    options = {"page_checksum_verification": True} | options  # a flipped bit would pass as another number
    return pq.ParquetFile(file, pre_buffer=native, **options), native


def check_types(parquet: pq.ParquetFile, schema: pa.Schema, where: str) -> None:
    """Refuse a table whose columns are not of the schema's types.

    Raises:
        UserError: names the first that is not.
    """
    import pyarrow as pa

    found = parquet.schema_arrow
    for field in schema:
        if field.name not in found.names:
            if field.name in _DEFAULTS:
                continue
            raise UserError(f"{where} lacks the column {field.name}: it was not written by this version")
        kind = found.field(field.name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if kind != field.type and str(kind).replace("element", "item") != str(field.type):
            raise UserError(f"{where}: {field.name} is a column of {kind}, not {field.type}: it is damaged")


def read_table(
    file: BinaryIO | pa.NativeFile,
    schema: pa.Schema,
    *,
    columns: Sequence[str] | None = None,
    dictionary: Sequence[str] = (),
    kept: bool = False,
    row_groups: Sequence[int] | None = None,
) -> pa.Table:
    """Read a Parquet file written by ``write_tables``; ``dictionary`` names string columns to leave encoded.

    ``kept``: it is an index, whose kept columns may be named, and are read where ``columns`` is None.
    ``row_groups``: only these; None reads all.

    Raises:
        UserError: the file is no Parquet file, or lacks a column of the schema.
    """
    import pyarrow as pa

    with reading_table("the table"):
        parquet, threads = open_parquet(file, read_dictionary=list(dictionary))
        own = set(schema.names)
        if kept:
            schema = pa.schema([*schema, *kept_fields(parquet.schema_arrow)])
        wanted = list(columns or schema.names)
        check_types(parquet, pa.schema([schema.field(name) for name in wanted]), "the table")
        missing = [name for name in wanted if name not in parquet.schema_arrow.names]
        present = [name for name in wanted if name not in missing]
        if row_groups is None:
            table = parquet.read(columns=present, use_threads=threads)
        else:
            table = parquet.read_row_groups(list(row_groups), columns=present, use_threads=threads)
        if holes := [name for name in present if name in own and table[name].null_count]:
            raise UserError(f"the table has rows without {holes[0]}: it is damaged")
        for name in missing:  # written before there was such a column
            values = pa.array([_DEFAULTS[name]] * table.num_rows, schema.field(name).type)
            table = table.append_column(schema.field(name), values)
        return table.select(wanted)


def read_rows(file: BinaryIO | pa.NativeFile, positions: Sequence[int]) -> list[dict[str, object]]:
    """The rows at ``positions``, in that order; only the row groups that hold them are read.

    Raises:
        IndexError: the table is shorter than a position.
    """
    with reading_table("index.parquet"):
        parquet, threads = open_parquet(file)
    metadata = parquet.metadata
    ends = np.cumsum([metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)])
    groups = np.searchsorted(ends, np.asarray(positions, np.int64), side="right").tolist()
    if groups and max(groups) == len(ends):
        raise IndexError(f"row {max(positions)} of a table of {metadata.num_rows}")
    with reading_table("index.parquet"):
        tables = {group: parquet.read_row_group(group, use_threads=threads) for group in sorted(set(groups))}
    firsts = [ends[group] - tables[group].num_rows for group in groups]
    return [
        _DEFAULTS | tables[group].slice(position - first, 1).to_pylist()[0]
        for position, group, first in zip(positions, groups, firsts, strict=True)
    ]


def codes(table: pa.Table, column: str) -> tuple[list[str], np.ndarray]:
    """A column read dictionary-encoded: its distinct strings, and the position of each row's among them."""
    import pyarrow as pa

    encoded = table[column].unify_dictionaries()
    if not encoded.num_chunks:
        return [], np.zeros(0, np.int32)
    indices = pa.chunked_array([chunk.indices for chunk in encoded.chunks]).combine_chunks()
    return encoded.chunk(0).dictionary.to_pylist(), np.from_dlpack(indices)


def numbers(table: pa.Table, column: str) -> np.ndarray:
    """A numeric column as an array. (ChunkedArray.to_numpy would import pandas: half a second.)

    Raises:
        UserError: a row has no number there.
    """
    values = table[column].combine_chunks()
    if values.null_count:
        raise UserError(f"{values.null_count} rows have no {column}: the index is damaged, verify it")
    return np.from_dlpack(values)


@contextlib.contextmanager
def reading_table(where: str) -> Iterator[None]:
    """What Arrow says of a damaged file becomes a UserError that names it."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise  # the disk's or the network's; Arrow's own errors about content have no number
        words = " ".join(str(error).split())  # Arrow's own have several lines
        what = f"{where} is not a readable Parquet file ({words})"
        raise UserError(f"{what}: the dataset is damaged, run `omnidata verify`") from error


def rows_of_shards(index: pa.Table) -> dict[str, np.ndarray]:
    """Shard -> the positions of its rows, ascending. Needs the column ``shard``."""
    shards = index["shard"].combine_chunks().dictionary_encode()
    names, codes = shards.dictionary.to_pylist(), shards.indices.to_numpy()
    ends = np.cumsum(np.bincount(codes, minlength=len(names)))
    groups = np.split(np.argsort(codes, kind="stable"), ends[:-1])
    return dict(zip(names, groups, strict=False))  # no rows: one empty group and no name


# --- Energon's .idx ---------------------------------------------------------------------------------------


def idx_bytes(spans: Sequence[tuple[int, int]]) -> bytes:
    """Energon's ``.tar.idx`` for samples at (offset, nbytes): n+1 little-endian uint64.

    Example: spans [(0, 2048), (2048, 1024)] -> 0, 2048, 3072.
    """
    ends = [offset + nbytes for offset, nbytes in spans[-1:]]
    return np.array([offset for offset, _ in spans] + ends, dtype="<u8").tobytes()


def read_idx(raw: bytes) -> np.ndarray:
    """The uint64 ``[n+1]`` offsets of a ``.tar.idx``."""
    return np.frombuffer(raw, dtype="<u8")
