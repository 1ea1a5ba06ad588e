"""KEY.json: what was understood comes back exactly, has one spelling, and nothing else is taken for it."""

import contextlib
import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_corpus import write_corpus

from omnidata import Dataset, cli
from omnidata.builder.settings import RunOptions
from omnidata.conversation import Reading, to_conversation
from omnidata.dialogue import DialogueError, dialogue_json, read_dialogue
from omnidata.schema import MANIFEST, Conversation, ImageRef, Record, RejectError, Sample
from omnidata.shards import dialogue_hash, write_shard
from omnidata.verify.run import verify

FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {"z": {}, "a": {}}}}
RECORD = {
    "id": "é7",
    "images": ["a/1.jpg", "data:image/png;base64,AAAA", b"jpeg"],
    "tools": [{"type": "function", "function": FUNCTION}],
    "lang": "en",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image>What </s> is\n<image>"},
        {"role": "assistant", "content": "No idea.", "weight": 0, "reasoning_content": "Hm."},
        {"role": "user", "content": "<image>猫?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"z": 1, "a": 0.1}}}],
        },
        {"role": "tool", "name": "f", "content": "42"},
        {"role": "assistant", "content": "A cat."},
    ],
}


def understood(payload=RECORD, **reading):
    options = Reading(turn_order="template", keep_column=("lang",), **reading)
    return to_conversation(Record("x.json", "item 1", payload["id"], payload), options)


def test_a_conversation_comes_back_as_it_was_understood():
    before = understood()
    after = read_dialogue(dialogue_json(before, [(640, 480)]))
    assert after.sizes == ((640, 480), None, None)
    assert after.conversation.images == (ImageRef("a/1.jpg"), ImageRef(), ImageRef()), "no bytes of pictures"
    for name in ("id", "messages", "columns", "tools"):
        assert getattr(after.conversation, name) == getattr(before, name), name
    assert list(after.conversation.tools[0]["function"]["parameters"]["properties"]) == ["z", "a"]


def test_it_is_what_chat_templates_take_and_has_one_spelling():
    raw = dialogue_json(understood())
    content = json.loads(raw)
    again = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    assert raw == again and list(content) == sorted(content)
    assert all(list(message) == sorted(message) for message in content["messages"])
    dialogue = read_dialogue(raw)
    assert dialogue_json(dialogue.conversation, dialogue.sizes) == raw


def test_switches_are_the_record_s_whatever_was_trained_on():
    last = understood(train_on="last")
    assert [message.supervised for message in last.messages].count(True) == 1
    assert dialogue_json(last) == dialogue_json(understood())
    messages = read_dialogue(dialogue_json(last)).conversation.messages
    assert [m.supervised for m in messages if m.role == "assistant"] == [False, True, True]


@pytest.mark.parametrize("value", [2**70, float("nan"), b"bytes"], ids=["large", "nan", "bytes"])
def test_what_json_cannot_say_is_a_reject_and_not_another_number(value):
    conversation = Conversation("1", understood().messages, understood().images, tools=({"x": value},))
    with pytest.raises(RejectError, match="--no-conversation"):
        dialogue_json(conversation)


