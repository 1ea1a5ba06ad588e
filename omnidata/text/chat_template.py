"""A chat template, and what can be proven about it.

A template is a program that prints messages. To know where each assistant turn is in what it prints, its
contents are replaced by marks, the template prints those, and the marks show the
pieces of text around each content::

    pieces(("user", "assistant"))  ->  ["<|user|>\\n", "</s>\\n<|assistant|>\\n", "</s>\\n"]

Step (1) ``ChatTemplate.shape(roles)`` finds those pieces once per sequence of roles. Step (2) each record is
``piece + content + piece + ...``. That is exact if the template only prints contents and never looks at
them (``is_opaque``, decided on its syntax tree by omnidata.text.opacity). For any other template step (3)
``prove`` prints the record itself and compares; a difference means that the mask cannot be proven.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date as Date
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from omnidata.schema import RejectError, UserError
from omnidata.text.opacity import contents_are_opaque

if TYPE_CHECKING:
    from jinja2.parser import Parser

# What Zephyr, and so OmniLMM, trains on: <|role|>, newline, content, </s>, newline.
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>
'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

ZEPHYR_PROBE = "<|system|>\na{eos}\n<|user|>\nb{eos}\n<|assistant|>\nc{eos}\n"

NONCE = secrets.token_hex(8)  # 64 random bits per process: no text can contain a mark by intent or accident
GENERATION_TAG = re.compile(r"\{%-?\s*generation\b")
GENERATION_START, GENERATION_END = f"\ufdd0{NONCE}g\ufdd1", f"\ufdd0{NONCE}G\ufdd1"


@dataclass(frozen=True, slots=True)
class TurnShape:
    """What a template prints around the contents of one sequence of roles."""

    pieces: tuple[str, ...]  # n + 1 texts around n contents
    strips: tuple[tuple[bool, bool], ...]  # per content: are its blanks on the left, on the right removed?
    marked: tuple[bool, ...]  # per content: inside {% generation %}; all True if the template has none

    def contents(self, contents: Sequence[str]) -> list[str]:
        """The contents as the template prints them."""
        return [_strip(text, strip) for text, strip in zip(contents, self.strips, strict=True)]

    def text(self, printed: Sequence[str]) -> str:
        """The whole rendering, from contents as ``contents`` gives them."""
        interleaved = [self.pieces[0]]
        for content, piece in zip(printed, self.pieces[1:], strict=True):
            interleaved += (content, piece)
        return "".join(interleaved)


def _strip(text: str, strip: tuple[bool, bool]) -> str:
    left, right = strip
    text = text.lstrip() if left else text
    return text.rstrip() if right else text


class ChatTemplate:
    """A compiled chat template with the tokenizer's special tokens bound to it."""

    def __init__(self, text: str, special_tokens: dict[str, str], *, date: str | None = None) -> None:
        self.text = text
        self._variables: dict[str, object] = dict(
            special_tokens
        )  # {"eos_token": "</s>", …}, as transformers'
        if date is not None:
            self._variables["strftime_now"] = _calendar(date)
        try:
            self.is_opaque = contents_are_opaque(_environment().parse(text))
            self._template = _environment().from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"the chat template, line {error.lineno}: {error.message}") from error
        self.has_generation_marks = GENERATION_TAG.search(text) is not None
        self._parts_roles = self._find_parts_roles()
        self.is_opaque = self.is_opaque and not self._parts_roles
        self.shape = lru_cache(maxsize=4096)(self._shape)

    def pieces_after_replies(self) -> tuple[str, str]:
        """What is printed after a reply between two exchanges, and after the last one."""
        try:
            pieces = self.shape(("user", "assistant") * 2, False).pieces
        except RejectError:
            return "", ""
        return pieces[2], pieces[4]

    def _find_parts_roles(self) -> frozenset[str]:
        """Roles whose contents the template wants as lists of parts; strings wherever it prints those."""
        for roles in ((), ("user",), ("user", "assistant"), ("system", "user", "assistant")):
            self._parts_roles = frozenset(roles)
            for probe in (("user", "assistant"), ("system", "user", "assistant"), ("assistant",)):
                try:
                    self._shape(probe)
                except RejectError:
                    continue
                if probe[0] != "system" and self._takes_system(roles):
                    return frozenset(roles)
        return frozenset()

    def _takes_system(self, roles: Sequence[str]) -> bool:
        """Are system turns printed as well, or refused in either form?"""
        probe = ("system", "user", "assistant")
        before = self._parts_roles
        answers = []
        for more in ((), ("system",)):
            self._parts_roles = before | frozenset(more)
            try:
                self._shape(probe)
                answers.append(True)
            except RejectError:
                answers.append(False)
        self._parts_roles = before
        return answers[0] or not answers[1]

    def _messages(self, roles: Sequence[str], contents: Sequence[str]) -> list[dict[str, object]]:
        return [
            {"role": role, "content": [{"type": "text", "text": text}] if role in self._parts_roles else text}
            for role, text in zip(roles, contents, strict=True)
        ]

    def render(self, messages: Sequence[dict[str, Any]], *, generation_prompt: bool = False) -> str:
        """What the template prints; RejectError if it refuses the messages."""
        return without_marks(self.print(messages, generation_prompt))

    def prove(
        self, shape: TurnShape, roles: Sequence[str], contents: Sequence[str], *, generation_prompt: bool
    ) -> None:
        """Refuse contents that the template does not print as the shape says."""
        if self.is_opaque:
            return  # true of all contents
        messages = self._messages(roles, contents)
        if self.render(messages, generation_prompt=generation_prompt) != shape.text(shape.contents(contents)):
            raise RejectError(
                "mask_unproven",
                "the chat template changes a content, or reacts to one, so its place is unknown",
            )

    def content_of(self, role: str, parts: Sequence[str | None]) -> object:
        """A turn's content as the template wants it; a picture (None) is the renderer's to write as text."""
        text = "".join(part or "" for part in parts)
        return [{"type": "text", "text": text}] if role in self._parts_roles else text

    def print(
        self, messages: Sequence[dict[str, object]], generation_prompt: bool = False, tools: object = None
    ) -> str:
        """What the template prints, generation marks included; RejectError if it refuses."""
        try:
            pieces = self._template.generate(
                messages=messages,
                add_generation_prompt=generation_prompt,
                tools=tools,
                documents=None,
                **self._variables,
            )
            return "".join(_bounded(pieces, [messages, tools]))
        except jinja2.TemplateError as error:
            if isinstance(error, jinja2.UndefinedError) and "strftime_now" in str(error):
                raise UserError(NO_DATE) from error
            raise RejectError(
                "template_refused", f"the chat template refuses the messages: {error}"
            ) from error
        except _MISTAKES as error:
            raise RejectError(
                "template_refused", f"the chat template fails on the messages: {error!r}"
            ) from error

    def _shape(self, roles: tuple[str, ...], generation_prompt: bool = False) -> TurnShape:
        return self.shape_of(len(roles), lambda contents: self._print(roles, contents, generation_prompt))

    def shape_of(self, num_contents: int, printed: Callable[[Sequence[str]], str]) -> TurnShape:
        """The shape around so many contents, of what ``printed`` gives for them."""
        marks = [mark(i) for i in range(num_contents)]
        bare = split_at(printed(marks), marks)
        padded = split_at(printed([f"{_LEFT}{mark}{_RIGHT}" for mark in marks]), marks)
        pieces = [without_marks(piece) for piece in bare]
        strips = _find_strips(pieces, [without_marks(piece) for piece in padded])
        return TurnShape(tuple(pieces), strips, self.marked(bare))

    def _print(self, roles: Sequence[str], contents: Sequence[str], generation_prompt: bool) -> str:
        return self.print(self._messages(roles, contents), generation_prompt)

    def marked(self, pieces: Sequence[str]) -> tuple[bool, ...]:
        """For each content between pieces as printed: is it inside ``{% generation %}``?"""
        if not self.has_generation_marks:
            return (True,) * (len(pieces) - 1)
        depth, marked = 0, []
        for piece in pieces[:-1]:
            depth += piece.count(GENERATION_START) - piece.count(GENERATION_END)
            marked.append(depth > 0)
        return tuple(marked)


