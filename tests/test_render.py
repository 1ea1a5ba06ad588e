"""Rendering: the original's ids and labels on every case where it is right, the right ones where it is not;
for any template, exactly the assistants' words and the tokens that close them; typed control tokens are text.
"""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rendering import check_invariants, supervised
from throwaway import (
    MARKERS,
    TEMPLATES,
    byte_level_tokenizer,
    conversation,
    sentencepiece_tokenizer,
)

from omnidata.render import DEFAULT_SYSTEM, Renderer
from omnidata.schema import (
    CONTENT_TOKENS,
    IGNORE_INDEX,
    IMAGE_TOKENS,
    Conversation,
    Message,
    RejectError,
    TextPart,
    UserError,
)
from omnidata.text.chat_template import ChatTemplate

FAST = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", params=[name for name in TEMPLATES if name != "zephyr"])
def any_renderer(request):
    """A template's name, and its renderer on a byte-level tokenizer."""
    return request.param, Renderer(byte_level_tokenizer(request.param), num_query=3, max_length=None)


# --- any template -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [byte_level_tokenizer, sentencepiece_tokenizer])
@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "zephyr"])
def test_ids_are_those_of_apply_chat_template(tokenizer, name):
    tokenizer = tokenizer(name)
    renderer = Renderer(tokenizer)
    system = None if name == "mistral" else "Be terse."
    for texts in (["Hi", "Hello"], ["One?", "two cats.", " Two \n", "three\n\nfour "], ["", "x"], ["?", ""]):
        turns = conversation(*texts, system=system)
        messages = [{"role": message.role, "content": message.text} for message in turns.messages]
        expected = tokenizer.apply_chat_template(messages, return_dict=False)
        assert renderer.render(turns).input_ids.tolist() == expected
    assert not renderer.is_omnilmm


def test_generation_marks_give_the_mask_that_transformers_gives():
    tokenizer = byte_level_tokenizer("generation")
    turns = conversation("Hi", "Hello", "And?", "That is it.", system="Short.")
    messages = [{"role": message.role, "content": message.text} for message in turns.messages]
    theirs = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ours = Renderer(tokenizer).render(turns)
    assert ours.input_ids.tolist() == theirs["input_ids"]
    assert (ours.labels != IGNORE_INDEX).astype(int).tolist() == theirs["assistant_masks"]


def test_only_marked_turns_are_supervised():
    tokenizer = byte_level_tokenizer("generation")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.last %}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    )
    renderer = Renderer(tokenizer)
    assert supervised(renderer, renderer.render(conversation("a", "b", "c", "d"))) == "d<|im_end|>"


def test_a_blank_that_the_model_has_to_write_is_part_of_the_reply():
    """Mistral's prompt ends with [/INST]; the template then prints a blank, which joins the first word."""
    tokenizer = sentencepiece_tokenizer("mistral")
    rendered = Renderer(tokenizer).render(conversation("Hi", "Hello there"))
    tokens = tokenizer.convert_ids_to_tokens(rendered.input_ids[rendered.labels != IGNORE_INDEX])
    assert tokens == ["▁Hello", "▁there", "</s>"]


def test_a_reply_that_joins_the_header_is_refused_and_not_guessed():
    renderer = Renderer(byte_level_tokenizer("chatml"))
    merged = renderer.tokenizer.encode("\n\n", add_special_tokens=False)
    assert len(merged) == 1  # the trained vocabulary has it
    with pytest.raises(RejectError) as error:
        renderer.render(conversation("Hi", "\n\nHello"))
    assert error.value.reason == "mask_unproven" and "joins the start of a reply" in error.value.detail


@pytest.mark.parametrize(
    ("template", "detail"),
    [
        ("{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}", "changes a content"),
        (
            "{% for m in messages %}{{ m.content }}{{ m.content }}<|im_end|>{% endfor %}",
            "does not print message 1",
        ),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "no control token right after"),
        (
            "{% for m in messages %}{{ m.content.replace('t', 'b') }}<|im_end|>{% endfor %}",
            "changes a content",
        ),
        ("{% for m in messages[1:] %}{{ m.content }}<|im_end|>{% endfor %}", "does not print message 1"),
        ("{% for m in messages | reverse %}{{ m.content }}<|im_end|>{% endfor %}", "does not print message"),
    ],
)
def test_a_mask_that_cannot_be_proven_is_a_reject(template, detail):
    tokenizer = byte_level_tokenizer("chatml")
    tokenizer.chat_template = template
    with pytest.raises(RejectError, match=detail) as error:
        Renderer(tokenizer).render(conversation("a cat", "a mat"))
    assert error.value.reason == "mask_unproven"


