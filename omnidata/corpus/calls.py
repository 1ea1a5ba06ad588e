"""Calls of tools, as other projects write them -> as ``apply_chat_template`` takes them.

    OpenAI, TRL       {"role": "assistant", "tool_calls": [{"type": "function", "function": {...}}]}
    OpenAI, earlier   {"role": "assistant", "function_call": {"name", "arguments"}}, {"role": "function"}
    LLaMA-Factory     {"from": "function_call", "value": JSON of one call or a list}, {"from": "observation"}
    ms-swift          {"role": "tool_call", "content": JSON of one call}, {"role": "tool_response"}

    tools             a list, or its JSON; functions: the earlier name

Lists of calls and tools go on as they are. What comes as JSON text is parsed; a tool or call that is written
there without ``{"type": "function", "function": ...}`` gets it, which is how those projects hand it on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from omnidata.corpus.keys import is_empty, shown
from omnidata.schema import RejectError

TOOL_KEYS = ("tools", "functions")  # of a record
MAX_DEPTH = 64  # of tools and arguments


def read_tools(payload: Mapping[str, object]) -> tuple[tuple[dict[str, object], ...], set[str]]:
    """The record's tools, and the keys that they were read from.

    Raises:
        RejectError: no list of objects, or two lists that differ.
    """
    found = {key: _tools(key, payload[key]) for key in TOOL_KEYS if not is_empty(payload.get(key))}
    if len(found) > 1 and found["tools"] != found["functions"]:
        raise RejectError("bad_record", "the record has tools and functions, and they differ")
    return (tuple(next(iter(found.values()))) if found else ()), set(found)


def _tools(key: str, value: object) -> list[dict[str, object]]:
    tools = _parsed(value, f"the key {key!r}") if isinstance(value, str) else value
    if not isinstance(tools, list) or not all(isinstance(tool, dict) and tool for tool in tools):
        raise RejectError("bad_record", f"the key {key!r} is {shown(value)}, no list of tools")
    _refuse_deep(tools, key)
    return [_wrapped(tool) for tool in tools] if isinstance(value, str) or key == "functions" else tools


def read_calls(value: object, where: str) -> list[dict[str, object]]:
    """``tool_calls`` of a turn, checked; they stay as they are."""
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        raise RejectError("bad_content", f"{where} is {shown(value)}, no list of calls")
    for call in value:
        function = function_of(call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RejectError("bad_content", f"{where} has {shown(call)}, which names no function")
        if not isinstance(function.get("arguments", {}), Mapping | str):
            raise RejectError(
                "bad_content",
                f"{where}: the arguments of a call are {shown(function['arguments'])}, no object",
            )
    _refuse_deep(value, where)
    return value


def written_calls(content: object, where: str) -> list[dict[str, object]]:
    """The calls that stand in a turn's content as JSON, one or a list of them."""
    calls = _parsed(content, where) if isinstance(content, str) else content
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) for call in calls):
        raise RejectError("bad_content", f"{where} is {shown(content)}, no call of a tool")
    return read_calls([_wrapped(call) for call in calls], where)


def function_of(value: Mapping[str, object]) -> object:
    """What names the function of a tool or call: its ``function``, or itself."""
    return value["function"] if value.get("function") is not None else value


def _wrapped(value: dict[str, object]) -> dict[str, object]:
    return value if "function" in value or "type" in value else {"type": "function", "function": value}


def _parsed(text: str, where: str) -> Any:
    try:
        return orjson.loads(text)
    except (orjson.JSONDecodeError, UnicodeEncodeError) as error:
        raise RejectError("bad_content", f"{where} is {shown(text)}, no JSON: {error}") from error


def _refuse_deep(value: object, where: str) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _inner(outer)]
    if level:
        raise RejectError("bad_record", f"{where}: values nested over {MAX_DEPTH} deep")


def _inner(value: object) -> list[object]:
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else []
