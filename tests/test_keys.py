"""Nothing in a record is ignored: media under any key, marks of other projects, verdicts, switches."""

# ruff: noqa: E501

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from omnidata.conversation import Reading, to_conversation
from omnidata.corpus.keys import is_empty
from omnidata.schema import ImagePart, Record, RejectError, TextPart

JPEG = b"\xff\xd8\xff\xe0" + bytes(range(60))
DEFAULT = Reading()
QUESTION = {"role": "user", "content": "Q"}
REPLY = {"role": "assistant", "content": "A."}


def converse(reading=DEFAULT, **payload):
    return to_conversation(
        Record("x.json", "item 0", "7", {"messages": [QUESTION, REPLY]} | payload), reading
    )


def refused(**payload):
    with pytest.raises(RejectError) as error:
        converse(**payload)
    return error.value


def chat(content, **payload):
    return converse(messages=[{"role": "user", "content": content}, REPLY], **payload)


def shown(talk):
    parts = [p for message in talk.messages for p in message.parts]
    return [p.text if isinstance(p, TextPart) else talk.images[p.image].path for p in parts]


# --- media ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_path", "7.jpg"), ("img", "7"), ("imgs", ["7.jpg"]), ("imageFile", "7"), ("image_0", JPEG), ("jpg", JPEG),
        ("photo_url", "https://x/y"), ("screenshot", {"bytes": JPEG, "path": None}), ("videos", ["a.mp4"]),
        ("video_path", "clip"), ("audio", {"array": [0.0], "path": "a.wav"}), ("frames", ["1", "x2"]),
        ("attachment", "report"), ("file", "scans/7.TIFF"), ("mp4", "clip"), ("x_mp3", "song"), ("meta", {"deep": [{"shot": "s.png"}]}),
        ("x", "data:image/png;base64,AA=="), ("y", JPEG), ("z", "/9j/" + "A" * 40), ("pages", ["p1.webp"]),
    ],
)  # fmt: skip
def test_media_under_a_key_that_nobody_reads_is_a_reject_that_names_it(key, value):
    error = refused(**{key: value})
    assert (
        error.reason == "unread_media" and repr(key) in error.detail and f"--image-key {key}" in error.detail
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bbox", [1, 2, 3, 4]), ("image_id", "139"), ("num_images", 3), ("image_size", [4, 5]), ("task", "ocr"),
        ("image_caption", "a cat"), ("lang", "en"), ("source", "ocr.json"), ("has_video", False), ("label", 3),
    ],
)  # fmt: skip
def test_other_keys_are_named_and_change_nothing(key, value):
    talk = converse(**{key: value})
    assert talk.unread_keys == (key,) and talk.messages == converse().messages


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("video_path", "a.mp4"), ("audio_url", "https://x/a.wav"), ("image_2_path", "b.png"), ("mask_path", "m.png"),
        ("depth_file", "d.png"),
    ],
)  # fmt: skip
def test_an_address_is_only_that_of_the_pictures_that_came_as_bytes(key, value):
    assert refused(image=JPEG, **{key: value}).reason == "unread_media"


@pytest.mark.parametrize("key", ["depth", "mask_file", "image_path"])
def test_the_same_name_in_another_folder_is_another_picture(key):
    assert refused(image="images/0.png", **{key: "others/0.png"}).reason == "unread_media"
    assert converse(image="images/0.png", image_path="/data/images/0.png").unread_keys == ("image_path",)


def test_a_file_s_name_may_have_blanks_and_a_sentence_may_end_in_one():
    assert refused(shot="my photo 1.jpg").reason == "unread_media"
    assert converse(note="He said that the scan was kept in the file a.jpg").unread_keys == ("note",)


def test_two_conversations_in_one_record_are_refused_wherever_they_stand():
    other = [QUESTION, {"role": "assistant", "content": "B."}]
    for keys in (
        {"conversation": other},
        {"conversations": [], "conversation": other},
        {"conversations": other},
    ):
        with pytest.raises(RejectError, match="differ"):
            converse(**keys)
    assert converse(conversations=[], conversation=[QUESTION, REPLY]).messages == converse().messages


@pytest.mark.parametrize("nothing", [None, "", [], {}, [None, ""], {"bytes": None}])
def test_a_key_that_holds_nothing_is_nothing(nothing):
    assert converse(image_path=nothing, rejected=nothing, bbox=nothing).unread_keys == ()


