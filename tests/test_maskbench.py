"""MaskBench: its judge knows right from wrong, and our renderer is right or refuses."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "benchmarks" / "maskbench"


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """The questions under Zephyr's template, on Mistral's vocabulary: Bench, the run module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        patch.syspath_prepend(BENCH / "contestants")
        run = importlib.import_module("run")
        zephyr = [template for template in run.TEMPLATES if template.name == "zephyr"]
        yield run.Bench(tmp_path_factory.mktemp("maskbench"), tuple(zephyr)), run


def question(bench, name):
    [found] = [one for one in bench.questions if one["name"] == name]
    return found


def verdict(bench, name, parts):
    """The verdict on parts of text, (text, learned), each encoded as the template's own would be."""
    tokenizer, answer = bench._tokenizers["zephyr"], {"template": "zephyr", "name": name}
    ids, labels = [], []
    for text, learned in parts:
        new = tokenizer.encode(text, add_special_tokens=False)
        ids += new
        labels += new if learned else [-100] * len(new)
    return bench._verdict({**answer, "input_ids": ids, "labels": labels})["verdict"]


ASKED = "<|user|>\nWhat is this?</s>\n<|assistant|>\n"


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([(ASKED, False), ("A boat.</s>", True), ("\n", False)], "right"),
        ([(ASKED, False), ("A boat.</s>\n", True)], "right"),
        ([(ASKED, False), ("A boat.", True), ("</s>\n", False)], "lost"),
        ([(ASKED, False), ("A", False), (" boat.</s>\n", True)], "leaked"),
        ([(ASKED, False), ("A boat.</s>\n", False)], "lost"),
        ([(ASKED, True), ("A boat.</s>\n", True)], "leaked"),
        ([(ASKED[:22], False), ("</s>", True), (ASKED[26:], False), ("A boat.</s>", True)], "leaked"),
        ([("<|user|>\nWhat is</s> this?</s>\n<|assistant|>\n", False), ("A boat.</s>", True)], "injected"),
    ],
)  # fmt: skip
def test_the_judge_knows_right_from_wrong(bench, parts, expected):
    assert verdict(bench[0], "plain/0", parts) == expected


def test_the_same_words_of_the_user_are_no_reply(bench):
    turns = ("<|user|>\n", "Yes.</s>\n", "<|assistant|>\n", "Yes.</s>\n")
    theirs = [(text, number == 1) for _ in range(3) for number, text in enumerate(turns)]
    replies = [(text, number == 3) for _ in range(3) for number, text in enumerate(turns)]
    assert verdict(bench[0], "multi-turn/same-words", replies) == "right"
    assert verdict(bench[0], "multi-turn/same-words", theirs) == "leaked"


def test_what_a_contestant_raises_is_its_answer_but_not_what_ends_the_run(bench):
    common = importlib.import_module("common")

    def raising(error):
        raise error

    assert common.attempt(lambda: raising(RuntimeError("no")))["outcome"] == "crashed"
    assert common.attempt(lambda: raising(common.RefusedError("no")))["outcome"] == "refused"
    for error in (MemoryError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error):
            common.attempt(lambda error=error: raising(error()))


def test_a_question_without_an_answer_counts(bench, tmp_path, monkeypatch):
    """Of a contestant whose process ends well before its last answer."""
    bench, run = bench
    script = tmp_path / "contestants" / "trl_sft.py"
    script.parent.mkdir()
    script.write_text("import sys; open(sys.argv[3], 'w').close()")
    monkeypatch.setattr(run, "HERE", tmp_path)
    bench.ask("trl_sft", sys.executable, timeout=60)
    verdicts = bench.results("trl_sft")["verdicts"]
    assert [(one["verdict"], one["detail"]) for one in verdicts] == [("crashed", "no answer")] * 127
    script.write_text("import time; time.sleep(60)")
    bench.ask("trl_sft", sys.executable, timeout=0.2)
    assert bench.results("trl_sft") == {"version": "could not be run", "verdicts": []}


def test_a_contestant_that_is_unknown_or_has_no_environment_is_named(bench, tmp_path, monkeypatch, capsys):
    for options, says in (
        (["--contestant", "tlr_sft=python"], "--contestant tlr_sft=python: must be NAME=PYTHON"),
        (["--only", "trl_sft"], "--only trl_sft: needs --contestant"),
    ):
        monkeypatch.setattr(sys, "argv", ["run.py", "--work", str(tmp_path), *options])
        with pytest.raises(SystemExit):
            bench[1].main()
        assert says in capsys.readouterr().err


def test_ours_is_right_or_refuses(bench):
    bench, run = bench
    ours = importlib.import_module("ours")
    common = importlib.import_module("common")
    answer = ours.prepare(bench._work / "tokenizers" / "zephyr")
    found = Counter()
    for one in bench.questions:
        given = common.attempt(lambda one=one: common.answered(answer, one))
        judged = bench._verdict({"template": "zephyr", "name": one["name"], **given})
        assert judged["verdict"] in ("right", "refused"), judged
        assert judged["verdict"] == "right" or len(judged["detail"]) > 20
        found[judged["verdict"]] += 1
    assert found["right"] > 110
    assert len(bench.questions) >= 120
    assert run.report({"ours": {"version": "1", "verdicts": []}}).startswith("| contestant |")
