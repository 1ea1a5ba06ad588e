"""Kept columns: from each record's values to typed columns of the whole index.

A shard's part holds a sample's values as JSON, since only all shards together tell what a column's type is::

    part     kept                       {"relevance_min": 4, "lang": "en"}
    index    relevance_min int64, lang string, ...

Whole numbers are int64, numbers double, true and false bool. A column that mixes those with anything else is
text, each value spelled as in JSON.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import orjson
import pyarrow as pa

from omnidata.corpus.columns import ALL, Value, column_name
from omnidata.schema import INDEX_COLUMNS

KEPT = "kept"  # the column of a part
MAX_COLUMNS = 256  # of --keep-column all
_OWN = [column.name for column in INDEX_COLUMNS]
_KINDS = {bool: "bool", int: "int", float: "float", str: "text"}
_TYPES = {
    frozenset(("bool",)): pa.bool_(),
    frozenset(("int",)): pa.int64(),
    frozenset(("float",)): pa.float64(),
    frozenset(("int", "float")): pa.float64(),
}


def kept_json(columns: Mapping[str, Value]) -> str:
    """A sample's values as a part holds them."""
    return orjson.dumps(columns).decode()


def kinds_of(columns: Mapping[str, Value]) -> tuple[str, ...]:
    """What is counted of a sample: the kind of each value and its column, as ``int relevance_min``."""
    return tuple(f"{_KINDS[type(value)]} {name}" for name, value in columns.items())


def part_schema(schema: pa.Schema, rows: list[dict[str, object]]) -> pa.Schema:
    """The schema of a part with these rows."""
    has_kept = bool(rows) and KEPT in rows[0]
    return schema.append(pa.field(KEPT, pa.string(), nullable=False)) if has_kept else schema


def kept_fields(names: tuple[str, ...], counts: Mapping[str, int]) -> tuple[list[pa.Field], dict[str, int]]:
    """The columns of the index by name, and notes for the report.

    Args:
        names: as given to --keep-column.
        counts: ``kinds_of`` -> samples.
    """
    kinds: dict[str, set[str]] = {column_name(name): set() for name in names if name != ALL}
    asked, found = list(kinds), defaultdict[str, int](int)
    for text, count in counts.items():
        kind, name = text.split(" ", 1)
        kinds.setdefault(name, set()).add(kind)
        found[name] += count
    notes = {f"have the key of the column {name!r} (--keep-column)": 0 for name in asked if not found[name]}
    others = sorted(kinds.keys() - set(asked), key=lambda name: (-found[name], name))
    for name in others[MAX_COLUMNS:]:
        notes[f"have the key {name!r}, which is beyond the {MAX_COLUMNS} columns of --keep-column all"] = (
            found[name]
        )
    fields = [
        pa.field(name, _TYPES.get(frozenset(kinds[name]), pa.string()))
        for name in sorted([*asked, *others[:MAX_COLUMNS]])
    ]
    return fields, notes


def with_columns(table: pa.Table, fields: list[pa.Field]) -> pa.Table:
    """A part's table with its values in typed columns."""
    rows = [orjson.loads(text) for text in table[KEPT].to_pylist()]
    table = table.select(_OWN)
    for field in fields:
        values = [row.get(field.name) for row in rows]
        if field.type == pa.string():
            values = [
                value if value is None or isinstance(value, str) else _spelled(value) for value in values
            ]
        elif field.type == pa.float64():
            values = [None if value is None else float(value) for value in values]
        table = table.append_column(field, pa.array(values, field.type))
    return table


def _spelled(value: Value) -> str:
    return orjson.dumps(value).decode()
