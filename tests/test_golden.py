"""The renderer against the ids and labels of the original implementation."""

import numpy as np
import pytest
from rendering import check_invariants, supervised
from throwaway import (
    conversation,
    golden_cases,
)

from omnidata.conversation import Reading, to_conversation
from omnidata.render import DEFAULT_SYSTEM, Renderer
from omnidata.schema import (
    IGNORE_INDEX,
    IMAGE_TOKENS,
    Conversation,
    Message,
    Record,
    RejectError,
    TextPart,
)

# --- golden cases -----------------------------------------------------------------------------------------

TRUNCATED = ("trunc", "long_zh_img_trunc")
TYPED_SPECIALS = (
    "inj_user_after_eos_literal",
    "inj_asst_full_turns",
    "literal_special_user",
)  # real ids there


def golden_conversation(case):
    """The case as a record with as many images as placeholders."""
    turns = [dict(turn) for turn in case["conversation"]]
    expands = {None: [], "chat": turns[:1], "train": turns}[case["image_expansion"]]
    count = sum(turn["content"].count("<image>") for turn in expands)
    if case["image_expansion"] == "chat" and count == 0:
        count = 1  # the original puts it in front
    payload = {"messages": turns, "images": [f"{i}.jpg" for i in range(count)]}
    return to_conversation(
        Record("cases.json", case["id"], case["id"], payload), Reading(allow_empty_replies=True)
    )


def golden(*names, where=lambda case: True):
    chosen = [case for case in golden_cases() if (not names or case["id"] in names) and where(case)]
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case["id"])


def is_plain(case):
    return (
        "input_ids" in case
        and not case["id"].startswith(TRUNCATED)
        and case["id"] not in TYPED_SPECIALS
        and any(turn["role"] == "assistant" for turn in case["conversation"])
        and not case["generation"]
    )


@golden(where=is_plain)
def test_ids_and_labels_are_the_golden_ones(mistral, case):
    rendered = Renderer(mistral, case["num_query"]).render(golden_conversation(case))
    expected = np.array(case["ideal_labels"])
    if case["id"] == "img_in_assistant_train":  # there the block counts as supervised; here it never is
        expected[np.isin(expected, mistral.convert_tokens_to_ids(list(IMAGE_TOKENS)))] = IGNORE_INDEX
    assert rendered.input_ids.tolist() == case["input_ids"]
    assert rendered.labels.tolist() == expected.tolist()


@golden(where=lambda case: case["generation"])
def test_the_prompt_is_the_golden_one(mistral, case):
    messages = tuple(Message(turn["role"], (TextPart(turn["content"]),)) for turn in case["conversation"])
    prompt = Renderer(mistral).render_prompt(Conversation("x", messages))
    assert prompt.dtype == np.int32 and prompt.tolist() == case["input_ids"]


@golden(*TYPED_SPECIALS)
def test_typed_control_tokens_are_text(mistral, case):
    renderer = Renderer(mistral, case["num_query"])
    rendered = renderer.render(golden_conversation(case))
    replies = [turn["content"] for turn in case["conversation"] if turn["role"] == "assistant"]
    assert supervised(renderer, rendered) == "".join(reply + "</s>" for reply in replies)
    assert (rendered.input_ids == mistral.eos_token_id).sum() == len(
        case["conversation"]
    ) + 1  # and the system's
    assert rendered.input_ids.tolist().count(mistral.bos_token_id) == 1
    check_invariants(renderer, rendered, 0)


@golden("system_first")
def test_a_given_system_turn_replaces_the_default(mistral, case):
    renderer = Renderer(mistral)
    text = mistral.decode(renderer.render(golden_conversation(case)).input_ids)
    assert "You are terse." in text and DEFAULT_SYSTEM not in text


@golden("maxlen_unset", "content_parts")
def test_what_the_original_could_not_do_is_rendered(mistral, case):
    rendered = Renderer(mistral, max_length=None).render(golden_conversation(case))
    assert supervised(Renderer(mistral), rendered) == "Hello</s>"


@golden("two_users", "empty_conv", "content_none", "only_user_nogen")
def test_what_cannot_be_learnt_from_is_a_reject(case):
    reasons = {
        "two_users": "role_order", "empty_conv": "empty_conversation",
        "content_none": "bad_content", "only_user_nogen": "no_assistant",
    }  # fmt: skip
    with pytest.raises(RejectError) as error:
        golden_conversation(case)
    assert error.value.reason == reasons[case["id"]]


# --- length -----------------------------------------------------------------------------------------------


@golden(where=lambda case: case["id"].startswith(TRUNCATED))
def test_too_long_is_cut_after_an_assistant_turn_or_refused(mistral, case):
    renderer = Renderer(mistral, case["num_query"], case["model_max_length"])
    turns = golden_conversation(case)
    if len(turns.messages) == 2:
        with pytest.raises(RejectError) as error:
            renderer.render(turns)
        assert error.value.reason == "too_long"
        return
    rendered = renderer.render(turns)
    whole = Renderer(mistral, case["num_query"], None).render(turns)
    length = len(rendered.input_ids)
    assert rendered.num_truncated_messages == 2 and length <= case["model_max_length"]
    assert rendered.input_ids.tolist() == whole.input_ids[:length].tolist()
    assert rendered.labels.tolist() == whole.labels[:length].tolist()
    assert supervised(renderer, rendered) == "Hello</s>"


def test_images_of_cut_turns_are_gone_and_no_block_is_cut(mistral):
    renderer = Renderer(mistral, 16, None)
    turns = conversation("<image>\none", "1", "<image>\ntwo", "2", "<image>\nthree", "3")
    whole, seen = len(renderer.render(turns).input_ids), set()
    for renderer.max_length in range(60, whole + 1):
        try:
            rendered = renderer.render(turns)
        except RejectError as error:
            assert error.reason == "too_long"
            continue
        assert len(rendered.input_ids) <= renderer.max_length
        check_invariants(renderer, rendered, 3 - rendered.num_truncated_messages // 2)
        seen.add(rendered.num_truncated_messages)
    assert seen == {0, 2, 4}
