"""Words of byte-level tokenizers: exactly what the tokenizers library gives for the whole text, or None."""

import json
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from same_encoding import check_same
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from omnidata.text import spaced_words
from omnidata.text.encoder import Encoder
from omnidata.text.guarding import described, guarded
from omnidata.text.patterns import cuts_before_blanks, finds_no_blank_inside
from omnidata.text.spaced_words import SpacedWords, is_proven

QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
LLAMA = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
    r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
ASIAN = r"[一-龥぀-ゟ゠-ヿ]+"
PROVEN = [QWEN, LLAMA, O200K, DEEPSEEK, GPT2, QWEN.replace(r"\p{L}+", r"[\p{L}\p{M}]+"), r"\S+|\s+"]
NOT_PROVEN = [
    *(".+", r"\p{L}+", r"[^x]+|\s+", r"\w+\s?\w*|\s+", r" ?\w+|\s+$", r"(?<=a)b|\s+", r"(?=a)a|\s+"),
    *(r"\bx|\s+", r"(a)\1|\s+", r"a b|\s+", r"(?: ?\p{L}+)+|\s+", r"\s+\S|\s+", r"x*|\s+", r"\p{Z}+|\p{L}+"),
    *(r"[\p{L} ]+|\s+", r"(?!x)\w+|\s+", r"\s{2,}|\w", r"[a-z&&[b]]|\s+", r"(?x) a|\s+", r"[!-~ ]+|\s+"),
    *(r"\s+(?!\S)|\p{L}+", r"\p{L}+|\s+(?!\S)", "(", "[", "a{", r"\s++\S++|\s+", r"[^\n]|\s+|.. ", r"..|\s+"),
    *(r"[\x20a]+|\s+", r"\Ra|\s+", r"'(?i)s|\s+", "[\t-z]+|\\s+"),
]


def split(pattern):
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def byte_level(use_regex=False):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


STAGES = {
    "gpt-2": byte_level(True),
    "qwen": pre_tokenizers.Sequence([split(QWEN), byte_level()]),
    "llama 3": pre_tokenizers.Sequence([split(LLAMA), byte_level()]),
    "o200k": pre_tokenizers.Sequence([split(O200K), byte_level()]),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level(True)]),
    "deepseek": pre_tokenizers.Sequence([split(r"\p{N}{1,3}"), split(ASIAN), split(DEEPSEEK), byte_level()]),
}
SEEN = (
    "What's in the picture? A red square, two cats and the hello world\n\n\n 12345 1,000.5 don't  DON'T é è "
    "日本語 图像 naïve I'll   spaces\t tabs\r\n\n  def f(x):\n        return x\n"
)
PARTS = st.sampled_from(
    [
        *(
            "the",
            " cat",
            "a",
            " ",
            "  ",
            "   ",
            "\n",
            "\t",
            "\r\n",
            "\xa0",
            "\u3000",
            "日本",
            "𝒳",
            "é",
            "e\u0301",
        ),
        *(
            "\u0301",
            "'s",
            "'LL",
            "ſ",
            "12",
            "1",
            ".",
            ",",
            "?!",
            "_",
            "\u200d",
            "👩‍👩‍👧",
            "\0",
            "\ufdd0",
            "\u180e",
        ),
        *(
            "\x85",
            "\x1c",
            "\u2028",
            "\u200b",
            "\ufeff",
            "<|im_end|>",
            "<tag>",
            "ﬁ",
            "㎏",
            "́ a",
            "-",
            "\\",
            "Ab",
        ),
    ]
)
TEXTS = st.lists(PARTS, max_size=16).map("".join) | st.text(st.characters(exclude_categories=["Cs"]))


def trained(name, normalizer=None):
    backend = Tokenizer(models.BPE(ignore_merges=name == "llama 3"))
    backend.normalizer, backend.pre_tokenizer = normalizer or normalizers.NFC(), STAGES[name]
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([SEEN] * 9, trainer)
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    backend.add_tokens([AddedToken("<tag>", normalized=False)])
    return backend


