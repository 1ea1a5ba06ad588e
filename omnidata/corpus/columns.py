"""Columns: the values of a record that ``--keep-column`` takes into the index.

    {"id": "7", "relevance_min": 4, "meta": {"lang": "en"}, "source": "coco", "bbox": [1, 2], ...}

    --keep-column relevance_min       relevance_min     4
    --keep-column meta.lang           meta.lang         "en"
    --keep-column source              record.source     "coco"   (`source` of the index is the file)
    --keep-column all                 every value at the top that nothing else reads; not bbox, a list

A value is a number, true or false, or a text of at most MAX_TEXT characters. Whoever names a key has read it:
``is_correct: false`` is then a value to choose by, not a verdict on the record.
"""

from __future__ import annotations

import datetime
import decimal
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from omnidata.schema import INDEX_COLUMNS, UserError

ALL = "all"
MAX_TEXT = 256  # characters
MAX_INT = 1 << 63
_OWN = frozenset(column.name for column in INDEX_COLUMNS)

Value = bool | int | float | str


def column_name(key: str) -> str:
    """What the column of a key is called: the key, unless the index has such a column of its own."""
    return f"record.{key}" if key in _OWN else key


def check_names(names: Sequence[str]) -> None:
    """UserError for names of --keep-column that cannot be columns, or would be the same one."""
    seen: dict[str, str] = {}
    for name in names:
        if not name or len(name) > MAX_TEXT or not name.isprintable() or "`" in name:
            raise UserError(
                f"--keep-column {name!r}: a column's name is a short text without control characters"
            )
        if (other := seen.setdefault(column_name(name), name)) != name:
            raise UserError(f"--keep-column {other} and {name}: both would be the column {column_name(name)}")


def column_value(value: object) -> Value | None:
    """The value as a column holds it; None: no column can, or there is none (null, NaN)."""
    if isinstance(value, str):
        return value if len(value) <= MAX_TEXT and _is_unicode(value) else None
    if isinstance(value, int):  # true and false are
        return value if -MAX_INT <= value < MAX_INT else str(value)
    if isinstance(value, decimal.Decimal):
        value = float(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return None


def _is_unicode(text: str) -> bool:
    """No lone surrogate, which no Parquet file holds."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def take_named(
    payload: Mapping[str, object], names: Sequence[str], used: Collection[str]
) -> tuple[dict[str, Value], dict[str, object]]:
    """The values of the named keys by column, and what of the record is neither used nor taken.

    A name with dots also goes into objects: ``meta.lang``.
    """
    rest = {key: value for key, value in payload.items() if key not in used}
    columns: dict[str, Value] = {}
    for name in names:
        path = [name] if name in payload or name == ALL else name.split(".")
        inner: object = payload
        for key in path:
            inner = inner.get(key) if isinstance(inner, Mapping) else None
        value = column_value(inner)
        if value is not None:
            columns[column_name(name)] = value
            rest = _without(rest, path)
    return columns, rest


def _without(payload: dict[str, Any], path: Sequence[str]) -> dict[str, object]:
    """A copy that lacks the value at ``path``, and what is empty without it."""
    if path[0] not in payload:
        return payload
    copy = dict(payload)
    inner = copy.pop(path[0])
    if len(path) > 1 and (left := _without(inner, path[1:])):
        copy[path[0]] = left
    return copy


def take_all(rest: Mapping[str, object], columns: dict[str, Value], unread: dict[str, None]) -> None:
    """``all``: move the values that no other reader took to ``columns``, their names out of ``unread``."""
    for key, inner in rest.items():
        value, name = column_value(inner), column_name(str(key))
        if value is not None and name not in columns:
            columns[name] = value
            unread.pop(str(key), None)
