"""Whatever is fed to the parsers of other people's bytes, they refuse it in their own words or take it."""

import contextlib
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pictures import encode, photo
from throwaway import byte_level_tokenizer

from omnidata.conversation import Reading, to_conversation
from omnidata.images.header import read_header
from omnidata.loader.sample_bytes import parse
from omnidata.manifest import manifest_from_json
from omnidata.plan.places import Place
from omnidata.render import Renderer
from omnidata.schema import IGNORE_INDEX, MANIFEST, Record, RejectError, Sample, UserError
from omnidata.shards import CorruptSampleError, read_npy, read_sample, sample_members, tar_header

# How fast examples are made depends on what else the machine does.
SLOW = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
QUICK = settings(max_examples=150, **SLOW)
FLOATS = st.floats(allow_subnormal=False)  # training, tested in this process, has switched those off
KEYS = st.sampled_from(
    (
        *("id", "image", "images", "messages", "conversations", "texts", "role", "content", "from", "value"),
        *(
            "type",
            "text",
            "image_url",
            "url",
            "system",
            "question",
            "answer",
            "instruction",
            "output",
            "bytes",
        ),
        *("input", "history", "weight", "loss", "train", "label", "chosen", "index", "path", "tools", "x"),
    )
)
TEXTS = st.sampled_from(
    ("user", "assistant", "system", "human", "gpt", "<image>", "<image>\na", "a.jpg", "", "text")
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | FLOATS | TEXTS | st.text(max_size=8) | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=24,
)
TURNS = st.lists(
    st.fixed_dictionaries(
        {"role": TEXTS, "content": TEXTS | st.lists(st.dictionaries(KEYS, VALUES, max_size=3), max_size=3)},
        optional={"weight": VALUES, "images": VALUES, "x": VALUES},
    ),
    max_size=4,
)


@QUICK
@given(
    st.dictionaries(KEYS, VALUES, max_size=6)
    | st.fixed_dictionaries({"messages": TURNS}, optional={"images": VALUES})
)
def test_any_record_is_understood_or_refused(payload):
    try:
        conversation = to_conversation(Record("x", "line 1", "1", payload), Reading())
    except RejectError as error:
        assert error.detail
        return
    images = sum(hasattr(part, "image") for message in conversation.messages for part in message.parts)
    assert images == len(conversation.images)


@QUICK
@given(st.text(max_size=60), st.text(st.characters(codec=None), max_size=60))
def test_any_text_is_rendered_or_refused_and_only_replies_are_learned(question, reply):
    renderer = test_any_text_is_rendered_or_refused_and_only_replies_are_learned.renderer
    payload = {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]}
    try:
        rendered = renderer.render(to_conversation(Record("x", "line 1", "1", payload)))
    except RejectError:
        return
    learned = rendered.labels[rendered.labels != IGNORE_INDEX]
    [end] = renderer.end_of_turn
    assert learned[-1] == end and (learned == end).sum() == 1


test_any_text_is_rendered_or_refused_and_only_replies_are_learned.renderer = Renderer(
    byte_level_tokenizer("chatml")
)


def _raw():
    sample = Sample("k", np.arange(40, dtype=np.int32), np.full(40, -100, np.int32), (b"x" * 700,), ("jpg",))
    return b"".join(
        tar_header(name, len(data)) + bytes(data) + bytes(-len(data) % 512)
        for name, data in sample_members(sample)
    )


RAW = _raw()


@settings(max_examples=400, **SLOW)
@given(st.data())
def test_any_damage_of_a_sample_is_one_kind_of_error(data):
    raw = bytearray(RAW)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = bytes(raw[: data.draw(st.integers(0, len(raw)))]) if data.draw(st.booleans()) else bytes(raw)
    for read in (lambda: parse(raw, Place("a.tar", 0, len(RAW), "k", "")), lambda: read_sample(raw)):
        try:
            sample = read()
        except CorruptSampleError:
            continue
        assert len(sample.input_ids) == len(sample.labels) == 40 and len(sample.images) == 1


@QUICK
@given(st.binary(max_size=400))
def test_any_bytes_are_an_array_or_refused(raw):
    with pytest.raises(CorruptSampleError):
        read_npy(raw)


PICTURES = [encode(photo(16, 12), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")]


@settings(max_examples=300, **SLOW)
@given(st.sampled_from(PICTURES), st.data())
def test_any_header_is_read_or_refused(picture, data):
    raw = bytearray(picture)
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, min(len(raw), 200) - 1))] = data.draw(st.integers(0, 255))
    try:
        header = read_header(bytes(raw[: data.draw(st.integers(1, len(raw)))]))
    except RejectError as error:
        assert error.reason.startswith("image_")
        return
    assert header.width > 0 and header.height > 0


@QUICK
@given(data=st.data())
def test_any_value_in_a_manifest_is_taken_or_refused(tiny_dataset, data):
    manifest = json.loads((tiny_dataset / MANIFEST).read_bytes())
    name = data.draw(st.sampled_from(sorted(manifest)))
    value = st.recursive(
        st.none() | st.booleans() | st.integers() | FLOATS | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=6,
    )
    manifest[name] = data.draw(value)
    with contextlib.suppress(UserError):
        manifest_from_json(json.dumps(manifest).encode(), where="m")
