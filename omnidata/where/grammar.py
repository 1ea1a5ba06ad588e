"""The grammar of ``where``: text -> tokens -> tree, and a tree's one spelling."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from omnidata.schema import UserError

MAX_LENGTH = 20_000  # characters
MAX_DIGITS = 40  # of a whole number
MAX_DEPTH = 50  # of parentheses and `not`
KEYWORDS = frozenset(("and", "or", "not", "in", "is", "null", "true", "false"))
OPERATORS = ("==", "!=", "<=", ">=", "<", ">")
_EXAMPLE = "'relevance_min >= 4 and n_images <= 8 and source != \"ocr.json\"'"
_TOKEN = re.compile(
    r"""\s*(?:(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)
    |(?P<text>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
    |`(?P<quoted>[^`]+)`
    |(?P<word>[^\W\d][\w.]*)
    |(?P<sign>==|!=|<=|>=|[<>()\[\],]))""",
    re.VERBOSE | re.DOTALL,
)


class Token(NamedTuple):
    """A piece of the text: its kind (number, text, column, keyword, sign, end), what it says, and where."""

    kind: str
    value: Any
    at: int  # characters before it


@dataclass(frozen=True, slots=True)
class Name:
    """A column."""

    name: str


@dataclass(frozen=True, slots=True)
class Node:
    """An operation: ``and``, ``or``, ``not``, ``in``, ``null``, ``is true`` or one of OPERATORS."""

    operation: str
    operands: tuple[Any, ...]  # Nodes, Names, literals; of ``in``: a Name, then literals


def names_of(node: object) -> Iterator[Name]:
    if isinstance(node, Name):
        yield node
    elif isinstance(node, Node):
        for operand in node.operands:
            yield from names_of(operand)


def spell(node: object, *, inside: str = "") -> str:
    if isinstance(node, Name):
        is_word = re.fullmatch(r"[^\W\d][\w.]*", node.name) and node.name.lower() not in KEYWORDS
        return node.name if is_word else f"`{node.name}`"
    if not isinstance(node, Node):
        if isinstance(node, str):
            return '"' + node.replace("\\", "\\\\").replace('"', '\\"') + '"'
        return str(node).lower() if isinstance(node, bool) else repr(node)
    what, operands = node.operation, node.operands
    if what in ("and", "or"):
        text = f" {what} ".join(spell(operand, inside=what) for operand in operands)
        return f"({text})" if inside in ("and", "not") and what != inside else text
    if what == "not":
        return f"not {spell(operands[0], inside='not')}"
    if what == "null":
        return f"{spell(operands[0])} is null"
    if what == "true":
        return spell(operands[0])
    if what == "in":
        return f"{spell(operands[0])} in [{', '.join(map(spell, operands[1:]))}]"
    return f"{spell(operands[0])} {what} {spell(operands[1])}"


class Parser:
    """Recursive descent over the tokens; every method reads one rule of the grammar."""

    def __init__(self, text: str) -> None:
        if not isinstance(text, str) or len(text) > MAX_LENGTH:
            raise UserError(
                f"where: a condition is a text of at most {MAX_LENGTH:,} characters, as {_EXAMPLE}"
            )
        self._text = text
        self._tokens = list(self._split())
        self._next = 0
        self._depth = 0

    def _split(self) -> Iterator[Token]:
        at, text = 0, self._text.rstrip()
        while at < len(text):
            match = _TOKEN.match(text, at)
            if not match:
                at += len(text[at:]) - len(text[at:].lstrip())
                hint = ": equality is ==" if text[at] == "=" else ""
                raise self._error(f"cannot read {text[at : at + 10]!r}{hint}", at)
            kind = match.lastgroup or ""
            yield self._token(kind, match[kind], match.start(kind))
            at = match.end()
        yield Token("end", "", len(text))

    def _token(self, kind: str, text: str, at: int) -> Token:
        if kind == "number":
            return Token("literal", self._number(text, at), at)
        if kind == "text":
            value = re.sub(r"\\(.)", r"\1", text[1:-1], flags=re.DOTALL)
            if any("\ud800" <= character <= "\udfff" for character in value):
                raise self._error("a text with half a character", at)
            return Token("literal", value, at)
        if kind == "word" and text.lower() in KEYWORDS:
            literal = {"true": True, "false": False}.get(text.lower())
            return Token("keyword", text.lower(), at) if literal is None else Token("literal", literal, at)
        return Token("sign" if kind == "sign" else "column", text, at)

    def _number(self, text: str, at: int) -> int | float:
        if re.search(r"[.eE]", text):
            return float(text)
        if len(text) > MAX_DIGITS:
            raise self._error(f"a number of more than {MAX_DIGITS} digits", at)
        return int(text)

    def _error(self, what: str, at: int) -> UserError:
        return UserError(f"where: {what}, at character {at + 1} of {self._text!r}; write it as {_EXAMPLE}")

    def _peek(self, *values: str) -> bool:
        token = self._tokens[self._next]
        return token.kind in ("keyword", "sign") and token.value in values

    def _take(self, *values: str) -> bool:
        found = self._peek(*values)
        self._next += found
        return found

    def _expect(self, value: str) -> None:
        if not self._take(value):
            raise self._unexpected(repr(value))

    def _unexpected(self, wanted: str) -> UserError:
        token = self._tokens[self._next]
        found = "it ends" if token.kind == "end" else f"there is {token.value!r}"
        return self._error(f"{wanted} is expected but {found}", token.at)

    def parse(self) -> Node:
        tree = self._any()
        if self._tokens[self._next].kind != "end":
            raise self._unexpected("`and`, `or` or the end")
        return tree

    def _any(self) -> Node:
        return self._joined("or", lambda: self._joined("and", self._not))

    def _joined(self, word: str, rule: Callable[[], Node]) -> Node:
        parts = [rule()]
        while self._take(word):
            parts.append(rule())
        return parts[0] if len(parts) == 1 else Node(word, tuple(parts))

    def _not(self) -> Node:
        if not self._peek("not", "("):
            return self._comparison()
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._error(f"more than {MAX_DEPTH} levels", self._tokens[self._next].at)
        if self._take("not"):
            tree = Node("not", (self._not(),))
        else:
            self._expect("(")
            tree = self._any()
            self._expect(")")
        self._depth -= 1
        return tree

    def _comparison(self) -> Node:
        first, at = self._value(), self._tokens[self._next].at
        if isinstance(first, Name) and self._peek("not", "in"):
            negated = self._take("not")
            self._expect("in")
            return self._negated(Node("in", (first, *self._list())), negated)
        if isinstance(first, Name) and self._take("is"):
            negated = self._take("not")
            self._expect("null")
            return self._negated(Node("null", (first,)), negated)
        if not self._peek(*OPERATORS):
            if isinstance(first, Name):
                return Node("true", (first,))
            raise self._unexpected("a comparison")
        parts, left = [], first
        while self._peek(*OPERATORS):
            sign = self._tokens[self._next].value
            self._next += 1
            right = self._value()
            if not isinstance(left, Name) and not isinstance(right, Name):
                raise self._error("a comparison of two constants", at)
            parts.append(Node(sign, (left, right)))
            left = right
        return parts[0] if len(parts) == 1 else Node("and", tuple(parts))

    def _negated(self, node: Node, negated: bool) -> Node:
        return Node("not", (node,)) if negated else node

    def _value(self) -> object:
        token = self._tokens[self._next]
        if token.kind not in ("column", "literal"):
            raise self._unexpected("a column or a constant")
        self._next += 1
        return Name(token.value) if token.kind == "column" else token.value

    def _list(self) -> list[object]:
        self._expect("[")
        values: list[object] = []
        while not values or self._take(","):
            if self._tokens[self._next].kind != "literal":
                raise self._unexpected("a constant")
            values.append(self._value())
        self._expect("]")
        return values
