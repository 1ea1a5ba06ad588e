"""Words: exactly what the tokenizers library gives for the whole text, or None where that cannot be told."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from same_encoding import check_same
from throwaway import byte_level_tokenizer, sentencepiece_tokenizer
from tokenizers import Tokenizer

from omnidata.text import words as words_module
from omnidata.text.words import Words

PARTS = st.sampled_from(
    [
        "the",
        " cat",
        "a",
        " ",
        "  ",
        "   ",
        "▁",
        "\n",
        "\t",
        "日本",
        "𝒳",
        "é",
        "e\u0301",
        "</s>",
        "<im_patch>",
        "es",
        "<0x0A>",
        "\u200d",
        "👩‍👩‍👧",
        "\0",
        "\ufdd0",
        "<",
    ]
)
TEXTS = st.lists(PARTS, max_size=16).map("".join) | st.text(st.characters(exclude_categories=["Cs"]))


def metaspace(scheme):
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}


def state_of(scheme):
    """A real tokenizer as Zephyr's and Llama 2's (prepend) are written, or as newer ones are."""
    state = json.loads(sentencepiece_tokenizer().backend_tokenizer.to_str())
    # Where two start alike the longer one counts. The library gives it the next free id.
    longer = {"id": 40_000, "content": "<im_patch>es"}
    state["added_tokens"].append(state["added_tokens"][-1] | longer)
    return state if scheme == "prepend" else state | {"normalizer": None, "pre_tokenizer": metaspace(scheme)}


@pytest.fixture(scope="module", params=["prepend", "first", "always", "never"])
def state(request):
    return state_of(request.param)


@pytest.fixture(scope="module")
def whole(state):
    """The same tokenizer, encoding whole texts."""
    return Tokenizer.from_str(json.dumps(state))


@pytest.fixture(scope="module")
def words(state, whole):
    return Words.of(state, whole)


@settings(deadline=None, max_examples=1000)
@given(st.lists(TEXTS, max_size=4))
def test_a_text_is_encoded_as_by_the_library(words, whole, texts):
    theirs = whole.encode_batch(texts, add_special_tokens=False)
    for ours, encoding, text in zip(words.encode_batch(texts), theirs, texts, strict=True):
        check_same(ours, encoding, text)


def test_words_may_be_forgotten_at_any_time(state, whole, monkeypatch):
    words = Words.of(state, whole)
    monkeypatch.setattr(words_module, "_HELD", 0)
    for text in ["the cat </s> sat", "on a mat", "the 日本 mat  ", "the cat </s> sat"]:
        [ours] = words.encode_batch([text])
        check_same(ours, whole.encode(text, add_special_tokens=False), text)
        assert ("▁cat" in words._ids) == ("cat" in text), "forgets before each batch"


def test_a_word_is_encoded_once(words, monkeypatch):
    asked = []
    encode = words._model.encode_batch_fast

    class Model:
        def encode_batch_fast(self, texts, **options):
            asked.extend(texts)
            return encode(texts, **options)

    monkeypatch.setattr(words, "_model", Model())
    words.encode_batch(["so unheard unseen", "so unseen unheard unseen"])
    assert [re.findall(word, "".join(asked)) for word in ("unheard", "unseen")] == [["unheard"], ["unseen"]]
    asked.clear()
    words.encode_batch(["so unseen unheard unseen"] * 2)
    assert not asked


def with_model(**changes):
    return lambda state: state["model"].update(changes)


def add_piece(state):
    state["model"]["vocab"]["of▁the"] = len(state["model"]["vocab"])


def add_locations(state):
    flags = {key: value for key, value in state["added_tokens"][0].items() if key not in ("id", "content")}
    state["added_tokens"] += [{"id": 40_000 + n, "content": f"<loc{n}>", **flags} for n in range(1000)]


def add_prefix_space_to_tokens(state):
    state["added_tokens"][0]["lstrip"] = True


DECLINED = {
    "another model": with_model(type="Unigram"),
    "dropout": with_model(dropout=0.1),
    "whole words first": with_model(ignore_merges=True),
    "a prefix inside words": with_model(continuing_subword_prefix="##"),
    "an ending": with_model(end_of_word_suffix="</w>"),
    "unknown characters": with_model(byte_fallback=False),
    "a byte is missing": lambda state: state["model"]["vocab"].pop("<0x7F>"),
    "no blank": lambda state: state["model"]["vocab"].pop("▁"),
    "a piece that joins words": add_piece,
    "a thousand tokens": add_locations,
    "tokens that eat blanks": add_prefix_space_to_tokens,
    "tokens found in normalized text": lambda state: state["added_tokens"][0].update(normalized=True),
    "a token like a word": lambda state: state["added_tokens"][0].update(content="▁the"),
    "a token like a first word": lambda state: state["added_tokens"][0].update(content=" the"),
    "neither normalizer nor blanks": lambda state: state.update(normalizer=None),
    "another normalizer": lambda state: state["normalizer"]["normalizers"].append({"type": "NFKC"}),
    "a pre-tokenizer": lambda state: state.update(pre_tokenizer={"type": "Whitespace"}),
    "both": lambda state: state.update(pre_tokenizer=metaspace("first")),
    "words split": lambda state: state.update(
        normalizer=None, pre_tokenizer=metaspace("first") | {"split": True}
    ),
}


@pytest.mark.parametrize("change", DECLINED.values(), ids=DECLINED)
def test_a_tokenizer_that_may_differ_is_declined(change):
    state = state_of("prepend")
    backend = Tokenizer.from_str(json.dumps(state))
    assert Words.of(state, backend) is not None
    change(state)
    assert Words.of(state, backend) is None


def test_a_byte_level_tokenizer_is_declined():
    backend = byte_level_tokenizer("chatml").backend_tokenizer
    assert Words.of(json.loads(backend.to_str()), backend) is None
