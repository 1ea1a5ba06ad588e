"""Tokenizers: the real sentencepiece model becomes the original's; what is saved stays what it was."""

import json
import shlex
import shutil
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from throwaway import CHATML, byte_level_tokenizer, golden_cases, golden_tokenizer_folder, mistral_model

from omnidata.cli import run
from omnidata.schema import CONTENT_TOKENS, IMAGE_TOKENS, UserError
from omnidata.text.chat_template import ZEPHYR
from omnidata.text.preparation import prepare_tokenizer
from omnidata.text.tokenizer import (
    PROBE,
    fingerprint,
    load_tokenizer,
    special_token_ids,
    template_fingerprint,
)


@pytest.fixture(scope="module")
def golden():
    return load_tokenizer(golden_tokenizer_folder())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare_tokenizer(mistral_model(), tmp_path_factory.mktemp("prepared"), chat_template="zephyr")


def test_the_real_model_becomes_the_original_tokenizer(golden, prepared):
    ours, theirs = (json.loads(t.backend_tokenizer.to_str()) for t in (prepared, golden))
    assert ours == theirs  # vocabulary, order of merges, normalizer, added tokens and their ids
    assert fingerprint(prepared) == fingerprint(golden)
    assert special_token_ids(prepared) == special_token_ids(golden)


def test_prepared_ids_are_the_golden_ids(prepared):
    checked = 0
    for case in golden_cases():
        if "input_ids" in case and case["model_max_length"] == 2048:
            assert prepared(case["rendered"]).input_ids == case["input_ids"], case["id"]
            checked += 1
    assert checked > 30


@settings(deadline=None, max_examples=200)
@given(text=st.text() | st.text(alphabet=" \nab", max_size=60))
def test_ids_are_those_of_sentencepiece(prepared, text):
    sentencepiece = pytest.importorskip("sentencepiece")
    global _MODEL
    _MODEL = globals().get("_MODEL") or sentencepiece.SentencePieceProcessor(model_file=str(mistral_model()))
    if any(token in text for token in special_token_ids(prepared)) or "\0" in text:
        return  # control tokens are text to sentencepiece; it ends a text at NUL
    expected = _MODEL.encode(text) if text else []
    assert prepared.backend_tokenizer.encode(text, add_special_tokens=False).ids == expected


def test_the_special_tokens_are_added_once_and_in_the_original_order(prepared, tmp_path):
    ids = special_token_ids(prepared)
    assert [ids[token] for token in IMAGE_TOKENS + CONTENT_TOKENS] == list(range(32000, 32009))
    assert (ids["unk"], ids["bos"], ids["eos"]) == (0, 1, 2) and len(prepared) == 32009
    again = prepare_tokenizer(prepared.name_or_path, tmp_path / "again")
    assert fingerprint(again) == fingerprint(prepared)


def test_a_class_that_would_rebuild_the_tokenizer_is_not_used(golden, tmp_path):
    """transformers' own Llama class drops the blank after special tokens; the folder's file decides here."""
    shutil.copytree(golden_tokenizer_folder(), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["legacy"]
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(config | {"tokenizer_class": "LlamaTokenizer"})
    )
    loaded = load_tokenizer(tmp_path)
    assert loaded("Hi</s>\nx").input_ids == [1, 15359, 2, 28705, 13, 28744]
    assert fingerprint(loaded) == fingerprint(golden)
    loaded.save_pretrained(tmp_path / "saved")
    from transformers import AutoTokenizer

    assert fingerprint(AutoTokenizer.from_pretrained(tmp_path / "saved")) == fingerprint(golden)
    assert template_fingerprint(load_tokenizer(tmp_path / "saved")) == template_fingerprint(golden)


def test_the_fingerprint_sees_a_change_of_behaviour(golden, tmp_path):
    prints = {fingerprint(golden)}
    state = json.loads(golden.backend_tokenizer.to_str())
    changes = {
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "post_processor": None,
    }
    for name, value in changes.items():
        folder = tmp_path / name
        shutil.copytree(golden_tokenizer_folder(), folder)
        (folder / "tokenizer.json").write_text(json.dumps(state | {name: value}))
        prints.add(fingerprint(load_tokenizer(folder)))
    assert len(prints) == 3


@pytest.mark.parametrize(
    ("choice", "expected"), [(None, CHATML), ("keep", CHATML), ("zephyr", ZEPHYR), ("{{ 1 }}", "{{ 1 }}")]
)
def test_the_chat_template_is_chosen(tmp_path, choice, expected):
    byte_level_tokenizer("chatml").save_pretrained(tmp_path / "source")
    prepared = prepare_tokenizer(tmp_path / "source", tmp_path / "out", chat_template=choice)
    assert prepared.chat_template == expected
    assert prepared.pad_token is not None and set(IMAGE_TOKENS) <= set(special_token_ids(prepared))
    (tmp_path / "own.jinja").write_text("{{ 2 }}")
    own = prepare_tokenizer(tmp_path / "out", tmp_path / "own", chat_template=str(tmp_path / "own.jinja"))
    assert own.chat_template == "{{ 2 }}"