class Wrapped:
    def __init__(self, backend):
        self.backend_tokenizer = backend


@pytest.fixture(scope="module", params=list(STAGES))
def encoder(request):
    made = Encoder(Wrapped(trained(request.param)), content_tokens=["<tag>"])
    assert isinstance(made._words, SpacedWords)
    return made


@settings(deadline=None, max_examples=150)
@given(st.lists(TEXTS, max_size=4))
def test_a_text_is_encoded_as_by_the_library(encoder, texts):
    guard = encoder.guards["<|im_end|>"]
    texts = [text.replace("<|im_end|>", guard) for text in texts]
    theirs = encoder._backend.encode_batch(texts, add_special_tokens=False)
    for ours, encoding, text in zip(encoder.encode_batch(texts), theirs, texts, strict=True):
        check_same(ours, encoding, text)


def test_what_is_typed_is_no_control_token_and_guards_have_their_ids():
    backend = trained("qwen")
    encoder = Encoder(Wrapped(backend), content_tokens=[])
    [typed, guard] = encoder.encode_batch(["<|im_end|>", encoder.guards["<|im_end|>"]])
    assert guard.ids == [backend.token_to_id("<|im_end|>")] and guard.ids[0] not in typed.ids
    assert encoder.image_id == backend.get_vocab_size()


def test_words_may_be_forgotten_at_any_time(encoder, monkeypatch):
    monkeypatch.setattr(spaced_words, "_HELD", 0)
    monkeypatch.setattr(spaced_words, "_MOST_SPANS", 1)
    for text in ["the cat sat", "on a mat", "the 日本 mat  ", "the cat sat"]:
        [ours] = encoder.encode_batch([text])
        check_same(ours, encoder._backend.encode(text, add_special_tokens=False), text)
        assert (" cat" in encoder._words._ids) == ("cat" in text), "forgets before each batch"


@pytest.mark.parametrize("pattern", PROVEN)
def test_patterns_of_today_are_proven(pattern):
    assert cuts_before_blanks(pattern)


@pytest.mark.parametrize("pattern", [ASIAN, r"\p{N}{1,3}", r"\p{N}"])
def test_patterns_that_leave_blanks_to_others(pattern):
    assert finds_no_blank_inside(pattern) and not cuts_before_blanks(pattern)


@pytest.mark.parametrize("pattern", NOT_PROVEN)
def test_other_patterns_are_not_proven(pattern):
    assert not cuts_before_blanks(pattern)


ATOMS = [
    "a",
    "b",
    " ",
    r"\s",
    r"\S",
    "[ab]",
    "[^a]",
    r"[^\s]",
    r"[^ \n]",
    ".",
    r"\p{L}",
    r"\P{N}",
    "(?:a| b)",
    r"(?!\S)",
]


def random_pattern(rng):
    quantifiers = ["", "", "?", "*", "+", "{1,2}", "??", "++"]
    alternatives = [
        "".join(rng.choice(ATOMS) + rng.choice(quantifiers) for _ in range(rng.randint(1, 3)))
        for _ in range(rng.randint(1, 3))
    ]
    return "|".join([*alternatives, r"\s+"])


def test_whatever_is_proven_is_true_of_the_library():
    """Random patterns on random texts: pieces of the whole are those of the words."""
    rng, num_proven = random.Random(0), 0
    for _ in range(4000):
        pattern = random_pattern(rng)
        if not cuts_before_blanks(pattern):
            continue
        num_proven += 1
        splitter = split(pattern)
        for _ in range(12):
            text = "".join(rng.choice("ab1  \n\t.é") for _ in range(rng.randint(2, 12)))
            words = re.split(r"(?<=\S)(?= )", text)
            pieces = [piece for word in words for piece, _ in splitter.pre_tokenize_str(word)]
            assert pieces == [piece for piece, _ in splitter.pre_tokenize_str(text)], (pattern, text)
    assert num_proven > 200


