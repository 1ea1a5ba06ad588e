"""Which turns are learned: switches are obeyed, and what is not understood is a reject."""

# ruff: noqa: E501
import json

import pytest
from test_keys import DEFAULT, QUESTION, REPLY, chat, converse, refused

from omnidata.conversation import Reading
from omnidata.schema import RejectError


@pytest.mark.parametrize(
    "keys",
    [
        {"label": False}, {"label": "False"}, {"train": False}, {"weight": 0}, {"rejected": "5"}, {"chosen": [REPLY]},
        {"rejected_response": "5"}, {"history": [["a", "b"]]}, {"documents": [{"title": "x"}]}, {"loss_weight": 0.0},
        {"desirable": False}, {"is_correct": False}, {"loss_mask": [0, 1]}, {"meta": {"rejected": "5"}},
        {"Weight": 0}, {"isCorrect": False}, {"reasoning_content": "x"}, {"tool_calls": [{"name": "f"}]},
    ],
)  # fmt: skip
def test_a_key_that_says_not_all_is_to_be_learned_is_a_reject(keys):
    error = refused(**keys)
    assert error.reason == "unread_content" and repr(next(iter(keys))) in error.detail


def supervised(*turns, reading=DEFAULT):
    messages = [m for turn in turns for m in (QUESTION, {**REPLY, **turn})]
    return [m.supervised for m in converse(reading, messages=messages).messages if m.role == "assistant"]


def test_switches_of_turns_are_obeyed():
    assert supervised({"weight": 0}, {"weight": 1}) == [False, True]
    assert supervised({"loss": False}, {"loss": True}) == supervised({"train": False}, {}) == [False, True]
    assert supervised({}, {}, {}, reading=Reading(train_on="last")) == [False, False, True]


@pytest.mark.parametrize(
    "turn",
    [
        {"weight": 0.5},
        {"loss": "no"},
        {"weight": 1, "train": False},
        {"loss_weight": 0.0},
        {"train": 2},
        {"mask": True},
        {"trainable": False},
        {"supervise": False},
        {"Weight": 0},
        {"isMasked": True},
        {"trainable": "false"},
        {"learnable": 0.0},
        {"content": [{"type": "text", "text": "A", "train": False}]},
    ],
)
def test_switches_that_are_not_understood_are_rejects(turn):
    with pytest.raises(RejectError) as error:
        supervised(turn, {})
    assert error.value.reason == "unread_content"
    assert next(iter(turn)) in error.value.detail


@pytest.mark.parametrize("is_text", [False, True])
def test_what_stands_beside_a_question_and_its_answer_is_the_answers(is_text):
    def read(**more):
        if is_text:
            return converse(messages=None, text=json.dumps({"question": "Q", "chosen": "A", **more})).messages
        return converse(messages=None, texts=[{"user": "Q", "assistant": "A", **more}]).messages

    assert read(reasoning_content="hm")[1].more == {"reasoning_content": "hm"}
    for key, value in (("weight", 0), ("loss", False), ("train", False)):
        with pytest.raises(RejectError, match="switched off"):
            read(**{key: value})
    with pytest.raises(RejectError) as error:
        read(masked=True)
    assert error.value.reason == "unread_content"


def test_all_turns_switched_off_is_a_reject():
    with pytest.raises(RejectError, match="switched off"):
        supervised({"weight": 0})


@pytest.mark.parametrize(
    "turn",
    [
        {"tool_calls": "x"},
        {"tool_calls": [{"function": {"arguments": {"a": 1}}}]},
        {"tool_calls": [{"function": {"name": "f", "arguments": [1]}}]},
        {"function_call": "x"},
        {"tool_calls": [{"name": "f"}], "function_call": {"name": "f"}},
        {"thinking": ["x"]},
        {"thinking": "x", "reasoning_content": "y"},
        {"refusal": "x"},
        {"thoughts": "x"},
    ],
)
def test_more_of_a_turn_that_is_not_understood_is_a_reject(turn):
    with pytest.raises(RejectError, match=next(iter(turn))):
        supervised(turn)


def test_marks_that_an_unread_key_fills_in_are_a_reject():
    with pytest.raises(RejectError, match="objects"):
        chat("Where is <ref-object>?", image="1.jpg", objects={"ref": ["cat"], "bbox": [[1, 2, 3, 4]]})


def test_empty_replies():
    for text in ("", "  \n"):
        with pytest.raises(RejectError) as error:
            supervised({"content": text})
        assert error.value.reason == "empty_reply"
    assert supervised({"content": ""}, reading=Reading(allow_empty_replies=True)) == [True]
