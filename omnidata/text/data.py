"""Data inside a template's own text: tools, calls and names, which templates print in ways of their own.

Where a chat template prints such data is not known, so its strings can't be taken apart from the template's
text as contents are. That matters for few of them: those that spell a control token, or that could complete
one together with what stands beside them. ``Hidden`` puts a mark in place of each of these; in what is
printed the marks are somebody's text, and everything around them is the template's::

    {"name": "f", "arguments": {"x": "a </s>"}}  ->  {"name": "f", "arguments": {"x": "\\ue0020\\ue003"}}
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omnidata.text.encoder import Encoder, refuse_surrogates

_MARK = re.compile("\ue002(\\d+)\ue003")


class Hidden:
    """The strings of one conversation's data that must not meet the template's text."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._texts: list[str] = []

    def __bool__(self) -> bool:
        return bool(self._texts)

    def hide(self, value: object) -> Any:
        """The same data with marks in it; RejectError for half of a surrogate pair."""
        if isinstance(value, str):
            refuse_surrogates(value)
            if "\ue002" not in value and not self._encoder.may_spell(value):
                return value
            self._texts.append(value)
            return f"\ue002{len(self._texts) - 1}\ue003"
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(inner) for key, inner in value.items()}
        return [self.hide(inner) for inner in value] if isinstance(value, list | tuple) else value

    def parts(self, text: str) -> list[str]:
        """Text, hidden string, text, …: what stands between the marks, and what they stand for."""
        parts = _MARK.split(text) if self._texts else [text]
        parts[1::2] = [self._texts[int(number)] for number in parts[1::2]]
        return parts

    def show(self, text: str, spelt: Iterator[str]) -> str:
        """The text with the next of these strings at each mark."""
        return _MARK.sub(lambda match: next(spelt), text) if self._texts else text

    def guard(self, text: str, spelt: Iterator[str] | None = None) -> str:
        """The same, with the control tokens that the template itself printed guarded; None: as they came."""
        parts = self.parts(text)
        parts[::2] = map(self._encoder.guard, parts[::2])
        if spelt is not None:
            parts[1::2] = [next(spelt) for _ in parts[1::2]]
        return "".join(parts)


def escaped(text: str) -> str:
    """A string as it stands in JSON."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def leaves(value: object) -> Iterator[object]:
    """Every value of nested data that is no container, and every key."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, Mapping):
            left += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple):
            left += value
        else:
            yield value


def is_printed(leaf: object, text: str) -> bool:
    """Does the text show the value, in one of the ways in which templates print it?"""
    if isinstance(leaf, str):
        return any(spelt in text for spelt in (leaf, escaped(leaf), leaf.strip(), json.dumps(leaf)[1:-1]))
    return str(leaf) in text or json.dumps(leaf, default=str) in text


def missing_of(calls: Sequence[Mapping[str, Any]], text: str) -> str:
    """What of the calls the text does not show, in words; "" if nothing."""
    functions = [call.get("function") or call for call in calls]
    names = Counter(function["name"] for function in functions)
    for name, count in names.items():
        if not name or text.count(name) < count:
            return f"a call of {name!r}"
    for function in functions:
        arguments = function.get("arguments")
        # JSON as text that is printed with escapes is a text in JSON, not a call's arguments.
        shown = (
            arguments.strip() in text
            if isinstance(arguments, str)
            else all(is_printed(each, text) for each in leaves(arguments))
        )
        if arguments is not None and not shown:
            return f"the arguments of a call of {function['name']!r}, as they are,"
    return ""