def test_a_key_that_repeats_the_record_s_picture_hides_nothing():
    assert converse(image="coco/7.jpg", file_name="7.jpg").unread_keys == ("file_name",)
    assert converse(image=JPEG, url="https://x/7.jpg").unread_keys == ("url",)
    assert refused(image="coco/7.jpg", file_name="8.jpg").reason == "unread_media"


def test_image_key_makes_a_key_one_that_is_read():
    talk = converse(
        Reading(image_key=("image_path", "image_2")), image="0.jpg", image_path="1.jpg", image_2=["2.jpg"]
    )
    assert [image.path for image in talk.images] == ["0.jpg", "1.jpg", "2.jpg"] and talk.unread_keys == ()


def test_a_turn_s_own_pictures_lead_it_or_stand_at_its_marks():
    messages = [
        {**QUESTION, "images": ["1.jpg"]},
        REPLY,
        {"role": "user", "content": "B <image>", "image": "2.jpg"},
        REPLY,
    ]
    assert shown(converse(messages=messages)) == ["1.jpg", "\n", "Q", "A.", "B ", "2.jpg", "A."]
    messages[0]["video"] = "x.mp4"
    assert refused(messages=messages).reason == "unread_media"


def test_parts_name_their_pictures_by_index():
    parts = [{"type": "image", "index": 1}, {"type": "text", "text": "then"}, {"type": "image", "index": 0}]
    assert shown(chat(parts, images=["a", "b"]))[:3] == ["b", "then", "a"]
    assert chat([{"type": "image", "image": {"url": "u.jpg"}}]).images[0].path == "u.jpg"
    for bad in (5, "x", True):
        with pytest.raises(RejectError):
            chat([{"type": "image", "index": bad}], images=["a"])


values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["", "a cat", "x.png", "http://h/v.mp4", "9"]) | st.just(JPEG),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip
names = st.sampled_from(
    [
        "image",
        "images",
        "img",
        "picture_file",
        "video",
        "audio",
        "bbox",
        "note",
        "image_id",
        "meta",
        "chosen",
        "label",
        "x9",
    ]
)


def media_in(value):
    if isinstance(value, dict):
        return sum(map(media_in, value.values()))
    if isinstance(value, list):
        return sum(map(media_in, value))
    return value in ("x.png", "http://h/v.mp4", JPEG)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(names, values, max_size=4), st.dictionaries(names, values, max_size=2))
def test_a_sample_has_all_the_media_of_its_record_or_there_is_no_sample(payload, turn):
    try:
        talk = converse(messages=[QUESTION | turn, REPLY], **payload)
    except RejectError:
        return
    in_turn = media_in([value for key, value in turn.items()])
    in_record = media_in(list(payload.values()))
    if payload.get("image") and payload.get("images"):
        in_record -= media_in(payload["images"])  # the same pictures under both keys
    if turn.get("image") and turn.get("images"):
        in_turn -= media_in(turn["images"])
    known = {image.path for image in talk.images}
    again = sum(media_in(v) for k, v in [*payload.items(), *turn.items()] if k not in ("image", "images"))
    assert len(talk.images) >= in_record + in_turn - (
        again if {"x.png", "http://h/v.mp4"} & known or again else 0
    )
    assert len(talk.images) == sum(isinstance(p, ImagePart) for m in talk.messages for p in m.parts)
    named = {key.removeprefix("messages.") for key in talk.unread_keys}
    left = {
        k for k, v in [*payload.items(), *turn.items()] if not is_empty(v) and k not in ("image", "images")
    }
    assert named == left


# --- marks of other projects ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mark",
    [
        "<|image_1|>", "<image 1>", "<image-1>", "<|image|>", "[IMG]", "<IMG_CONTEXT>", "<|vision_start|><|image_pad|><|vision_end|>",
        "<img><IMG_CONTEXT></img>", "<im_start><image><im_end>", "<start_of_image>", "<ImageHere>", "(<image>./</image>)",
        "<image_placeholder>", "<IMAGE>", "<|imgpad|>", "<image/>", "<img />",
    ],
)  # fmt: skip
def test_a_foreign_mark_is_a_placeholder_if_that_is_certain_and_never_text(mark):
    assert shown(chat(f"See {mark} now", image="1.jpg"))[:3] == ["See ", "1.jpg", " now"]
    for images in ([], ["1.jpg", "2.jpg"]):
        with pytest.raises(RejectError) as error:
            chat(f"See {mark} now", images=images)
        assert error.value.reason == "placeholder_mismatch"
    with pytest.raises(RejectError):
        chat([{"type": "image"}, {"type": "text", "text": f"See {mark}"}], image="1.jpg")


