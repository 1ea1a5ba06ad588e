"""Turns: who says what in a record, whichever keys it uses, before anything about pictures is decided.

    conversations / messages / conversation    [{"from" or "role", "value" or "content", switches, ...}, ...]
    texts                                      [{"user", "assistant"}, ...]
    instruction, input, output, history        Alpaca
    question, answer / chosen                  RLAIF-V
    text                                       JSON of the above, or a caption
    caption                                    with --caption-prompt

A turn of an assistant may carry a switch: ``weight`` (0 or 1), ``loss`` or ``train`` (booleans). Its
reasoning, its calls of tools and what the tools answered (calls.py) go on to the chat template.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from omnidata.corpus.calls import TOOL_KEYS, read_calls, written_calls
from omnidata.corpus.keys import is_empty, shown
from omnidata.schema import REASONING_KEYS, TOOL_ROLES, Record, RejectError, Role

SPEAKERS: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "tool_response": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function": "function",
}
CALLERS = ("function_call", "tool_call")  # an assistant's turn whose content is JSON of a call
SYSTEM_KEYS = ("system", "system_prompt", "system_message")  # of a record, beside its turns
_SWITCHES = ("weight", "loss", "train")
_TOOLS_OWN = ("name", "tool_call_id")  # of a tool's turn
# What a turn or record may hold besides, and no chat template is given.
_MORE_OF_A_TURN = ("tool_call", "tool_responses", "thought", "thoughts", "refusal", *TOOL_KEYS)
_MORE_OF_A_RECORD = ("documents", "reasoning_content", "tool_calls", "function_call")
_CALLS = ("tool_calls", "function_call")
_LISTS = ("conversations", "messages", "conversation")


@dataclass
class Turn:
    """One turn: its role, its content (text or parts, not checked yet), what else stands in it."""

    role: Role
    content: object
    rest: dict[str, object] = field(default_factory=dict)  # keys that are neither speaker, content nor switch
    switch: bool | None = None  # is it to be learned? None: nothing is said
    more: dict[str, Any] = field(default_factory=dict)  # keys that the chat template is given besides
    is_call: bool = False  # written as a turn of its own, so it goes on the assistant's turn before it


def read_turns(record: Record, caption_prompt: Sequence[str] = ()) -> tuple[list[Turn], set[str]]:
    """The turns, and the record's keys that they were read from.

    Raises:
        RejectError: no known keys, a value of the wrong kind, or content that cannot be rendered.
    """
    payload = record.payload
    for key in _MORE_OF_A_RECORD:
        if not is_empty(payload.get(key)):
            raise RejectError(
                "unread_content", f"the key {key!r} is part of the conversation and is not rendered"
            )
    turns, read = _read(record, caption_prompt)
    if not turns:
        raise RejectError("empty_conversation", "the conversation has no turns")
    system = [key for key in SYSTEM_KEYS if not is_empty(payload.get(key))]
    if len({str(payload[key]) for key in system}) > 1:
        raise RejectError("bad_record", f"the record has {' and '.join(system)}, and they differ")
    if system:
        turns = [Turn("system", payload[system[0]]), *turns]
    return turns, read | set(system)


def _read(record: Record, caption_prompt: Sequence[str]) -> tuple[list[Turn], set[str]]:
    payload = record.payload
    given = [key for key in _LISTS if not is_empty(payload.get(key))]
    for other in given[1:]:
        if payload[other] != payload[given[0]]:
            raise RejectError("bad_record", f"the record has {given[0]} and {other}, and they differ")
    full = [key for key in _READERS if not is_empty(payload.get(key))]
    if keys := full or [key for key in _READERS if payload.get(key) is not None]:
        turns, read = _READERS[keys[0]](payload, keys[0], _Captions(record, caption_prompt))
        return turns, {keys[0], *given, *read}
    names = ", ".join(sorted(map(str, payload))[:20]) or "none"
    raise RejectError("bad_record", f"no {', '.join(_READERS)} among the record's keys: {names}")


Reader = Callable[[dict[str, object], str, "_Captions"], tuple[list[Turn], set[str]]]


@dataclass(frozen=True)
class _Captions:
    """What asks for the caption of a record."""

    record: Record
    prompts: Sequence[str]

    def turns(self, caption: object) -> list[Turn]:
        if not isinstance(caption, str):
            raise RejectError("bad_content", f"the caption is {shown(caption)}, no text")
        if not self.prompts:
            raise RejectError(
                "bad_record",
                "the record is a caption; give --caption-prompt with what a user would ask for it",
            )
        digest = hashlib.blake2b(self.record.id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        prompt = self.prompts[int.from_bytes(digest, "big") % len(self.prompts)]
        return [Turn("user", prompt), Turn("assistant", caption)]


# --- the shapes -------------------------------------------------------------------------------------------


def _read_list(payload: dict[str, object], key: str, captions: _Captions) -> tuple[list[Turn], set[str]]:
    return _joined([_turn(value) for value in _objects(payload[key])]), set()


def _turn(value: dict[str, object]) -> Turn:
    """A turn with the keys of either convention, or a mixture of both."""
    speaker, content = _either(value, "role", "from"), _either(value, "content", "value")
    rest = {key: inner for key, inner in value.items() if key not in ("role", "from", "content", "value")}
    if isinstance(speaker, str) and speaker.lower() in CALLERS:
        calls = written_calls(content, f"the content of a {speaker} turn")
        return _turn_of("assistant", "", {**rest, "tool_calls": calls}, is_call=True)
    return _turn_of(_role(speaker), content, rest)


def _exchange(question: object, answer: object, rest: dict[str, object]) -> list[Turn]:
    """A question and its answer that share an object; ``rest``: what else stands in it."""
    own = {key: rest[key] for key in (*_SWITCHES, *REASONING_KEYS, *_CALLS) if key in rest}
    others = {key: value for key, value in rest.items() if key not in own}
    return [_turn_of("user", question, others), _turn_of("assistant", answer, own)]


def _turn_of(role: Role, content: object, value: dict[str, object], *, is_call: bool = False) -> Turn:
    """A turn of what stands in its object beside speaker and content."""
    more = _more(role, value)
    used = {*_SWITCHES, *more}
    used |= {"function_call"} if "tool_calls" in more else set()
    rest = {key: inner for key, inner in value.items() if key not in used}
    for key in (*REASONING_KEYS, *_CALLS):
        if not is_empty(rest.get(key)):
            raise RejectError("unread_content", f"the key {key!r} is an assistant's, not a {role}'s")
    for key in _MORE_OF_A_TURN:
        if not is_empty(rest.get(key)):
            raise RejectError(
                "unread_content", f"the key {key!r} of a turn is not rendered, so it would be lost"
            )
    return Turn(role, content, rest, _switch(value, role), more, is_call)


def _more(role: Role, value: dict[str, object]) -> dict[str, object]:
    """The keys that ``apply_chat_template`` takes beside role and content."""
    if role in TOOL_ROLES:
        return {key: value[key] for key in _TOOLS_OWN if not is_empty(value.get(key))}
    if role != "assistant":
        return {}
    more = {key: value[key] for key in REASONING_KEYS if not is_empty(value.get(key))}
    for key, text in more.items():
        if not isinstance(text, str):
            raise RejectError("bad_content", f"{key!r} of a turn is {shown(text)}, no text")
    if len(set(more.values())) > 1:
        raise RejectError("bad_record", f"a turn has {' and '.join(more)}, and they differ")
    calls = {key: value[key] for key in _CALLS if not is_empty(value.get(key))}
    if len(calls) > 1:
        raise RejectError("bad_record", "a turn has tool_calls and function_call; leave one of them")
    if "tool_calls" in calls:
        more["tool_calls"] = read_calls(calls["tool_calls"], "the key 'tool_calls' of a turn")
    elif calls:
        more["tool_calls"] = written_calls(calls["function_call"], "the key 'function_call' of a turn")
    return more


def _joined(turns: list[Turn]) -> list[Turn]:
    """Calls that are written as turns of their own become those of the assistant's turn before them."""
    joined: list[Turn] = []
    for turn in turns:
        before = joined[-1] if joined else None
        if before is None or not turn.is_call or before.role != "assistant":
            joined.append(turn)
            continue
        if before.switch != turn.switch:
            raise RejectError(
                "unread_content", "a turn's switches differ from those of the call that goes with it"
            )
        calls = [*before.more.get("tool_calls", ()), *turn.more["tool_calls"]]
        more = {**turn.more, **before.more, "tool_calls": calls}
        joined[-1] = Turn("assistant", before.content, {**turn.rest, **before.rest}, turn.switch, more)
    return joined


