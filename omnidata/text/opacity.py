"""Opacity: does a chat template only print contents, or does it look at them?

A template that never looks prints the same text around any contents, so what was found out once holds for
every record. This is decided on the syntax tree, by what each expression may be::

    CLEAN    does not depend on contents             message['role'], loop.last, eos_token
    HOLDER   messages, or one of them                messages, messages[1:], message
    RAW      a content as it came, or trimmed        message['content'] | trim
    MIXED    text that has a content in it           '<|user|>' + message['content']

Printing, joining and assigning are allowed; so is trimming what is RAW (a MIXED text would lose blanks of the
template's own where the content is empty). Everything else that touches RAW or MIXED makes the template not
opaque, as does any syntax that is not listed here: the answer errs on the side of looking again.

Without it each record would be printed a second time: 33 us, a sixth of rendering it (benchmarks/render.py),
3 % of a build that keeps pictures and a sixth of one of text.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

from jinja2 import nodes

TYPE_TESTS = {
    "defined",
    "undefined",
    "none",
    "string",
    "mapping",
    "iterable",
    "sequence",
    "boolean",
    "number",
}


class Kind(IntEnum):
    """What an expression may be; where it may be several, the greatest (HOLDER joins nothing but CLEAN)."""

    CLEAN = 0
    HOLDER = 1
    RAW = 2
    MIXED = 3


CLEAN, HOLDER, RAW, MIXED = Kind


class NotOpaque(Exception):
    """The template may look at a content."""


def contents_are_opaque(tree: nodes.Template) -> bool:
    """True only if the template provably prints contents without looking at them.

    Example: ``{{ '<|' + m['role'] + '|>' + m['content'] }}`` is opaque, ``{% if m['content'] %}`` is not.
    """
    flow = _Flow()
    try:
        while True:  # names get greater kinds only, so this ends
            before = dict(flow.names)
            flow.statements(tree.body)
            if flow.names == before:
                return True
    except NotOpaque:
        return False


class _Flow:
    def __init__(self) -> None:
        self.names: dict[str, Kind] = {"messages": HOLDER}

    # --- statements ---------------------------------------------------------------------------------------

    def statements(self, body: Sequence[nodes.Node]) -> None:
        for node in body:
            getattr(self, f"_do_{type(node).__name__.lower()}", _refuse)(node)

    def _do_output(self, node: nodes.Output) -> None:
        for part in node.nodes:
            if self.kind(part) == HOLDER:
                raise NotOpaque

    def _do_if(self, node: nodes.If) -> None:
        self._decide(node.test)
        self.statements(node.body)
        self.statements(node.elif_)
        self.statements(node.else_)

    def _do_for(self, node: nodes.For) -> None:
        if not isinstance(node.target, nodes.Name) or node.recursive:
            self._clean(node.iter)
        elif (kind := self.kind(node.iter)) <= HOLDER:
            self._assign(node.target.name, kind)
        else:
            raise NotOpaque
        if node.test is not None:
            self._decide(node.test)
        self.statements(node.body)
        self.statements(node.else_)

    def _do_assign(self, node: nodes.Assign) -> None:
        if isinstance(node.target, nodes.Name):
            self._assign(node.target.name, self.kind(node.node))
        else:  # a tuple, or an attribute of a namespace
            self._clean(node.node)

    def _do_callblock(self, node: nodes.CallBlock) -> None:
        """{% generation %}."""
        if not isinstance(node.call.node, nodes.ExtensionAttribute):
            raise NotOpaque
        self.statements(node.body)

    def _do_macro(self, node: nodes.Macro) -> None:
        """A macro gets clean arguments only (see ``_kind_call``), so it may not reach for messages."""
        if any(self.names.get(name.name, CLEAN) for name in node.find_all(nodes.Name)):
            raise NotOpaque

    def _do_break(self, node: nodes.Node) -> None:
        pass

    _do_continue = _do_break

    def _assign(self, name: str, kind: Kind) -> None:
        both = {self.names.get(name, CLEAN), kind} - {CLEAN}
        if HOLDER in both and len(both) > 1:
            raise NotOpaque
        self.names[name] = max(both, default=CLEAN)

    # --- expressions --------------------------------------------------------------------------------------

    def kind(self, node: nodes.Node) -> Kind:
        """The kind of an expression; NotOpaque where it looks at a content."""
        return getattr(self, f"_kind_{type(node).__name__.lower()}", self._kind_other)(node)

    def _clean(self, *expressions: nodes.Node) -> None:
        if any(self.kind(node) for node in expressions):
            raise NotOpaque

    def _decide(self, test: nodes.Node) -> None:
        """A condition; whether a list of messages is empty is no secret."""
        if self.kind(test) > HOLDER:
            raise NotOpaque

    def _kind_name(self, node: nodes.Name) -> Kind:
        return self.names.get(node.name, CLEAN)

    def _kind_templatedata(self, node: nodes.TemplateData) -> Kind:
        return CLEAN

    def _kind_other(self, node: nodes.Node) -> Kind:
        """Constants, arithmetic, lists: clean if all of it is."""
        self._clean(*node.iter_child_nodes())
        return CLEAN

    def _kind_getattr(self, node: nodes.Getattr) -> Kind:
        if isinstance(node.node, nodes.Name) and node.node.name == "loop":
            return HOLDER if node.attr in ("previtem", "nextitem") else CLEAN
        return self._lookup(node.node, node.attr)

    def _kind_getitem(self, node: nodes.Getitem) -> Kind:
        if isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
            return self._lookup(node.node, node.arg.value)
        self._clean(node.arg)
        kind = self.kind(node.node)
        if kind > HOLDER or (kind == HOLDER and not _is_position(node.arg)):
            raise NotOpaque
        return kind

    def _lookup(self, holder: nodes.Node, key: str) -> Kind:
        kind = self.kind(holder)
        if kind > HOLDER or (kind == HOLDER and key in ("values", "items")):
            raise NotOpaque
        return RAW if kind == HOLDER and key == "content" else CLEAN

    def _kind_slice(self, node: nodes.Slice) -> Kind:
        self._clean(*node.iter_child_nodes())
        return CLEAN

    def _kind_add(self, node: nodes.Add) -> Kind:
        return self._joined([node.left, node.right])

    def _kind_concat(self, node: nodes.Concat) -> Kind:
        return self._joined(node.nodes)

    def _joined(self, parts: list[nodes.Expr]) -> Kind:
        kinds = {self.kind(part) for part in parts} - {CLEAN}
        if HOLDER in kinds:
            if len(kinds) > 1:
                raise NotOpaque
            return HOLDER
        return MIXED if kinds else CLEAN

    def _kind_condexpr(self, node: nodes.CondExpr) -> Kind:
        self._decide(node.test)
        kinds = {self.kind(part) for part in (node.expr1, node.expr2) if part is not None} - {CLEAN}
        if HOLDER in kinds and len(kinds) > 1:
            raise NotOpaque
        return max(kinds, default=CLEAN)

    def _kind_and(self, node: nodes.And) -> Kind:
        self._decide(node.left)
        self._decide(node.right)
        return max(self.kind(node.left), self.kind(node.right))

    _kind_or = _kind_and

    def _kind_not(self, node: nodes.Not) -> Kind:
        self._decide(node.node)
        return CLEAN

    def _kind_test(self, node: nodes.Test) -> Kind:
        if node.name not in TYPE_TESTS:
            self._clean(*node.iter_child_nodes())
        else:
            self.kind(node.node)
        return CLEAN

    def _kind_compare(self, node: nodes.Compare) -> Kind:
        """Comparing is looking, but for ``'tool_calls' in message``."""
        operands = [node.expr, *(operand.expr for operand in node.ops)]
        [*others, last] = operands
        if [operand.op for operand in node.ops] in (["in"], ["notin"]) and self.kind(last) == HOLDER:
            operands = others
        self._clean(*operands)
        return CLEAN

    def _kind_filter(self, node: nodes.Filter) -> Kind:
        kind = CLEAN if node.node is None else self.kind(node.node)
        has_arguments = bool(node.args or node.kwargs or node.dyn_args or node.dyn_kwargs)
        if kind == RAW and node.name == "trim" and not has_arguments:
            return RAW
        if kind == HOLDER and node.name in ("length", "count") and not has_arguments:
            return CLEAN
        if kind == HOLDER and node.name in ("first", "last", "list") and not has_arguments:
            return HOLDER
        return self._kind_other(node)

    def _kind_call(self, node: nodes.Call) -> Kind:
        method = node.node
        if isinstance(method, nodes.Name) and method.name == "raise_exception":
            return CLEAN  # a reject in any case; whether it is reached is decided elsewhere
        if isinstance(method, nodes.Getattr) and not (node.kwargs or node.dyn_args or node.dyn_kwargs):
            kind = self.kind(method.node)
            if kind == RAW and method.attr == "strip" and not node.args:
                return RAW
            if kind == HOLDER and method.attr == "get" and len(node.args) == 1:
                return self._kind_getitem(nodes.Getitem(method.node, node.args[0], "load"))
        if isinstance(method, nodes.Getattr) and self.kind(method.node):
            raise NotOpaque
        return self._kind_other(node)


def _is_position(node: nodes.Node) -> bool:
    """Of a list, not of a message: a number, a slice, or arithmetic such as ``loop.index0 - 1``."""
    if isinstance(node, nodes.Add | nodes.Sub):
        return _is_position(node.left) or _is_position(node.right)  # text and number do not add up
    if isinstance(node, nodes.Neg):
        return _is_position(node.node)
    if isinstance(node, nodes.Slice):
        return True
    if isinstance(node, nodes.Const):
        return isinstance(node.value, int)
    return isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name) and node.node.name == "loop"


def _refuse(node: nodes.Node) -> None:
    raise NotOpaque
