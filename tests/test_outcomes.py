"""One record never ends a build: what nobody foresaw is a reject of its own, counted, and exit code 1."""

import json
from collections import Counter

import pytest
from tiny_corpus import write_corpus

from omnidata import cli
from omnidata.builder import build
from omnidata.builder.records import Stages
from omnidata.dataset import Dataset
from omnidata.executors import InlineExecutor
from omnidata.outcomes import caught
from omnidata.schema import UserError


def raises(error):
    raise error


def test_what_a_record_may_cause_and_what_not():
    for error in (
        AssertionError(),
        ZeroDivisionError("x"),
        MemoryError(),
        OSError("no number"),
        KeyError("a"),
    ):
        found = caught(raises, error)
        assert found.reason == "unexpected" and type(error).__name__ in found.detail
    assert caught(raises, RecursionError()).reason == "bad_record"
    for error in (UserError("settings"), OSError(28, "disk full"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            caught(raises, error)
    assert "0x7" not in caught(raises, ValueError("<object at 0x7f12ab34cd56>")).detail


def _fails_on(record_id):
    def build(self, position, record, *others, original=Stages._build):
        assert record.id != record_id, "a broken codec"
        return original(self, position, record, *others)

    return build


def test_a_build_goes_on_and_ends_with_1(tmp_path, monkeypatch, capsys):
    corpus = write_corpus(tmp_path / "raw")
    monkeypatch.setattr(Stages, "_build", _fails_on("llava-4"))
    monkeypatch.setattr(build, "ProcessExecutor", lambda function, **_: InlineExecutor(function))
    settings = corpus.settings
    command = ["build-shards", *settings.source, "--tokenizer", settings.tokenizer, "--quiet"]
    command += ["--image-root", settings.image_root, "--out", str(tmp_path / "data")]
    assert cli.run(command) == 1
    out = capsys.readouterr().out
    assert "1  unexpected" in out and "AssertionError at test_outcomes.py" not in out
    data = Dataset(tmp_path / "data")
    rejects = Counter(data.rejects["reason"].to_pylist())
    assert rejects["unexpected"] == 1 and len(data) + sum(rejects.values()) == corpus.num_records
    [row] = [row for row in data.rejects.to_pylist() if row["reason"] == "unexpected"]
    assert row["id"] == "llava-4" and "a broken codec" in row["detail"]


@pytest.mark.parametrize("depth", [50, 900, 100_000])
@pytest.mark.parametrize("bracket", ["[]", '{"a":}'])
def test_nested_values_end_no_build(tmp_path, depth, bracket):
    corpus = write_corpus(tmp_path / "raw", num_llava=4, num_chat=4, bad=False)
    left, right = (bracket[0], bracket[1]) if bracket == "[]" else ('{"a":', "}")
    nested = left * depth + ("1" if bracket != "[]" else "") + right * depth
    chat = json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    (tmp_path / "deep.jsonl").write_text(f'{{"id": 1, "x": {nested}, "messages": {chat}}}\n')
    report = corpus.build(tmp_path / "data", source=(*corpus.settings.source, str(tmp_path / "deep.jsonl")))
    assert report.num_samples + report.num_rejects == report.num_records == 9
    assert set(report.rejects) <= {"bad_json", "bad_record"}
