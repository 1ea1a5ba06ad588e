"""A tree of the grammar over the columns of an index, as a ``pyarrow.dataset`` expression."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from omnidata.schema import UserError
from omnidata.where.grammar import Name, Node, spell

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.dataset as ds

OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}


def _joined(join: Callable[[Any, Any], Any], parts: list[ds.Expression]) -> ds.Expression:
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
        """The expression of a node, or of its opposite: null, not true, where a column has no value."""
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
        condition = column if what == "true" else OPERATORS[what](*self._sides(operands))
        return ~condition if negated else condition

    def _sides(self, operands: Sequence[Any]) -> Iterator[ds.Expression]:
        import pyarrow.dataset as ds

        [column, *_] = [operand for operand in operands if isinstance(operand, Name)]
        for operand in operands:
            yield (
                ds.field(operand.name)
                if isinstance(operand, Name)
                else ds.scalar(self._literal(operand, column))
            )

    def _literal(self, value: Any, column: Name) -> Any:
        """A whole number of the column's own type, if it is one: no cast stands between it and statistics."""
        import pyarrow as pa

        if isinstance(value, bool) or not isinstance(value, int):
            return value
        try:
            return pa.scalar(value, self._schema.field(column.name).type)
        except (pa.ArrowInvalid, OverflowError):
            return float(value)

    def _array(self, values: Sequence[Any], column: Name) -> pa.Array:
        import pyarrow as pa

        scalars = [self._literal(value, column) for value in values]
        if len({type(scalar) for scalar in scalars}) > 1:  # whole numbers and others
            scalars = [float(value) for value in values]
        return pa.array(scalars)

    def _kind(self, *operands: Any) -> str:
        """What is compared: a number, a text, or true or false."""
        kinds = {self._kind_of(operand): operand for operand in operands}
        if len(kinds) > 1:
            spelled = " and ".join(f"{spell(operand)} ({kind})" for kind, operand in kinds.items())
            raise self._error(f"{spelled} cannot be compared")
        return next(iter(kinds))

    def _kind_of(self, operand: Any) -> str:
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
