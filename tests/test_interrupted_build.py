"""The builder in a bad world: killed, full disks, changed inputs, other builders. Nothing is lost."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from tiny_corpus import chat_record, digests, killed_at, write_corpus

from omnidata import durable
from omnidata.builder import worker
from omnidata.builder.interruptions import BuildInterrupted
from omnidata.builder.settings import RunOptions
from omnidata.cli import run
from omnidata.locks import locked
from omnidata.schema import MANIFEST, UserError

INLINE = RunOptions(executor="inline", quiet=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # tests below fork this process
    return write_corpus(tmp_path_factory.mktemp("corpus") / "c")


# --- interruptions ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A corpus of three shards with a repeated sample, and its files when built in peace."""
    folder = tmp_path_factory.mktemp("small")
    corpus = write_corpus(folder / "c", num_llava=20, num_chat=6)
    with open(corpus.folder / "chat.jsonl", "a") as file:  # for --dedup to find
        file.write(json.dumps(chat_record(0) | {"id": "copy"}) + "\n")
    corpus = replace(corpus, settings=replace(corpus.settings, samples_per_shard=13, split={}, dedup="exact"))
    assert corpus.build(folder / "peace", options=INLINE).rejects["duplicate_sample"] == 1
    return corpus, digests(folder / "peace")


def count_steps(corpus, out):
    steps = []
    durable.on_step = lambda name, path: steps.append((name, path))
    corpus.build(out, options=INLINE)
    durable.on_step = None
    return len(steps)


def test_killed_at_any_durable_step_the_same_command_completes_the_same_dataset(small, tmp_path):
    corpus, want = small
    total = count_steps(corpus, tmp_path / "count")
    assert total > 60
    for step in [*range(1, total - 12, 4), *range(total - 12, total)]:
        out = tmp_path / "data"
        assert killed_at(step, corpus, out)
        if (out / MANIFEST).exists():  # only .build/ was left to remove
            assert {name: digest for name, digest in digests(out).items() if name in want} == want
            options = replace(INLINE, task=(0, 1))
            corpus.build(out, options=options)
        else:
            corpus.build(out, options=INLINE)
        assert digests(out) == want, f"killed at step {step} of {total}"
        shutil.rmtree(out)


def test_killed_again_and_again_it_still_completes(small, tmp_path):
    corpus, want = small
    out = tmp_path / "data"
    for step in (15, 12, 9, 14, 8):
        killed_at(step, corpus, out)
    corpus.build(out, options=INLINE)
    assert digests(out) == want


def test_a_disk_that_is_full_at_any_write_says_so_and_the_build_resumes(small, tmp_path):
    corpus, want = small

    def full(name, path):
        nonlocal left
        left -= name == "sync"
        if left < 0:
            raise OSError(28, "No space left on device", path)

    for writes in (0, 3, 5, 4):
        left = writes
        durable.on_step = full
        with pytest.raises(UserError, match=r"No space left on device.*run the same command again"):
            corpus.build(tmp_path / "data", options=INLINE)
        durable.on_step = None
        assert not (tmp_path / "data" / MANIFEST).exists()
    corpus.build(tmp_path / "data", options=INLINE)
    assert digests(tmp_path / "data") == want


def test_a_damaged_unfinished_shard_is_built_again(small, tmp_path):
    corpus, want = small
    out = tmp_path / "data"
    killed_at(count_steps(corpus, tmp_path / "count") - 30, corpus, out)
    shard = next((out / "shards").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-512])
    corpus.build(out, options=INLINE)
    assert digests(out) == want