@pytest.mark.parametrize(
    "mark", ["<|image_start|>", "<|endofimage|>", "<|startofimage|> x", "<|vision_bos|>"]
)
def test_a_part_of_a_mark_never_stays_as_text_beside_a_picture(mark):
    with pytest.raises(RejectError) as error:
        chat(f"See {mark} now", image="1.jpg")
    assert error.value.reason == "placeholder_mismatch"
    assert len(chat("<|individual|> <|television|> <|imagine|>", image="1.jpg").images) == 1


@pytest.mark.parametrize("mark", ["<|vid|>", "<|end_video|>", "<|Audio_2|>", "<|begin_of_video|>"])
@pytest.mark.parametrize("images", [[], ["1.jpg"]])
def test_marks_of_other_media_are_a_reject(mark, images):
    with pytest.raises(RejectError) as error:
        chat(f"See {mark} now", images=images)
    assert error.value.reason == "unread_media"


def test_numbers_of_marks_are_obeyed():
    assert shown(chat("<|image_2|> and <|image_1|>", images=["a", "b"]))[:3] == ["b", " and ", "a"]
    for text in ("<|image_1|> <|image_1|>", "<|image_1|> <|image_3|>"):
        with pytest.raises(RejectError):
            chat(text, images=["a", "b"])


def test_a_path_in_the_text_is_its_picture():
    assert shown(chat("Picture 1: <img>a.jpg</img>\nWhat?"))[:3] == ["Picture 1: ", "a.jpg", "\nWhat?"]
    with pytest.raises(RejectError):
        chat("<img>a.jpg</img> <img>b.jpg</img>", images=["a.jpg"])


@pytest.mark.parametrize(
    "mark", ["<video>", "<audio>", "<|video_pad|>", "<|audio_1|>", "<|AUDIO|>", "<speech>"]
)
def test_videos_and_sounds_are_refused_and_html_is_text(mark):
    with pytest.raises(RejectError) as error:
        chat(f"{mark}What?")
    assert error.value.reason == "unread_media"
    assert chat("Explain <video><source></video>").images == ()


def test_names_stand_for_pictures_in_brackets_only():
    assert shown(chat("<photo> or photo?", image={"photo": "1.jpg"}))[:2] == ["1.jpg", " or photo?"]
    assert shown(chat("photo?", image={"photo": "1.jpg"}))[:3] == ["1.jpg", "\n", "photo?"]
    with pytest.raises(RejectError):
        chat("\\<image1\\> What?", image={"image1": "1.jpg"})


# --- shapes -----------------------------------------------------------------------------------------------


def of(reading=DEFAULT, **payload):
    return to_conversation(Record("x.json", "item 0", "7", payload), reading)


def test_alpaca():
    talk = of(instruction="Add", input="2 2", output="4", system="S", history=[["Hi", "Hello"]])
    assert [m.text for m in talk.messages] == ["S", "Hi", "Hello", "Add\n2 2", "4"] and talk.unread_keys == ()


def test_captions_ask_with_a_prompt_that_depends_on_the_id_alone():
    with pytest.raises(RejectError, match="--caption-prompt"):
        of(image="1.jpg", caption="A cat.")
    prompts = Reading(caption_prompt=("Describe.", "What is it?", "Caption?"))
    asked = {to_conversation(Record("x", "1", str(i), {"image": "1.jpg", "caption": "C"}), prompts).messages[0].text
             for i in range(40)}  # fmt: skip
    assert asked == {f"\n{prompt}" for prompt in prompts.caption_prompt} or len(asked) == 3
    assert of(prompts, image="1.jpg", text="A cat.").messages[-1].text == "A cat."


def test_mixed_keys_of_turns_and_a_system_prompt():
    talk = of(
        system_prompt="S", conversations=[{"role": "user", "value": "Q"}, {"from": "gpt", "content": "A"}]
    )
    assert [m.text for m in talk.messages] == ["S", "Q", "A"]
    with pytest.raises(RejectError, match="differ"):
        of(conversations=[{"role": "user", "content": "Q", "value": "other"}, REPLY])
