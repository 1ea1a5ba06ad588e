"""Conversations: what records of every shape become, and each way in which one is refused."""

import base64

import pytest

from omnidata.conversation import to_conversation
from omnidata.schema import ImagePart, ImageRef, Record, RejectError, TextPart

JPEG = b"\xff\xd8\xff\xe0" + bytes(range(60))
REPLY = {"role": "assistant", "content": "A."}


def converse(**payload):
    return to_conversation(Record("x.json", "item 0", "7", payload))


def chat(content, **payload):
    return converse(messages=[{"role": "user", "content": content}, REPLY], **payload)


def reason(**payload):
    with pytest.raises(RejectError) as error:
        converse(**payload)
    assert error.value.detail
    return error.value.reason


def llava(*pairs):
    return [{"from": speaker, "value": text} for speaker, text in pairs]


def shown(talk):
    """Each message as text, with images as their paths."""
    texts = []
    for message in talk.messages:
        parts = [
            p.text if isinstance(p, TextPart) else f"<{talk.images[p.image].path}>" for p in message.parts
        ]
        texts.append(f"{message.role}: " + "".join(parts))
    return texts


# --- roles ------------------------------------------------------------------------------------------------


def test_llava_names_become_roles():
    talk = converse(conversations=llava(("system", "S"), ("human", "Q"), ("gpt", "A")))
    assert shown(talk) == ["system: S", "user: Q", "assistant: A"] and talk.id == "7"


def test_either_spelling_of_the_keys_is_read():
    assert shown(converse(conversations=[{"role": "user", "content": "Q"}, REPLY])) == [
        "user: Q",
        "assistant: A.",
    ]
    assert shown(converse(messages=llava(("human", "Q"), ("gpt", "A")))) == ["user: Q", "assistant: A"]


def test_a_system_text_beside_the_turns_comes_first():
    assert shown(converse(system="S", conversations=llava(("human", "Q"), ("gpt", "A"))))[0] == "system: S"


def test_the_cauldron_s_texts_are_questions_and_answers():
    texts = [
        {"user": "Q1", "assistant": "A1", "source": "s"},
        {"user": "Q2", "assistant": "A2", "source": "s"},
    ]
    assert shown(converse(texts=texts)) == ["user: Q1", "assistant: A1", "user: Q2", "assistant: A2"]


def test_the_assistant_may_open_and_the_user_may_close():
    turns = llava(("gpt", "Hi"), ("human", "Q"), ("gpt", "A"), ("human", "Bye"))
    assert [message.role for message in converse(conversations=turns).messages] == ["assistant", "user"] * 2


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        ({"text": None}, "bad_record"),
        ({"caption": "x"}, "bad_record"),
        ({"conversations": "x"}, "bad_record"),
        ({"conversations": ["x"]}, "bad_record"),
        ({"text": "no json"}, "bad_record"),
        ({"conversations": []}, "empty_conversation"),
        ({"messages": [], "texts": []}, "empty_conversation"),
        ({"conversations": llava(("narrator", "x"), ("gpt", "A"))}, "bad_role"),
        ({"conversations": llava((None, "x"), ("gpt", "A"))}, "bad_role"),
        ({"conversations": llava(("human", "a"), ("human", "b"), ("gpt", "A"))}, "role_order"),
        ({"conversations": llava(("human", "a"), ("gpt", "A"), ("gpt", "B"))}, "role_order"),
        ({"conversations": llava(("human", "a"), ("system", "s"), ("gpt", "A"))}, "role_order"),
        (
            {"system": "S", "conversations": llava(("system", "s"), ("human", "a"), ("gpt", "A"))},
            "role_order",
        ),
        ({"conversations": llava(("human", "a"))}, "no_assistant"),
        ({"conversations": llava(("human", None), ("gpt", "A"))}, "bad_content"),
        ({"conversations": llava(("human", 7), ("gpt", "A"))}, "bad_content"),
        ({"question": "Q"}, "bad_content"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}, REPLY]}, "bad_content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}, REPLY]}, "bad_content"),
        ({"messages": [{"role": "user", "content": ["x"]}, REPLY]}, "bad_content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, REPLY]}, "bad_content"),
        ({"image": 7, "conversations": llava(("human", "a"), ("gpt", "A"))}, "bad_record"),
        ({"image": "a", "images": ["b"], "conversations": llava(("human", "a"), ("gpt", "A"))}, "bad_record"),
    ],
)
def test_a_record_that_cannot_be_used_has_its_reason(payload, expected):
    assert reason(**payload) == expected


