"""Where a reply begins and ends: what follows the generation prompt is what is supervised, up to a token that is
known to end the turn; and which added tokens a reply may write.
"""

# ruff: noqa: E501
import numpy as np
import pytest
from throwaway import TEMPLATES, byte_level_tokenizer, conversation, sentencepiece_tokenizer
from tokenizers import AddedToken

from omnidata.render import Renderer
from omnidata.schema import IGNORE_INDEX, Conversation, RejectError

REPLIES = (
    "Two cats.",
    "42",
    "图",
    "😀",
    "  spaced  out ",
    "a\n\nb",
    "-",
    "</s>",
    "[/INST] x",
    "<|im_end|> y",
)
VICUNA = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ ' ASSISTANT: ' + m.content + '</s>' }}{% else %}{{ m.content + ' ' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)


def check_memorised(renderer, reply):
    """A model that has memorised the sample, asked greedily, gives back the reply id by id and stops."""
    whole = conversation("How many?", reply)
    rendered = renderer.render(whole)
    prompt = renderer.render_prompt(Conversation("x", whole.messages[:1]))
    assert rendered.input_ids[: len(prompt)].tolist() == prompt.tolist()
    generated = []
    for token in rendered.input_ids[len(prompt) :].tolist():  # what it has memorised
        generated.append(token)
        if token in renderer.end_of_turn:
            break
    learned = rendered.labels[rendered.labels != IGNORE_INDEX]
    assert generated == learned.tolist()
    assert (rendered.labels[len(prompt) : len(prompt) + len(learned)] == learned).all()


@pytest.mark.parametrize("reply", REPLIES)
@pytest.mark.parametrize("tokenizer", [byte_level_tokenizer, sentencepiece_tokenizer])
@pytest.mark.parametrize(
    "name", [*(name for name in TEMPLATES if name != "thinking"), "vicuna"]
)  # it has no prompt
def test_what_follows_the_prompt_is_what_is_learned(tokenizer, name, reply):
    if tokenizer is byte_level_tokenizer and name in ("vicuna", "llama3"):
        # No </s>; and GPT-2's pattern, which is not Llama 3's, parts the prompt's last "\n\n" only before a word.
        pytest.skip("not a tokenizer that comes with this template")
    tokenizer = tokenizer("chatml" if name == "vicuna" else name)
    if name == "vicuna":
        tokenizer.chat_template = VICUNA
    renderer = Renderer(tokenizer, max_length=None)
    assert len(renderer.end_of_turn) == 1
    try:
        check_memorised(renderer, reply)
    except RejectError as error:
        assert error.reason == "mask_unproven" and reply != reply.strip(), error


def test_the_end_of_a_turn_is_the_template_s_and_not_the_tokenizer_s():
    tokenizer = byte_level_tokenizer("chatml")
    [end] = Renderer(tokenizer).end_of_turn
    assert tokenizer.convert_ids_to_tokens(end) == "<|im_end|>" and end != tokenizer.eos_token_id


def with_tokens(template, *tokens):
    tokenizer = byte_level_tokenizer("chatml")
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in tokens])
    tokenizer.chat_template = template
    return tokenizer


TOOLS = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>' + m.content + '</tool_response><|im_end|>\n' }}"
    "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' + m.content + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)  # fmt: skip
ADDED = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>", "<table>",
         "<|mine|>", "<image_pad>", "[CALC]", "<turn>")  # fmt: skip


def test_what_the_assistant_writes_is_content_and_what_builds_turns_is_not():
    turns = "{% for m in messages %}{{ '<turn>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
    content = Renderer(with_tokens(TOOLS, *ADDED)).content_tokens
    expected = ["<tool_call>", "</tool_call>", "<think>", "</think>", "<table>", "<turn>"]
    assert [token for token in content if token in ADDED] == expected
    assert "<turn>" not in Renderer(with_tokens(turns, *ADDED)).content_tokens


def test_content_tokens_are_spelled_as_apply_chat_template_does_and_others_stay_text():
    tokenizer = with_tokens(TOOLS, *ADDED)
    renderer = Renderer(tokenizer)
    reply = 'Look: <tool_call>{"a": 1}</tool_call> <table>'
    rendered = renderer.render(conversation("Which?", reply))
    messages = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": reply}]
    assert rendered.input_ids.tolist() == tokenizer.apply_chat_template(messages, return_dict=False)
    learned = rendered.labels[rendered.labels != IGNORE_INDEX]
    assert np.isin(tokenizer.convert_tokens_to_ids(["<tool_call>", "</tool_call>", "<table>"]), learned).all()
    typed = conversation("Which?", "It is <tool_response> or <|im_end|>, <|mine|>.")
    ids = renderer.render(typed).input_ids.tolist()
    assert not set(tokenizer.convert_tokens_to_ids(["<tool_response>", "<|mine|>"])) & set(ids)
    assert renderer.spelled(typed) == ["<tool_response>", "<|im_end|>", "<|mine|>"]


PARTS = (
    "{% for m in messages %}{{ m.role | upper + ': ' }}{% for p in m.content if p.type == 'image' %}{{ '<image>\n' }}"
    "{% endfor %}{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)


@pytest.mark.parametrize("system", [None, "Be short."])
def test_templates_that_want_lists_of_parts_get_them(system):
    tokenizer = with_tokens(PARTS)
    turns = conversation("Hi there", "Hello", "And?", "No.", system=system)
    messages = [{"role": m.role, "content": [{"type": "text", "text": m.text}]} for m in turns.messages]
    rendered = Renderer(tokenizer).render(turns)
    assert rendered.input_ids.tolist() == tokenizer.apply_chat_template(messages, return_dict=False)
    assert (
        tokenizer.decode(rendered.labels[rendered.labels != IGNORE_INDEX]) == "Hello<|im_end|>No.<|im_end|>"
    )