def prints_zephyr(template: ChatTemplate, eos: str | None) -> bool:
    """Are the template's turns those of Zephyr?"""
    turns = (("system", "a"), ("user", "b"), ("assistant", "c"))
    try:
        printed = template.render([{"role": role, "content": text} for role, text in turns])
    except RejectError:  # a template without system turns
        return False
    return printed == ZEPHYR_PROBE.format(eos=eos)


NO_DATE = (
    "the chat template prints today's date; say which one with --date YYYY-MM-DD, so that the same records "
    "give the same bytes next week"
)


def _calendar(date: str) -> Callable[[str], str]:
    """``strftime_now`` of a fixed day."""
    try:
        day = Date.fromisoformat(date)
    except ValueError:
        raise UserError(f"--date {date!r}: write YYYY-MM-DD") from None
    return day.strftime


MAX_PRINTED = 1 << 20  # characters that a template may print around its contents …
MAX_COPIES = 16  # … and how often it may print them
MAX_SECONDS = 20.0  # for one conversation
# A template's own: what its expressions raise on messages that it does not expect.
_MISTAKES = (
    *(TypeError, KeyError, AttributeError, IndexError, ValueError, ArithmeticError),
    *(RecursionError, MemoryError),
)


def _bounded(pieces: Iterable[str], given: list[object]) -> Iterator[str]:
    """The pieces; RejectError for a template that prints without end."""
    held, open_values = 0, given
    while open_values:
        value = open_values.pop()
        if isinstance(value, str):
            held += len(value)
        elif isinstance(value, dict):
            open_values += value.values()
        elif isinstance(value, list | tuple):
            open_values += value
    left, until = MAX_PRINTED + MAX_COPIES * held, time.monotonic() + MAX_SECONDS
    for piece in pieces:
        left -= len(piece)
        if left < 0 or time.monotonic() > until:
            raise RejectError("template_refused", "the chat template prints without end")
        yield piece