def test_a_template_that_refuses_is_a_reject_with_its_words():
    renderer = Renderer(byte_level_tokenizer("mistral"))
    with pytest.raises(RejectError, match="turns must alternate") as error:
        renderer.render(conversation("Welcome", "Hi", "Hello", first="assistant"))
    assert error.value.reason == "template_refused"


def test_thoughts_that_the_template_drops_are_refused():
    renderer = Renderer(byte_level_tokenizer("thinking"))
    assert supervised(renderer, renderer.render(conversation("a", "b"))) == "b<|im_end|>"
    with pytest.raises(RejectError, match="changes a content"):
        renderer.render(conversation("a", "<think>hm</think>b"))


# --- properties -------------------------------------------------------------------------------------------

CONTROL = (
    "</s>",
    "<s>",
    "<unk>",
    "<|assistant|>\n",
    " \n<|user|>\n",
    *IMAGE_TOKENS,
    *MARKERS,
    "<|end_of_text|>",
    "\ufdd0",
)
typed = st.lists(st.one_of(st.text(max_size=12), st.sampled_from(CONTROL)), max_size=6).map("".join)
replies = typed.filter(lambda text: "<image>" not in text)
with_images = st.lists(st.one_of(replies, st.just("<image>")), max_size=5).map("".join)


@settings(FAST, max_examples=150)
@given(texts=st.lists(with_images, min_size=2, max_size=6), system=st.none() | replies)
def test_exactly_the_replies_are_supervised_in_zephyr(renderer, texts, system):
    turns = conversation(*texts, system=system)
    rendered = renderer.render(turns)
    check_invariants(renderer, rendered, len(turns.images))
    tokenizer, ids = renderer.tokenizer, rendered.input_ids
    said = [message.text for message in turns.messages if message.role == "assistant"]
    if not any("<image>" in text for text in texts):  # after a special token the tokenizer writes a blank
        assert supervised(renderer, rendered) == "".join(text + "</s>" for text in said)
    num_turns = len(turns.messages) + (system is None)
    assert (ids == tokenizer.eos_token_id).sum() == num_turns
    assert (rendered.labels == tokenizer.eos_token_id).sum() == len(said)
    assert (ids == tokenizer.bos_token_id).sum() == 1


CLOSING = {"llama3": "<|eot_id|>", "mistral": "<|end_of_text|>"}  # else <|im_end|>


@settings(FAST, max_examples=40)
@given(texts=st.lists(with_images, min_size=2, max_size=4))
def test_exactly_the_replies_are_supervised_in_any_template(any_renderer, texts):
    name, renderer = any_renderer
    turns = conversation(*texts)
    try:
        rendered = renderer.render(turns)
    except RejectError as error:  # the only grounds: a reply that starts with blanks, or holds thoughts
        assert error.reason == "mask_unproven"
        assert any(text[:1].isspace() or "</think>" in text for text in texts)
        return
    check_invariants(renderer, rendered, len(turns.images))
    written, said = supervised(renderer, rendered), texts[1::2]
    if name == "llama3":
        said = [text.strip() for text in said]  # as its template does
    if name == "mistral":  # its blank after [/INST] may be part of the first token
        written, said = written.replace(" ", ""), [text.replace(" ", "") for text in said]
    closing = CLOSING.get(name, "<|im_end|>")
    assert written == "".join(text.replace("<image>", "") + closing for text in said)


@settings(FAST, max_examples=60)
@given(
    texts=st.lists(st.text(max_size=30), min_size=2, max_size=6),
    name=st.sampled_from(["zephyr", "chatml", "llama3"]),
)
def test_the_short_cut_prints_what_the_template_prints(texts, name):
    """Opaque templates are not printed for every record; here they are, and nothing differs."""
    template = ChatTemplate(TEMPLATES[name], {"eos_token": "</s>", "bos_token": "<s>"})
    assert template.is_opaque
    roles = tuple(("user", "assistant")[i % 2] for i in range(len(texts)))
    shape = template.shape(roles)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    assert shape.text(shape.contents(texts)) == template.render(messages)