CHANGES = {
    "no JSON": lambda c: "{",
    "a list": lambda c: [],
    "another key": lambda c: c | {"video": 1},
    "no messages": lambda c: c | {"messages": []},
    "a role": lambda c: c["messages"][0].update(role="root"),
    "a content": lambda c: c["messages"][0].update(content="text"),
    "a part": lambda c: c["messages"][0].update(content=[{"type": "video"}]),
    "a switch": lambda c: c["messages"][2].update(train=True),
    "one image more": lambda c: c["images"].append({}),
    "one image less": lambda c: c["images"].pop(),
    "a size": lambda c: c["images"][0].update(size=[0, 10**30]),
    "a path": lambda c: c["images"][0].update(path=7),
    "a tool": lambda c: c.update(tools=["f"]),
    "columns": lambda c: c.update(columns=[]),
    "an id": lambda c: c.update(id=None),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_none_is_refused(name):
    content = json.loads(dialogue_json(understood()))
    changed = CHANGES[name](content)
    content = content if changed is None else changed
    with pytest.raises(DialogueError):
        read_dialogue(content.encode() if isinstance(content, str) else json.dumps(content).encode())


KEYS = st.sampled_from(["id", "messages", "images", "role", "content", "type", "text", "train", "size"])
LEAVES = st.none() | st.booleans() | st.integers() | st.text()


@given(st.recursive(LEAVES, lambda values: st.lists(values) | st.dictionaries(KEYS, values)))
def test_any_json_is_a_dialogue_or_refused(value):
    with contextlib.suppress(DialogueError):
        read_dialogue(json.dumps(value).encode())


# --- in a dataset -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The same corpus with and without KEY.json."""
    folder = tmp_path_factory.mktemp("dialogue")
    corpus = write_corpus(folder / "c", num_llava=30, num_chat=10, bad=False)
    options = RunOptions(executor="inline", quiet=True)
    corpus.build(folder / "with", options=options)
    corpus.build(folder / "without", options=options, conversation=False)
    return folder


def test_a_build_keeps_them_and_says_what_they_cost(built, capsys):
    dataset, without = Dataset(built / "with"), Dataset(built / "without")
    total = 0
    for i, row in enumerate(dataset.index.to_pylist()):
        sample = dataset[i]
        dialogue = read_dialogue(sample.dialogue)
        total += len(sample.dialogue)
        assert dialogue.conversation.id == row["id"]
        assert (row["dialogue_bytes"], row["dialogue_hash"]) == (
            len(sample.dialogue),
            dialogue_hash(sample.dialogue),
        )
        assert without[i].dialogue == b"" and without.row(i)["dialogue_bytes"] == 0
        assert row["content_hash"] == without.row(i)["content_hash"], "training's content alone"
    assert dataset.manifest.num_dialogue_bytes == total > 0
    assert "num_dialogue_bytes" not in json.loads((built / "without" / MANIFEST).read_text())
    assert cli.run(["inspect", str(built / "with"), "--limit", "0"]) == 0
    assert "of them conversations" in capsys.readouterr().out


def test_verify_renders_them_again(built, tmp_path):
    assert verify(built / "with", deep=True, num_workers=1).ok
    assert verify(built / "without", deep=True, num_workers=1).ok

    data = shutil.copytree(built / "with", tmp_path / "data")
    shard = data / "shards" / "train-00000.tar"
    raw = shard.read_bytes()
    at = raw.index(b'"type":"text"}],"role":"assistant"')
    letter = at - 3  # the last letter of a reply
    shard.write_bytes(raw[:letter] + (b"x" if raw[letter : letter + 1] != b"x" else b"y") + raw[letter + 1 :])
    codes = [finding.code for finding in verify(data, deep=True, num_workers=1).findings]
    assert sorted(set(codes)) == ["dialogue", "index", "sha256"]
    shard.write_bytes(raw.replace(b'"role":"assistant"', b'"role":"assisbant"', 1))
    [finding] = [f for f in verify(data, deep=True, num_workers=1).findings if f.code == "dialogue"]
    assert "no role of" in finding.what


def test_a_key_json_of_a_stranger_is_no_image(tmp_path):
    """A second one, or one among the images, is damage."""
    from io import BytesIO

    from omnidata.shards import CorruptSampleError, read_sample, tar_header

    file = BytesIO()
    ids = np.arange(3, dtype=np.int32)
    [(_, nbytes)] = write_shard(file, [Sample("k", ids, ids, (b"x",), ("jpg",), b"{}")])
    raw = file.getvalue()[:nbytes]
    assert read_sample(raw).dialogue == b"{}" and read_sample(raw).images == (b"x",)
    with pytest.raises(CorruptSampleError, match="unexpected member"):
        read_sample(raw + tar_header("k.json", 2) + b"{}" + bytes(510))