_MARK = "\ue000"  # private use; stands in place of contents, so it need not be a secret
_MARKED = re.compile(f"({_MARK}\\d+\ue001)")
_LEFT, _RIGHT = "  \n", "\n"  # blanks of different lengths, so that it shows which of them were removed


def mark(number: int) -> str:
    """What stands in place of a content."""
    return f"{_MARK}{number}\ue001"


def split_at(text: str, marks: Sequence[str]) -> list[str]:
    """The text around the marks, each of which must stand there once, in order."""
    parts = _MARKED.split(text)  # text, mark, text, …
    found = parts[1::2]
    if found != list(marks):
        wrong = (i for i, each in enumerate(marks) if found[i : i + 1] != [each] or found.count(each) > 1)
        place = next(wrong, len(marks) - 1)
        raise RejectError(
            "mask_unproven", f"the chat template does not print message {place + 1} once and in order"
        )
    if any(_MARK in piece for piece in parts[::2]):
        raise RejectError("mask_unproven", "the chat template takes a content apart")
    return parts[::2]


def _find_strips(pieces: Sequence[str], padded: Sequence[str]) -> tuple[tuple[bool, bool], ...]:
    """Which contents lose their blanks: compares what stands between bare marks and between padded ones."""
    rights, lefts = [], []
    last = len(pieces) - 1
    for i, (piece, around) in enumerate(zip(pieces, padded, strict=True)):
        ways = [
            (right, left)
            for right in ("", _RIGHT)
            for left in ("", _LEFT)
            if right + piece + left == around and not (i == 0 and right) and not (i == last and left)
        ]
        if not ways:
            raise RejectError("mask_unproven", "the chat template changes the blanks around a content")
        rights.append(ways[0][0] == "")
        lefts.append(ways[0][1] == "")
    return tuple(zip(lefts[:-1], rights[1:], strict=True))


def without_marks(text: str) -> str:
    """What is printed, without the marks of ``{% generation %}``."""
    return text.replace(GENERATION_START, "").replace(GENERATION_END, "")


class _GenerationTag(Extension):
    """``{% generation %}...{% endgeneration %}``: wraps what it prints in marks."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own interface

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_wrap"), [], [], body).set_lineno(line)

    def _wrap(self, caller: Any) -> str:
        return f"{GENERATION_START}{caller()}{GENERATION_END}"


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    """The environment of ``apply_chat_template``, but for today's date.

    ``strftime_now`` is left undefined: templates that ask whether it is there take their fixed date, so that
    the same records give the same bytes next week.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: object, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