def command(corpus, out, *more):
    settings = corpus.settings
    return [
        *(sys.executable, "-m", "omnidata.cli", "build-shards", *settings.source, "--out", str(out)),
        *("--tokenizer", settings.tokenizer, "--image-root", settings.image_root, "--num-query", "4"),
        *("--image-size", "32", "--samples-per-shard", "2", "--split", "val=0.1", "--workers", "2", *more),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_real_build_is_stopped_and_goes_on(corpus, tmp_path, how):
    out = tmp_path / "data"  # of so many shards that the build is far from its end when it is stopped
    process = subprocess.Popen(
        command(corpus, out),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    # A shard is done with its train-00000.parquet; a train-00000.rejects.parquet comes before that.
    while len(list(out.glob(".build/parts/train-?????.parquet"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, how) if how == signal.SIGINT else process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (-how if how == signal.SIGKILL else 130)
    if how != signal.SIGKILL:
        assert "Run the same command again to go on" in errors and "Traceback" not in errors
    assert not (out / MANIFEST).exists()
    found = sorted(path.name for path in out.glob(".build/**/*") if path.is_file())
    again = subprocess.run(command(corpus, out, "--json"), capture_output=True, check=True)
    report = json.loads(again.stdout)
    assert report["shards_built"] < report["num_shards"], (found, again.stderr)  # what was built is kept
    corpus.build(tmp_path / "peace", options=INLINE, samples_per_shard=2)
    assert digests(out) == digests(tmp_path / "peace")


# --- refusals ---------------------------------------------------------------------------------------------


def test_a_changed_build_is_refused_naming_what_changed(small, tmp_path):
    corpus, _ = small
    shutil.copytree(corpus.folder, tmp_path / "c")
    moved = replace(
        corpus.settings, source=tuple(str(tmp_path / "c" / n) for n in ("llava.json", "chat.jsonl"))
    )
    corpus = replace(corpus, settings=moved)
    out = tmp_path / "data"
    killed_at(40, corpus, out)
    with pytest.raises(UserError, match="--max-length was 2048 and is 1024"):
        corpus.build(out, options=INLINE, max_length=1024)
    with pytest.raises(UserError, match=r"chat.jsonl is gone"):
        corpus.build(out, options=INLINE, source=corpus.settings.source[:1])
    with open(tmp_path / "c" / "chat.jsonl", "a") as file:
        file.write(json.dumps(chat_record(99)) + "\n")
    with pytest.raises(UserError, match=r"chat.jsonl changed \([\d,]+ -> [\d,]+ bytes\)"):
        corpus.build(out, options=INLINE)
    report = corpus.build(out, options=replace(INLINE, overwrite=True))
    assert report.complete and report.num_records == 28


def test_folders_that_are_not_ours_are_left_alone(small, tmp_path):
    corpus, _ = small
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"thesis.tex"):
            corpus.build(tmp_path, options=replace(INLINE, overwrite=overwrite))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_complete_dataset_is_replaced_only_with_overwrite(small, tmp_path):
    corpus, want = small
    out = tmp_path / "data"
    corpus.build(out, options=INLINE, samples_per_shard=3)
    with pytest.raises(UserError, match=r"complete dataset.*--overwrite"):
        corpus.build(out, options=INLINE)
    corpus.build(out, options=replace(INLINE, overwrite=True))
    assert digests(out) == want


def test_a_second_builder_is_refused(small, tmp_path):
    corpus, _ = small
    with locked(durable.Store(tmp_path / "data"), "build"):
        with pytest.raises(UserError, match="another builder is at work"):
            corpus.build(tmp_path / "data", options=INLINE)
        with pytest.raises(UserError, match="another builder is at work"):
            corpus.build(tmp_path / "data", options=replace(INLINE, task=(0, 2)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": ("nowhere.json",)}, "nowhere.json"),
        ({"tokenizer": "no/such/tokenizer"}, "no/such/tokenizer"),
        ({"samples_per_shard": 1, "shard_bytes": 1}, "exclude each other"),
        ({"samples_per_shard": 0}, "--samples-per-shard is 0"),
        ({"split": {"train": 0.5}}, "other splits than train"),
    ],
)
def test_a_users_mistake_is_one_clear_line_and_nothing_is_created(small, tmp_path, settings, message):
    corpus, _ = small
    with pytest.raises(UserError, match=message) as error:
        corpus.build(tmp_path / "data", options=INLINE, **settings)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "data").exists()


def test_the_same_source_twice_is_refused(small, tmp_path):
    corpus, _ = small
    with pytest.raises(UserError, match="given twice"):
        corpus.build(tmp_path / "data", options=INLINE, source=corpus.settings.source * 2)


def test_when_nothing_becomes_a_sample_the_reasons_are_told(tmp_path, capsys):
    corpus = write_corpus(tmp_path / "c", num_llava=30, num_chat=0, bad=False)
    source = (corpus.settings.source[0],)
    for photo in (corpus.folder / "photos").iterdir():
        photo.write_bytes(b"not a picture")
    lines = json.loads((corpus.folder / "llava.json").read_text())
    (corpus.folder / "llava.json").write_text(json.dumps([line for line in lines if "image" in line]))
    with pytest.raises(UserError, match=r"none of the 20 records.*image_format.*20") as error:
        corpus.build(tmp_path / "data", options=INLINE, source=source)
    assert re.search(r"\n  \S+llava.json, item 1: .*starts with b'not a", str(error.value))
    assert run(["inspect", str(tmp_path / "data"), "--rejects"]) == 0
    shown = capsys.readouterr().out
    assert "unfinished build" in shown and shown.count("image_format") == 20
    assert run(["inspect", str(tmp_path / "data"), "--rejects", "--json", "--limit", "2"]) == 0
    report = json.loads(capsys.readouterr().out)
    ids = [row["id"] for row in report["reject_records"]]
    assert not report["complete"] and ids == ["llava-1", "llava-2"]


def test_too_many_rejects_tell_the_first_even_of_a_shard_that_is_not_done(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(worker, "REPORT_SECONDS", 0.0)
    corpus = write_corpus(tmp_path / "c", num_llava=30, num_chat=0, bad=False)
    for photo in (corpus.folder / "photos").iterdir():
        photo.write_bytes(b"not a picture")
    options = replace(INLINE, max_rejects=4)
    one_shard = {"source": (corpus.settings.source[0],), "samples_per_shard": 1000}
    with pytest.raises(UserError, match=r"more than --max-rejects allows.*\n  \S+, item 1: .*not a"):
        corpus.build(tmp_path / "data", options=options, **one_shard)
    assert run(["inspect", str(tmp_path / "data"), "--rejects"]) == 0
    assert "item1image_format" in re.sub(r"\s", "", capsys.readouterr().out)


# --- worker death -----------------------------------------------------------------------------------------


def test_a_record_that_kills_its_worker_is_named(small, tmp_path, monkeypatch):
    from functools import partial

    from omnidata.builder import build as module

    corpus, want = small
    monkeypatch.setattr(module, "work", partial(_poisoned, poison="llava-4"))
    with pytest.raises(UserError, match=r"train-00000.tar died \(killed by SIGKILL\).*llava.json, item 4"):
        corpus.build(tmp_path / "data", options=RunOptions(workers=2, quiet=True))
    monkeypatch.undo()
    corpus.build(tmp_path / "data", options=INLINE)
    assert digests(tmp_path / "data") == want


def _poisoned(job, task, report, *, poison):
    """The build's work, in which decoding the images of one record kills the process, as a bad codec does."""
    from omnidata.builder import records, worker

    original = records.Stages._finish

    def finish(self, position, record, *others):
        if record.id == poison:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, position, record, *others)

    records.Stages._finish = finish
    return worker.work(job, task, report)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_becomes_a_clear_message(small, tmp_path, monkeypatch, number):
    corpus, want = small

    def interrupt(name, path):
        if path.endswith("train-00001.tar") and name == "sync":
            signal.raise_signal(number)

    monkeypatch.setattr(durable, "on_step", interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
    try:
        with pytest.raises(BuildInterrupted, match="same command again"):
            corpus.build(tmp_path / "data", options=INLINE)
    finally:
        signal.signal(signal.SIGINT, before)
    monkeypatch.undo()
    assert corpus.build(tmp_path / "data", options=INLINE).shards_built == 2, "of 3"
    assert digests(tmp_path / "data") == want


def test_an_error_of_a_clouds_own_client_ends_a_build_in_one_clear_line(small, tmp_path, monkeypatch):
    """Those of botocore, aiohttp ... are no OSError."""
    from botocore.exceptions import FlexibleChecksumError

    def wrong(*_, **__):
        raise FlexibleChecksumError(error_msg="Expected checksum a did not\nmatch calculated checksum: b")

    monkeypatch.setattr(durable.Store, "write_bytes", wrong)
    with pytest.raises(
        UserError, match=r"^the object store failed: FlexibleChecksumError: .* did not match .*again\.$"
    ):
        small[0].build(tmp_path / "data", options=RunOptions(executor="inline", quiet=True))