@settings(FAST, max_examples=60)
@given(texts=st.lists(st.text(max_size=40), min_size=2, max_size=4))
def test_ids_equal_those_of_the_whole_rendering(renderer, texts):
    """Where nobody typed a control token, guarding changes nothing."""
    if any(token in text for text in texts for token in (*CONTROL, *CONTENT_TOKENS)):
        return
    messages = [{"role": "system", "content": DEFAULT_SYSTEM}]
    messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    whole = renderer.tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("\n")
    assert renderer.render(conversation(*[t.replace("<image>", "") for t in texts])).input_ids.tolist() == (
        renderer.tokenizer(whole.replace("<image>", "")).input_ids
    )


# --- settings and mistakes --------------------------------------------------------------------------------


def test_content_tokens_are_special_in_content_and_others_can_be_added(mistral):
    turns = conversation("Find <ref>it</ref>", "<box>1 2</box> <unk>")
    ids = Renderer(mistral).render(turns).input_ids.tolist()
    counts = {
        token: ids.count(mistral.convert_tokens_to_ids(token)) for token in (*CONTENT_TOKENS[:4], "<unk>")
    }
    assert counts == {"<box>": 1, "</box>": 1, "<ref>": 1, "</ref>": 1, "<unk>": 0}
    ids = Renderer(mistral, content_tokens=[*CONTENT_TOKENS, "<unk>"]).render(turns).input_ids.tolist()
    assert ids.count(mistral.unk_token_id) == 1
    ids = Renderer(mistral, content_tokens=()).render(turns).input_ids.tolist()
    assert ids.count(mistral.convert_tokens_to_ids("<box>")) == 0
    with pytest.raises(UserError, match="can't be content tokens"):
        Renderer(mistral, content_tokens=["<im_patch>"])


def test_role_markers_that_are_not_special_are_inert_too():
    tokenizer = byte_level_tokenizer("chatml")
    tokenizer.add_tokens(["<|tool|>", "wordword"], special_tokens=False)
    ids = Renderer(tokenizer).render(conversation("<|tool|> wordword", "x")).input_ids
    assert tokenizer.convert_tokens_to_ids("<|tool|>") not in ids
    assert tokenizer.convert_tokens_to_ids("wordword") in ids  # vocabulary, not markup


def test_the_default_system_turn_is_a_setting(mistral):
    turns = conversation("Hi", "Hello")
    none = mistral.decode(Renderer(mistral, default_system=None).render(turns).input_ids)
    own = mistral.decode(Renderer(mistral, default_system="Be kind.").render(turns).input_ids)
    assert "<|system|>" not in none and "<|system|>\nBe kind.</s>" in own


def test_a_batch_gives_what_one_by_one_gives_and_keeps_its_order(renderer):
    talks = [conversation(f"<image>\n{i}?", f"{i}.") for i in range(5)]
    talks.insert(2, Conversation("x", (Message("user", (TextPart("no reply"),)),)))
    talks.insert(4, conversation("lone \ud800 surrogate", "x"))
    batch = renderer.render_batch(talks)
    assert [getattr(result, "reason", "ok") for result in batch] == [
        "ok", "ok", "no_supervision", "ok", "bad_content", "ok", "ok",
    ]  # fmt: skip
    for talk, result in zip(talks, batch, strict=True):
        if not isinstance(result, RejectError):
            alone = renderer.render(talk)
            assert json.dumps([alone.input_ids.tolist(), alone.labels.tolist()]) == json.dumps(
                [result.input_ids.tolist(), result.labels.tolist()]
            )


def test_images_need_the_image_tokens():
    tokenizer = byte_level_tokenizer("chatml")
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["added_tokens"] = [
        token for token in backend["added_tokens"] if token["content"] not in IMAGE_TOKENS
    ]
    from tokenizers import Tokenizer
    from transformers import TokenizersBackend

    bare = TokenizersBackend(tokenizer_object=Tokenizer.from_str(json.dumps(backend)), eos_token="<|im_end|>")
    with pytest.raises(UserError, match="no chat template"):
        Renderer(bare)
    bare.chat_template = TEMPLATES["chatml"]
    assert Renderer(bare).render(conversation("a", "b")).num_images == 0
    with pytest.raises(UserError, match="prepare-tokenizer"):
        Renderer(bare).render(conversation("<image>a", "b"))


def test_a_template_with_a_mistake_is_one_clear_error():
    tokenizer = byte_level_tokenizer("chatml")
    tokenizer.chat_template = "{% for m in messages %}"
    with pytest.raises(UserError, match="the chat template, line 1"):
        Renderer(tokenizer)
