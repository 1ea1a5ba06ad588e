"""What unpacks to more than any record: a reject, in bounded memory; and text that is safe to show."""

import gzip
import json
import subprocess
import sys

import pytest
import zstandard
from throwaway import byte_level_tokenizer, conversation

from omnidata import cli
from omnidata.printable import BIDI, printable, to_json
from omnidata.render import Renderer
from omnidata.schema import RejectError
from omnidata.text.chat_template import ChatTemplate

RECORD = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
BUILD = """
import resource, sys
from omnidata import corpus
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
[file] = corpus.open_source(sys.argv[1], format="messages")
found = [record for unit in corpus.scan(file) for record in corpus.read(file, unit)]
print(*[getattr(record, "reason", "sample") for record in found])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


@pytest.mark.parametrize("kind", ["zst", pytest.param("gz", marks=pytest.mark.slow)])
def test_a_line_of_a_gigabyte_is_a_reject_in_bounded_memory(tmp_path, kind):
    path = tmp_path / f"bomb.jsonl.{kind}"
    pieces = [f"{RECORD}\n".encode(), b'{"x": "', *[b"x" * (1 << 24)] * 64, b'"}\n', f"{RECORD}\n".encode()]
    if kind == "gz":
        with gzip.open(path, "wb", compresslevel=1) as file:
            for piece in pieces:
                file.write(piece)
    else:
        with path.open("wb") as raw, zstandard.ZstdCompressor(level=1).stream_writer(raw) as file:
            for piece in pieces:
                file.write(piece)
    assert path.stat().st_size < 20 << 20
    out = subprocess.run([sys.executable, "-c", BUILD, str(path)], capture_output=True, text=True, check=True)
    reasons, megabytes = out.stdout.splitlines()
    assert reasons == "sample bad_json sample" and int(megabytes) < 900


EVIL = "\x1b[31m \x1b]0;title\x07 \x9b31m \x7f " + BIDI + "\u2028 é 猫"


def test_printable_and_json_hold_nothing_that_a_terminal_obeys():
    for text in (printable(EVIL), to_json({EVIL: [EVIL]})):
        assert not {c for c in text if ord(c) < 32 and c != "\n"} | {c for c in text if c in BIDI + "\u2028"}
        assert not any(0x7F <= ord(c) < 0xA0 for c in text) and "é 猫" in text
    assert json.loads(to_json({"a": EVIL})) == {"a": EVIL}


@pytest.mark.parametrize("as_json", [False, True])
def test_a_build_reports_evil_names_safely(tmp_path, capfd, as_json):
    from tiny_corpus import write_corpus

    corpus = write_corpus(tmp_path / "raw", num_llava=2, num_chat=2, bad=False)
    evil = tmp_path / "evil.jsonl"
    record = {"id": EVIL, "image": EVIL + ".jpg", "messages": json.loads(RECORD)["messages"], EVIL: "x"}
    evil.write_text(json.dumps(record) + "\n" + RECORD[:-1] + ", " + json.dumps(EVIL) + ": 1}\n")
    command = ["build-shards", str(evil), "--tokenizer", corpus.settings.tokenizer, "--workers", "1"]
    assert cli.run([*command, "--out", str(tmp_path / "data"), "--quiet", *["--json"] * as_json]) == 0
    out = "".join(capfd.readouterr())
    assert "image_missing" in out and not any(0x7F <= ord(c) < 0xA0 or c in BIDI + "\x1b\x07" for c in out)


ENDLESS = {
    "prints": "{% for i in range(90000) %}{% for j in range(90000) %}xxxxxxxx{% endfor %}{% endfor %}",
    "calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "divides": "{{ 1 // (messages | length - messages | length) }}",
    "a range": "{% for i in range(10**12) %}x{% endfor %}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_that_never_ends_is_refused(name):
    template = ChatTemplate(ENDLESS[name], {})
    with pytest.raises(RejectError) as error:
        template.render([{"role": "user", "content": "a"}])
    assert error.value.reason == "template_refused"


def test_a_cut_asks_the_template_as_often_for_many_turns_as_for_few(monkeypatch):
    asked = []
    original = ChatTemplate.print
    monkeypatch.setattr(ChatTemplate, "print", lambda *a, **k: asked.append(1) or original(*a, **k))
    counts = []
    for turns in (20, 400):
        renderer = Renderer(byte_level_tokenizer("thinking"), max_length=300)
        asked.clear()
        rendered = renderer.render(conversation(*["some words"] * turns))
        counts.append(len(asked))
        assert len(rendered.input_ids) <= 300 and rendered.num_truncated_messages == turns - turns_kept(
            rendered
        )
    assert counts[1] <= counts[0] + 2


def turns_kept(rendered):
    supervised = (rendered.labels != -100).astype(int)
    return 2 * int((supervised[1:] > supervised[:-1]).sum())