def _either(value: dict[str, object], first: str, second: str) -> object:
    given = [value[key] for key in (first, second) if value.get(key) is not None]
    if len(given) == 2 and given[0] != given[1]:
        raise RejectError("bad_record", f"a turn has both {first!r} and {second!r}, and they differ")
    return given[0] if given else None


def _switch(value: dict[str, object], role: Role) -> bool | None:
    """Whether the turn's switches let it be learned; RejectError for others than 0, 1 and booleans."""
    switches = {key: value[key] for key in _SWITCHES if value.get(key) is not None}
    for key, switch in switches.items():
        if not (isinstance(switch, bool) or (key == "weight" and switch in (0, 1))):
            raise RejectError(
                "unread_content",
                f"{key!r} of a turn is {shown(switch)}; 0 and 1 (weight), true and false are obeyed",
            )
    given = {bool(switch) for switch in switches.values()}
    if len(given) > 1:
        raise RejectError("unread_content", f"the switches {switches} of a turn contradict each other")
    if role != "assistant" and True in given and "weight" not in switches:
        raise RejectError(
            "unread_content", f"{switches} would have a {role} turn learned, which is never done"
        )
    return given.pop() if given else None


def _read_texts(payload: dict[str, object], key: str, captions: _Captions) -> tuple[list[Turn], set[str]]:
    turns = []
    for pair in _objects(payload[key]):
        rest = {name: value for name, value in pair.items() if name not in ("user", "assistant")}
        turns += _exchange(pair.get("user"), pair.get("assistant"), rest)
    return turns, set()