# --- images -----------------------------------------------------------------------------------------------


def test_placeholders_take_the_images_in_order_in_any_turn():
    turns = llava(
        ("human", "<image>\nA <image> B"), ("gpt", "see <image>"), ("human", "<image>"), ("gpt", "ok")
    )
    talk = converse(image=["1", "2", "3", "4"], conversations=turns)
    assert shown(talk) == ["user: <1>\nA <2> B", "assistant: see <3>", "user: <4>", "assistant: ok"]
    assert talk.messages[0].parts[0] == ImagePart(0)


def test_without_placeholders_the_images_lead_the_first_user_turn():
    assert shown(chat("Q", image="1"))[0] == "user: <1>\nQ"
    assert shown(chat("Q", images=["1", "2"]))[0] == "user: <1>\n<2>\nQ"
    opened = converse(image="1", conversations=llava(("gpt", "Hi"), ("human", "Q"), ("gpt", "A")))
    assert shown(opened)[:2] == ["assistant: Hi", "user: <1>\nQ"]
    caption = converse(image="1", conversations=llava(("gpt", "A cat.")))
    assert shown(caption) == ["assistant: <1>A cat."]


def test_minicpm_names_its_images():
    talk = chat("<image_01> or <image_00>?", image={"<image_00>": "a", "<image_01>": "b"})
    assert shown(talk)[0] == "user: <b> or <a>?"
    assert shown(chat("<image_01> or <image_00>?", images=["a", "b"]))[0] == "user: <b> or <a>?"
    assert shown(chat("Q", image={"<image_00>": "a"}))[0] == "user: <a>\nQ"


@pytest.mark.parametrize(
    ("content", "images"),
    [
        ("<image>", []),
        ("<image><image>", ["1"]),
        ("<image>", ["1", "2"]),
        ("<image_00><image_00>", ["1", "2"]),
        ("<image_05>", ["1"]),
        ([{"type": "image"}, {"type": "image"}], ["1"]),
        ([{"type": "image"}], ["1", "2"]),
        ([{"type": "image_url", "image_url": {"url": "x"}}], ["1"]),
    ],
)
def test_placeholders_and_images_must_match(content, images):
    assert (
        reason(messages=[{"role": "user", "content": content}, REPLY], images=images)
        == "placeholder_mismatch"
    )


def test_parts_say_where_their_images_are():
    parts = [
        {"type": "text", "text": "A"},
        {"type": "image"},
        {"type": "image_url", "image_url": {"url": "https://x/y.jpg"}},
        {"type": "image_url", "image_url": "data:image/png;base64,AA=="},
        {"type": "image", "image": "own.jpg"},
        {"type": "text", "text": " what does <image> mean?"},
    ]
    talk = chat(parts, images=["1"])
    assert [image.path for image in talk.images] == [
        "1",
        "https://x/y.jpg",
        "data:image/png;base64,AA==",
        "own.jpg",
    ]
    assert talk.messages[0].text == "A what does <image> mean?"  # text is text where parts have the images


def test_text_parts_alone_may_use_placeholders():
    assert shown(chat([{"type": "text", "text": "<image> Q"}], images=["1"]))[0] == "user: <1> Q"


def test_bytes_base64_and_structs_are_images():
    encoded = base64.b64encode(JPEG).decode()
    for value in (JPEG, encoded, {"bytes": JPEG, "path": "a.jpg"}, [{"bytes": JPEG, "path": None}]):
        assert chat("Q", image=value).images == (ImageRef(data=JPEG),)
    assert chat("Q", image={"bytes": None, "path": "a.jpg"}).images == (ImageRef(path="a.jpg"),)
    assert chat("Q", image="/9j/photos/holiday.jpg").images == (ImageRef(path="/9j/photos/holiday.jpg"),)
    for nothing in (None, "", [], {"bytes": None, "path": None}):
        assert chat("Q", image=nothing).images == ()
