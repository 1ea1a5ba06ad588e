"""Tools, calls, reasoning and tools' turns in the spellings of other projects, as templates take them."""

import json

import pytest

from omnidata.builder.settings import BuildSettings
from omnidata.conversation import Reading, to_conversation
from omnidata.schema import Record, RejectError

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"name": "weather", "arguments": {"city": "Oslo"}}
WRAPPED = {"type": "function", "function": CALL}
ANY = Reading(turn_order="template")


def read(reading=ANY, **payload):
    """Role, text and what else the template is given, of each turn; and the tools."""
    talk = to_conversation(Record("a", "1", "1", payload), reading)
    return [(m.role, m.text, m.more) for m in talk.messages], list(talk.tools)


def test_openai_and_transformers_write_the_same_and_nothing_is_changed():
    call = {"id": "c1", **WRAPPED, "index": 0}
    turns = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "Ask."},
        {"role": "tool", "content": "sun", "tool_call_id": "c1", "name": "weather"},
        {"role": "assistant", "content": "Sunny."},
    ]
    found, tools = read(messages=turns, tools=[TOOL, {"name": "bare"}])
    assert tools == [TOOL, {"name": "bare"}]
    assert found[1] == (
        "assistant",
        "",
        {"reasoning_content": "Ask.", "tool_calls": [call], "content": None},
    )
    assert found[2] == ("tool", "sun", {"tool_call_id": "c1", "name": "weather"}) and not found[3][2]


def test_openai_once_wrote_functions():
    turns = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "function_call": CALL},
        {"role": "function", "content": "sun", "name": "weather"},
        {"role": "assistant", "content": "Sunny."},
    ]
    found, tools = read(messages=turns, functions=[TOOL["function"]])
    assert tools == [TOOL] and found[1][2] == {"tool_calls": [WRAPPED]}
    assert found[2] == ("function", "sun", {"name": "weather"})


@pytest.mark.parametrize("several", [False, True])
def test_llama_factory_writes_calls_as_turns(several):
    value = json.dumps([CALL, CALL] if several else CALL)
    turns = [("human", "Weather?"), ("function_call", value), ("observation", "sun"), ("gpt", "Sunny.")]
    found, tools = read(
        conversations=[{"from": who, "value": text} for who, text in turns],
        tools=json.dumps([TOOL["function"], TOOL]),
        system="Be brief.",
    )
    assert [role for role, _, _ in found] == ["system", "user", "assistant", "tool", "assistant"]
    assert tools == [TOOL, TOOL] and found[2][2] == {"tool_calls": [WRAPPED] * (1 + several)}


def test_ms_swift_writes_parallel_calls_as_turns_which_are_one_of_the_assistant():
    call, other = json.dumps(CALL), json.dumps({"name": "now", "arguments": "{}"})
    turns = [("user", "?"), ("assistant", "Let me see."), ("tool_call", call), ("tool_call", other)]
    turns += [("tool_response", "sun"), ("tool_response", "12:00"), ("assistant", "Noon.")]
    found, _ = read(messages=[{"role": role, "content": text} for role, text in turns])
    assert [role for role, _, _ in found] == ["user", "assistant", "tool", "tool", "assistant"]
    assert found[1][1] == "Let me see." and [c["function"]["name"] for c in found[1][2]["tool_calls"]] == [
        "weather",
        "now",
    ]


def test_a_call_that_is_switched_off_is_a_turn_that_is_switched_off():
    turns = [
        {"role": "user", "content": "?"},
        {"role": "tool_call", "content": json.dumps(CALL), "loss": False},
    ]
    turns += [{"role": "tool", "content": "sun"}, {"role": "assistant", "content": "Sunny."}]
    talk = to_conversation(Record("a", "1", "1", {"messages": turns}), ANY)
    assert [m.supervised for m in talk.messages if m.role == "assistant"] == [False, True]
    turns.insert(1, {"role": "assistant", "content": "Wait."})
    with pytest.raises(RejectError, match="differ"):
        read(messages=turns)


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        ({"tools": "no JSON"}, "bad_content"),
        ({"tools": {"name": "f"}}, "bad_record"),
        ({"tools": [TOOL], "functions": [CALL]}, "bad_record"),
        ({"tools": [{"name": json.loads("[" * 99 + "1" + "]" * 99)}]}, "bad_record"),
        ({"messages": [{"role": "tool_call", "content": "weather()"}]}, "bad_content"),
        ({"messages": [{"role": "user", "content": "?", "reasoning_content": "x"}]}, "unread_content"),
        ({"messages": [{"role": "system", "content": "S", "tools": [TOOL]}]}, "unread_content"),
        ({"messages": [{"from": "tool", "value": {"a": 1}}, {"from": "gpt", "value": "A"}]}, "bad_content"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_a_reject(payload, reason):
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "A"}]
    with pytest.raises(RejectError) as error:
        read(**{"messages": turns, **payload})
    assert error.value.reason == reason


def test_the_order_of_turns_is_the_templates_business_unless_alternate_is_asked_for():
    turns = [("user", "a"), ("user", "b"), ("assistant", "c"), ("system", "d"), ("assistant", "e")]
    messages = [{"role": role, "content": text} for role, text in turns]
    assert len(read(messages=messages)[0]) == 5
    with pytest.raises(RejectError, match="--turn-order template"):
        read(Reading(), messages=messages)
    parallel = [
        ("user", "a"),
        ("tool_call", json.dumps(CALL)),
        ("tool", "x"),
        ("tool", "y"),
        ("assistant", "z"),
    ]
    assert len(read(Reading(), messages=[{"role": role, "content": text} for role, text in parallel])[0]) == 5


def test_only_omnilmms_format_has_the_strict_order_by_default():
    for given, expected in [
        (None, ["alternate", "template"]),
        ("template", ["template"] * 2),
        ("alternate", ["alternate"] * 2),
    ]:
        settings = BuildSettings(source=("a",), tokenizer="b", turn_order=given)
        assert [
            settings.reading(is_omnilmm=is_omnilmm).turn_order for is_omnilmm in (True, False)
        ] == expected