def _read_alpaca(payload: dict[str, object], key: str, captions: _Captions) -> tuple[list[Turn], set[str]]:
    turns = []
    history = payload.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 for pair in history
    ):
        raise RejectError("bad_record", f"history is {shown(history)}, no list of [question, answer]")
    for question, answer in history:
        turns += [Turn("user", question), Turn("assistant", answer)]
    asked = payload[key]
    if not is_empty(payload.get("input")):
        if not isinstance(payload["input"], str) or not isinstance(asked, str):
            raise RejectError(
                "bad_content", f"instruction and input are {shown([asked, payload['input']])}, no texts"
            )
        asked = f"{asked}\n{payload['input']}" if asked else payload["input"]
    return [*turns, Turn("user", asked), Turn("assistant", payload.get("output"))], {
        "input",
        "output",
        "history",
    }


def _read_question(payload: dict[str, object], key: str, captions: _Captions) -> tuple[list[Turn], set[str]]:
    answer = "answer" if payload.get("answer") is not None else "chosen"
    read = {answer, "rejected"} if answer == "chosen" else {answer}
    return [Turn("user", payload[key]), Turn("assistant", payload.get(answer))], read


def _read_text(payload: dict[str, Any], key: str, captions: _Captions) -> tuple[list[Turn], set[str]]:
    """RLHF-V and Muffin keep the dialogue as JSON text, in three ways; other texts are captions."""
    try:
        dialogue = orjson.loads(payload[key])
    except (orjson.JSONDecodeError, TypeError) as error:
        if captions.prompts or any(not is_empty(payload.get(name)) for name in ("image", "images")):
            return captions.turns(payload[key]), set()
        raise RejectError("bad_record", f"text is no JSON: {error}") from error
    if isinstance(dialogue, dict):
        if "question" not in dialogue:
            return [], set()
        (asked, answer), read = _read_question(dialogue, "question", captions)
        rest = {name: value for name, value in dialogue.items() if name not in {"question", *read}}
        return _exchange(asked.content, answer.content, rest), set()
    if isinstance(dialogue, list) and len(dialogue) >= 3 and isinstance(dialogue[0], str):
        return [
            Turn("user", dialogue[0]),
            Turn("assistant", dialogue[1]),
        ], set()  # question, chosen, rejected
    return _joined([_turn(value) for value in _objects(dialogue)]), set()


def _read_caption(payload: dict[str, object], key: str, captions: _Captions) -> tuple[list[Turn], set[str]]:
    return captions.turns(payload[key]), set()


def _objects(value: object) -> list[dict[str, object]]:
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise RejectError("bad_record", f"the turns are no list of objects but {shown(value)}")
    return value


_READERS: dict[str, Reader] = {
    **dict.fromkeys(_LISTS, _read_list),
    "texts": _read_texts,
    "instruction": _read_alpaca,
    "question": _read_question,
    "text": _read_text,
    "caption": _read_caption,
}


def _role(speaker: object) -> Role:
    role = SPEAKERS.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        known = ", ".join((*SPEAKERS, *CALLERS))
        raise RejectError("bad_role", f"the speaker {shown(speaker)} is none of {known}")
    return role


def texts_of(turns: Sequence[Turn]) -> Iterator[str]:
    """Every text of the turns: whole contents and text parts."""
    for turn in turns:
        if isinstance(turn.content, str):
            yield turn.content
        elif isinstance(turn.content, list):
            for part in turn.content:
                if isinstance(part, dict) and isinstance(part.get("text"), str):
                    yield part["text"]
