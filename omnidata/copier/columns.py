"""Kept columns of datasets that were built apart, in one index: as one build of all their records has them.

A column that only some of them have is null in the samples of the others. Where types differ, a column of
whole and other numbers is double, and any other mixture is text, each value spelled as in JSON, as
builder.columns has it.
"""

from __future__ import annotations

from collections.abc import Sequence

import orjson
import pyarrow as pa


def united(indexes: Sequence[Sequence[pa.Field]]) -> list[pa.Field]:
    """The columns of the new index, from those of each old one."""
    kinds: dict[str, set[pa.DataType]] = {}
    for fields in indexes:
        for field in fields:
            kinds.setdefault(field.name, set()).add(field.type)
    return [pa.field(name, _common(kinds[name])) for name in sorted(kinds)]


def _common(kinds: set[pa.DataType]) -> pa.DataType:
    if len(kinds) == 1:
        return next(iter(kinds))
    return pa.float64() if kinds == {pa.int64(), pa.float64()} else pa.string()


def with_columns(table: pa.Table, own: pa.Schema, kept: Sequence[pa.Field]) -> pa.Table:
    """Index rows with these kept columns; ``own``: the index's own."""
    columns = [table[name] for name in own.names]
    for field in kept:
        if field.name not in table.column_names:
            columns.append(pa.nulls(table.num_rows, field.type))
        elif table[field.name].type == field.type:
            columns.append(table[field.name])
        else:
            values = [_as(field, value) for value in table[field.name].to_pylist()]
            columns.append(pa.array(values, field.type))
    return pa.table(columns, schema=pa.schema([*own, *kept]))


def _as(field: pa.Field, value: bool | float | str | None) -> float | str | None:
    if value is None or isinstance(value, str):
        return value
    return float(value) if field.type == pa.float64() else orjson.dumps(value).decode()