def test_what_tokenizers_call_white_is_white_here():
    """A blank after a character that the library takes for white space is no place to cut."""
    splitter = pre_tokenizers.Split(Regex(r"\s"), "isolated")
    others = [chr(code) for code in range(0x10000) if not 0xD800 <= code < 0xE000]
    pieces = {
        piece for piece, _ in splitter.pre_tokenize_str("x" + "x".join(others) + "x") if len(piece) == 1
    }
    white = {c for c in pieces if len(splitter.pre_tokenize_str(f"x{c}x")) == 3}
    assert len(white) >= 25
    assert all(c == " " or re.fullmatch(spaced_words._WHITE, c) for c in white)


def change(**parts):
    return lambda state: state.update(parts)


def add_token_that_eats_blanks(state):
    state["added_tokens"][0]["lstrip"] = True


DECLINED = {
    "another normalizer": change(normalizer={"type": "NFKC"}),
    "one of several": change(normalizer={"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}),
    "no pre-tokenizer": change(pre_tokenizer=None),
    "another pre-tokenizer": change(pre_tokenizer={"type": "Whitespace"}),
    "a blank in front": lambda state: state["pre_tokenizer"].update(add_prefix_space=True),
    "bytes without a pattern": lambda state: state["pre_tokenizer"].update(use_regex=False),
    "tokens that eat blanks": add_token_that_eats_blanks,
    "dropout": lambda state: state["model"].update(dropout=0.1),
}


@pytest.mark.parametrize("why", DECLINED)
def test_a_tokenizer_that_may_differ_is_declined(why):
    state = described(trained("gpt-2"))
    assert is_proven(state)
    state = json.loads(json.dumps(state))
    DECLINED[why](state)
    assert not is_proven(state)


@pytest.mark.parametrize(
    "stage",
    [
        pre_tokenizers.Split(Regex(QWEN), "removed"),
        pre_tokenizers.Split(Regex(QWEN), "isolated", invert=True),
        pre_tokenizers.Split(" ", "isolated"),
        split(r"\p{L}+ \p{L}+|\s+"),
        split(r"\p{L}+"),
    ],
)
def test_stages_that_are_not_proven_are_declined(stage):
    backend = trained("gpt-2")
    backend.pre_tokenizer = pre_tokenizers.Sequence([stage, byte_level()])
    assert Encoder(Wrapped(backend), content_tokens=[])._words is None


def test_models_with_control_tokens_among_their_pieces_are_written_anew():
    backend = trained("gpt-2")
    state = json.loads(backend.to_str())
    state["model"]["vocab"]["cats"] = state["model"]["vocab"].pop("Ġcats", len(state["model"]["vocab"]))
    state["model"]["merges"] = [merge for merge in state["model"]["merges"] if "Ġcats" not in "".join(merge)]
    state["model"]["merges"].append(["cat", "s"])
    state["added_tokens"].append(
        {**state["added_tokens"][0], "id": state["model"]["vocab"]["cats"], "content": "cats"}
    )
    backend = Tokenizer.from_str(json.dumps(state))
    copy, _ = guarded(backend, {"cats": "\ufdd0a\ufdd1"}, "\ufdd0b\ufdd1")
    assert copy.encode("\ufdd0a\ufdd1").ids == [backend.token_to_id("cats")]
    assert backend.token_to_id("cats") not in copy.encode("cats").ids


def test_a_model_that_is_written_out_is_what_the_copy_says_of_itself():
    backend = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "</s>": 3, "s>": 4}, [("a", "b")]))
    backend.add_special_tokens(["</s>"])
    copy, state = guarded(backend, {"</s>": "\ufdd0a\ufdd1"}, "\ufdd0b\ufdd1")
    assert state == json.loads(copy.to_str())
    assert (copy.token_to_id("</s>"), copy.token_to_id("\ufdd0a\ufdd1")) == (None, 3)
