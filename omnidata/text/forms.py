"""Forms: how turns that call tools are handed to a chat template.

As the record has them, first of all. Templates disagree on things that records can't all suit, so
another form is taken if, and only if, the template refuses the record's or does not print all of it:

    arguments    an object (as transformers says), or its JSON as text (as OpenAI writes)
    content      null or "", of a turn that only calls
    role         "function", as OpenAI once wrote, or "tool"
    text         what a tool answered, as a string where others are lists of parts
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product, starmap
from typing import Any

from omnidata.schema import TOOL_ROLES, Message, RejectError
from omnidata.text.chat_template import ChatTemplate

ARGUMENTS = {
    "objects": "have calls whose arguments, JSON as text, were handed to the chat template as objects",
    "texts": "have calls whose arguments, objects, were handed to the chat template as JSON text",
}
ROLE = "have turns of the role 'function' that were handed to the chat template as 'tool'"


@dataclass(frozen=True, slots=True)
class Form:
    """One way of handing over a conversation."""

    arguments: str = ""  # "": as they are; objects | texts
    swap_empty: bool = False  # null for "" and "" for null
    role: str = "function"
    answers_as_text: bool = False

    @property
    def notes(self) -> tuple[str, ...]:
        """What the report should tell."""
        told = (ARGUMENTS[self.arguments],) if self.arguments else ()
        return (*told, ROLE) if self.role != "function" else told

    def role_of(self, message: Message) -> str:
        """The role that the template is told."""
        return self.role if message.role == "function" else message.role

    def content(self, message: Message, parts: Sequence[str | None], template: ChatTemplate) -> object:
        """A turn's content; None among the parts: a picture."""
        if not parts:
            return self.empty(message)
        if self.answers_as_text and message.role in TOOL_ROLES and None not in parts:
            return "".join(part or "" for part in parts)
        return template.content_of(self.role_of(message), parts)

    def empty(self, message: Message) -> str | None:
        """What an empty turn's content is."""
        is_null = "content" in message.more
        if self.swap_empty and "tool_calls" in message.more:
            is_null = not is_null
        return None if is_null else ""

    def calls(self, message: Message) -> list[dict[str, object]]:
        """The turn's calls."""
        calls = message.more["tool_calls"]
        return [self._call(call) for call in calls] if self.arguments else calls

    def _call(self, call: dict[str, Any]) -> dict[str, object]:
        if call.get("function") is not None:
            return {**call, "function": self._call(call["function"])}
        arguments = call.get("arguments")
        if self.arguments == "objects" and isinstance(arguments, str):
            return {**call, "arguments": _object(arguments)}
        if self.arguments == "texts" and isinstance(arguments, Mapping):
            return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
        return call


def forms_of(messages: Sequence[Message]) -> Iterator[Form]:
    """The forms that differ for these turns; the record's own is the first."""
    calls = [call for message in messages for call in message.more.get("tool_calls", ())]
    given = [(call.get("function") or call).get("arguments") for call in calls]
    arguments = [""]
    arguments += ["objects"] * any(isinstance(each, str) for each in given)
    arguments += ["texts"] * any(isinstance(each, Mapping) for each in given)
    silent = any("tool_calls" in message.more and not message.parts for message in messages)
    roles = ("function", "tool") if any(message.role == "function" for message in messages) else ("function",)
    answers = any(message.role in TOOL_ROLES for message in messages)
    yield from starmap(Form, product(arguments, _both(silent), roles, _both(answers)))


def _both(matters: bool) -> tuple[bool, ...]:
    return (False, True) if matters else (False,)


def _object(text: str) -> object:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RejectError("bad_content", f"the arguments of a call are no JSON: {error}") from error
    if not isinstance(value, Mapping):
        raise RejectError("bad_content", "the arguments of a call are JSON, but no object")
    return value
