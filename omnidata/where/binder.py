"""A tree of the grammar over the columns of an index, as a ``pyarrow.dataset`` expression."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from omnidata.schema import UserError
from omnidata.where.grammar import Name, Node, spell

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.dataset as ds

OPERATORS: dict[str, Callable[[Any, Any], object]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_TURNED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}  # what 3 < x says of x


def _limits(kind: pa.DataType) -> tuple[int, int]:
    """The least and greatest number of an integer type."""
    info = np.iinfo(kind.to_pandas_dtype())
    return int(info.min), int(info.max)


def _whole(sign: str, value: float, kind: pa.DataType) -> tuple[str, pa.Scalar]:
    """The same comparison, of whole numbers, with a constant of the column's own type.

    So it is exact, and no cast stands between the column and its statistics (Arrow's would refuse some).
    ``> 2.5`` is ``> 2``; ``== 2.5`` is met by none, as ``<`` the least number is.
    """
    import pyarrow as pa

    low, high = _limits(kind)
    is_beyond = not low <= value <= high
    if sign in ("==", "!="):
        if is_beyond or int(value) != value:
            sign, value = "<" if sign == "==" else ">=", low
    elif is_beyond:
        is_met = (value > high) == (sign in ("<", "<="))
        sign, value = ">=" if is_met else "<", low
    else:
        value = math.floor(value) if sign in (">", "<=") else math.ceil(value)
    return sign, pa.scalar(int(value), kind)


def _joined(join: Callable[[object, object], object], parts: list[ds.Expression]) -> ds.Expression:
    """As a balanced tree: Arrow follows nested expressions by calls."""
    while len(parts) > 1:
        pairs = [parts[at : at + 2] for at in range(0, len(parts), 2)]
        parts = [join(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
    return parts[0]


class Binder:
    """Checks a tree against the columns of an index and makes it an expression."""

    def __init__(self, schema: pa.Schema, name: str) -> None:
        self._schema, self._name = schema, name

    def bind(self, node: Node, *, negated: bool = False) -> ds.Expression:
        """The expression of a node, or of its opposite: null, not true, if a column has no value."""
        import pyarrow.dataset as ds

        what, operands = node.operation, node.operands
        if what in ("and", "or"):
            join = operator.and_ if (what == "and") != negated else operator.or_
            return _joined(join, [self.bind(operand, negated=negated) for operand in operands])
        if what == "not":
            return self.bind(operands[0], negated=not negated)
        kind = self._kind(*operands)
        column = next(ds.field(operand.name) for operand in operands if isinstance(operand, Name))
        if what == "null":
            return column.is_valid() if negated else column.is_null()
        if what == "in":
            found = column.isin(self._array(operands[1:], operands[0]))
            return ~found & column.is_valid() if negated else found
        if what == "true" and kind != "true or false":
            raise self._error(f"{operands[0].name} is a column of {kind}s: compare it with something")
        condition = column if what == "true" else self._compared(what, *operands)
        return ~condition if negated else condition

    def _compared(self, sign: str, left: Any, right: Any) -> ds.Expression:
        import pyarrow as pa
        import pyarrow.dataset as ds

        if not isinstance(left, Name):
            sign, left, right = _TURNED.get(sign, sign), right, left
        column = ds.field(left.name)
        if isinstance(right, Name):
            types = [self._schema.field(name.name).type for name in (left, right)]
            if any(map(pa.types.is_floating, types)):
                # Unsafe: where a whole number has no exact float64, the nearest one is compared.
                sides = (ds.field(name.name).cast(pa.float64(), safe=False) for name in (left, right))
                return OPERATORS[sign](*sides)
            return OPERATORS[sign](column, ds.field(right.name))
        if self._is_whole(left):
            sign, right = _whole(sign, right, self._schema.field(left.name).type)
        elif not isinstance(right, str | bool):
            right = float(right)
        return OPERATORS[sign](column, ds.scalar(right))

    def _is_whole(self, column: Name) -> bool:
        import pyarrow as pa

        return pa.types.is_integer(self._schema.field(column.name).type)

    def _array(self, values: Sequence[Any], column: Name) -> pa.Array:
        import pyarrow as pa

        if self._is_whole(column):
            kind = self._schema.field(column.name).type
            low, high = _limits(kind)
            return pa.array([int(v) for v in values if low <= v <= high and int(v) == v], kind)
        return pa.array(list(map(float, values)) if not isinstance(values[0], str | bool) else list(values))

    def _kind(self, *operands: object) -> str:
        """What is compared: a number, a text, or true or false."""
        kinds = {self._kind_of(operand): operand for operand in operands}
        if len(kinds) > 1:
            spelled = " and ".join(f"{spell(operand)} ({kind})" for kind, operand in kinds.items())
            raise self._error(f"{spelled} cannot be compared")
        return next(iter(kinds))

    def _kind_of(self, operand: object) -> str:
        import pyarrow as pa

        if not isinstance(operand, Name):
            return {bool: "true or false", str: "text"}.get(type(operand), "number")
        if operand.name not in self._schema.names:
            near = difflib.get_close_matches(operand.name, self._schema.names, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise self._error(
                f"no column {operand.name!r}{hint}; there are {', '.join(sorted(self._schema.names))}. "
                "build-shards --keep-column keeps more"
            )
        kind = self._schema.field(operand.name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if pa.types.is_integer(kind) or pa.types.is_floating(kind):
            return "number"
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            return "text"
        if pa.types.is_boolean(kind):
            return "true or false"
        raise self._error(f"{operand.name} is a column of lists, which cannot be compared")

    def _error(self, what: str) -> UserError:
        return UserError(f"where: {self._name}: {what}")
