"""Tokenizers: the real sentencepiece model becomes the original's; what is saved stays what it was."""

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from throwaway import CHATML, byte_level_tokenizer, golden_cases, golden_tokenizer_folder, mistral_model

from omnidata.schema import CONTENT_TOKENS, IMAGE_TOKENS, UserError
from omnidata.text.chat_template import ZEPHYR
from omnidata.text.tokenizer import (
    PROBE,
    fingerprint,
    load_tokenizer,
    prepare_tokenizer,
    special_token_ids,
    template_fingerprint,
)


@pytest.fixture(scope="module")
def golden():
    return load_tokenizer(golden_tokenizer_folder())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare_tokenizer(mistral_model(), tmp_path_factory.mktemp("prepared"))


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


@pytest.mark.parametrize(("choice", "expected"), [(None, ZEPHYR), ("keep", CHATML), ("{{ 1 }}", "{{ 1 }}")])
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
    ):
        with pytest.raises(UserError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_the_probe_has_what_tokenizers_differ_in():
    for piece in ("   ", "\n\n", "\t", "\r", "é", "ﬁ", "图", "👩", "0123"):
        assert piece in PROBE