def test_mistakes_are_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.model").write_text("no model")
    (tmp_path / "sp").mkdir()
    (tmp_path / "sp" / "tokenizer.model").write_bytes(b"x")
    for call, message in (
        (lambda: load_tokenizer(tmp_path / "missing"), "missing"),
        (lambda: load_tokenizer(tmp_path / "empty"), "no tokenizer.json"),
        (lambda: load_tokenizer(tmp_path / "sp"), "prepare-tokenizer"),
        (lambda: load_tokenizer(mistral_model()), "prepare-tokenizer"),
        (lambda: prepare_tokenizer(tmp_path / "text.model", tmp_path / "out"), "not a sentencepiece model"),
        (
            lambda: prepare_tokenizer(golden_tokenizer_folder(), tmp_path / "o", chat_template="nope"),
            "no such file",
        ),
        (
            lambda: prepare_tokenizer(mistral_model(), tmp_path / "o"),
            "no chat template: name one with --chat-t",
        ),
        (lambda: load_tokenizer(golden_tokenizer_folder() + "/tokenizer.json"), "give its folder"),
        (lambda: load_tokenizer(tmp_path / "a/b/c"), "no such folder or file"),
    ):
        with pytest.raises(UserError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("version", ["240216.model.v2", "240323.model.v3", "241114.model.v7"])
def test_mistrals_later_models_become_their_tokenizers(tmp_path, version):
    """Their control tokens are pieces of the model that sentencepiece itself never finds in a text."""
    source = mistral_model().parent / f"mistral_instruct_tokenizer_{version}"
    prepared = prepare_tokenizer(source, tmp_path / "out", chat_template="zephyr")
    encode = prepared.backend_tokenizer.encode
    assert encode("[INST] Hi [/INST]", add_special_tokens=False).ids[::4] == [3, 4]
    sentencepiece = pytest.importorskip("sentencepiece")
    model = sentencepiece.SentencePieceProcessor(model_file=str(source))
    text = PROBE.replace("[INST]", "").replace("[/INST]", "")
    assert encode(text, add_special_tokens=False).ids == model.encode(text)


def test_tekken_becomes_its_tokenizer(tmp_path):
    common = pytest.importorskip("mistral_common.tokens.tokenizers.tekken")
    file = mistral_model().parent / "tekken_240911.json"
    prepared = prepare_tokenizer(file, tmp_path / "out", chat_template="zephyr")
    expected = common.Tekkenizer.from_file(file).encode(PROBE.replace("[", "("), bos=False, eos=False)
    ids = prepared.backend_tokenizer.encode(PROBE.replace("[", "("), add_special_tokens=False).ids
    assert ids == expected
    assert prepared.eos_token == "</s>" and set(IMAGE_TOKENS) <= set(special_token_ids(prepared))


def test_a_folder_is_converted_from_what_it_holds(tmp_path):
    shutil.copy(mistral_model(), tmp_path / "tokenizer.model")
    with pytest.raises(UserError, match="first run: omnidata prepare-tokenizer"):
        load_tokenizer(tmp_path)
    assert len(prepare_tokenizer(tmp_path, tmp_path / "out", chat_template="zephyr")) == 32009


@pytest.mark.parametrize("name", ["qwen.tiktoken", "ranks"])
def test_tiktoken_ranks_are_refused_with_the_file_that_is_needed(tmp_path, name):
    (tmp_path / name).write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(UserError, match=r"give a folder with the model's tokenizer\.json"):
        prepare_tokenizer(tmp_path / name, tmp_path / "out")


@pytest.mark.parametrize(
    "change",
    [
        {"added_tokens_decoder": {"2": {"content": "</s>", "lstrip": True, "rstrip": True, "special": True}}},
        {"split_special_tokens": True},
    ],
)
def test_the_advice_for_a_configuration_that_disagrees_works(golden, tmp_path, change):
    folder = tmp_path / "has blank"
    shutil.copytree(golden_tokenizer_folder(), folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | change))
    try:
        loaded = load_tokenizer(folder)
    except UserError as error:
        advice = str(error).rpartition("run: omnidata ")[2]
        assert run(shlex.split(advice.replace("DIR", str(tmp_path / "out")))) == 0
        loaded = load_tokenizer(tmp_path / "out")
    assert loaded.chat_template == golden.chat_template and not loaded.split_special_tokens


def test_a_hub_id_without_network_is_one_line_at_once(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # nobody listens there from here on
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    for proxy in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
    with pytest.raises(UserError, match="the Hub cannot be reached and its cache holds none"):
        load_tokenizer("nobody/nothing-of-the-sort")


@pytest.mark.parametrize("out", ["file", "file/below", "\0"])
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, out):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        prepare_tokenizer(golden_tokenizer_folder(), tmp_path / out)


def test_the_probe_has_what_tokenizers_differ_in():
    for piece in ("   ", "\n\n", "\t", "\r", "é", "ﬁ", "图", "👩", "0123"):
        assert piece in PROBE
