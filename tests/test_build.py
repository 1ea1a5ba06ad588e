"""The builder: the same bytes whatever happens, every record accounted for, nothing half-written."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from tiny_corpus import BAD, chat_record, digests, write_corpus

from omnidata import durable
from omnidata.builder.driver import BuildInterrupted
from omnidata.builder.settings import RunOptions
from omnidata.dataset import Dataset
from omnidata.schema import INDEX_COLUMNS, MANIFEST, UserError
from omnidata.shards import content_hash
from omnidata.text.tokenizer import load_tokenizer

INLINE = RunOptions(executor="inline", quiet=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # tests below fork this process
    return write_corpus(tmp_path_factory.mktemp("corpus") / "c")


@pytest.fixture(scope="module")
def built(corpus, tmp_path_factory):
    """(folder, report) of a build by one worker."""
    out = tmp_path_factory.mktemp("built") / "data"
    return out, corpus.build(out)


# --- what comes out ---------------------------------------------------------------------------------------


def test_every_record_is_a_sample_or_a_reject(corpus, built):
    out, report = built
    dataset = Dataset(out)
    assert report.num_records == corpus.num_records == 100
    assert report.num_samples + report.num_rejects == report.num_records
    assert report.rejects == dict.fromkeys(sorted(BAD), 1)
    rejects = {row["reason"]: row for row in dataset.rejects.to_pylist()}
    for reason, (source, number) in BAD.items():
        locator = f"item {number}" if source.endswith("json") else f"line {number + 1}"
        assert rejects[reason]["source"].endswith(source) and rejects[reason]["locator"] == locator
        assert rejects[reason]["detail"] and rejects[reason]["raw"]
    ids = dataset.index["id"].to_pylist()
    assert len(set(ids)) == len(ids) == 94
    assert set(ids) | {row["id"] for row in rejects.values()} >= {f"llava-{i}" for i in range(60)}


def test_the_index_tells_the_truth(built):
    out, _ = built
    dataset = Dataset(out)
    assert dataset.index.schema.names == [column.name for column in INDEX_COLUMNS]
    keys = dataset.index["key"].to_pylist()
    assert len(set(keys)) == len(keys) and all(len(key) == 9 and key.isdigit() for key in keys)
    for position, row in enumerate(dataset.index.to_pylist()):
        sample = dataset[position]
        assert sample.key == row["key"] and content_hash(sample) == row["content_hash"]
        assert len(sample.input_ids) == row["n_tokens"] and len(sample.images) == row["n_images"]
        assert int((sample.labels != -100).sum()) == row["n_supervised"] > 0
        assert row["image_sizes"] == [[43, 32]] * row["n_images"], "64×48, shorter side to 32"


def test_the_manifest_adds_up(built):
    out, report = built
    manifest = Dataset(out).manifest
    index = Dataset(out).index
    assert manifest.num_tokens == report.num_tokens == sum(index["n_tokens"].to_pylist())
    assert manifest.num_supervised == sum(index["n_supervised"].to_pylist())
    assert manifest.num_images == sum(index["n_images"].to_pylist())
    assert [entry["num_records"] for entry in manifest.inputs] == [60, 40]
    for shard in manifest.shards:
        rows = [row for row in index.to_pylist() if row["shard"] == shard.path]
        assert len(rows) == shard.num_samples and sum(row["n_tokens"] for row in rows) == shard.num_tokens
        assert (out / shard.path).stat().st_size == shard.num_bytes
    assert sum(manifest.splits.values()) == manifest.num_samples
    assert not (out / durable.SCRATCH).exists()


def test_records_keep_their_order_and_shards_their_size(built):
    out, _ = built
    rows = [row for row in Dataset(out, split="train").index.to_pylist()]
    assert [row["key"] for row in rows] == sorted(row["key"] for row in rows)
    sizes = [shard.num_samples for shard in Dataset(out).manifest.shards if shard.split == "train"]
    assert len(sizes) == 7 and all(12 <= size <= 15 for size in sizes[:-1]), "15 records less their rejects"


def test_the_split_depends_on_the_id_alone(corpus, built, tmp_path):
    out, _ = built
    val = set(Dataset(out, split="val").index["id"].to_pylist())
    assert 1 <= len(val) <= 25
    grown = write_corpus(tmp_path / "grown", num_chat=80)
    grown.build(tmp_path / "out", options=INLINE)
    now = Dataset(tmp_path / "out", split="val").index["id"].to_pylist()
    old = set(Dataset(out).index["id"].to_pylist())
    assert set(now) & old == val and set(now) - old, "old ids stay where they were; new ones come in"
    corpus.build(tmp_path / "other", options=INLINE, seed=1)
    assert set(Dataset(tmp_path / "other", split="val").index["id"].to_pylist()) != val


def test_a_tokenizer_without_image_tokens_gets_them(corpus, tmp_path):
    tokenizer = load_tokenizer(corpus.settings.tokenizer)
    plain = tmp_path / "plain"
    tokenizer.save_pretrained(plain)
    content = json.loads((plain / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if "im_" not in token["content"]]
    (plain / "tokenizer.json").write_text(json.dumps(content))
    config = json.loads((plain / "tokenizer_config.json").read_text())
    config.pop("extra_special_tokens", None)
    config.pop("additional_special_tokens", None)
    config["added_tokens_decoder"] = {
        key: token
        for key, token in config.get("added_tokens_decoder", {}).items()
        if "im_" not in token["content"]
    }
    (plain / "tokenizer_config.json").write_text(json.dumps(config))
    assert "<im_patch>" not in load_tokenizer(plain).added_tokens_encoder
    report = corpus.build(tmp_path / "out", options=INLINE, tokenizer=str(plain))
    assert report.num_samples == 94
    assert Dataset(tmp_path / "out").manifest.special_tokens["<im_patch>"] > 0


# --- the same bytes ---------------------------------------------------------------------------------------


def test_workers_and_executor_change_no_byte(corpus, built, tmp_path):
    out, _ = built
    want = digests(out)
    corpus.build(tmp_path / "two", options=RunOptions(workers=2, quiet=True))
    corpus.build(tmp_path / "inline", options=INLINE)
    assert digests(tmp_path / "two") == want
    assert digests(tmp_path / "inline") == want


def test_tasks_build_the_same_dataset_and_the_last_one_completes_it(corpus, built, tmp_path):
    out, _ = built
    for part in (2, 0, 1):
        options = RunOptions(executor="inline", quiet=True, task=(part, 3))
        report = corpus.build(tmp_path / "data", options=options)
        assert report.complete == (part == 1)
        assert (tmp_path / "data" / MANIFEST).exists() == report.complete
    assert digests(tmp_path / "data") == digests(out)
    again = corpus.build(tmp_path / "data", options=options)
    assert again.complete and again.shards_built == 0, "a task that is started again finds all done"
    with pytest.raises(UserError, match="other settings or inputs"):
        corpus.build(tmp_path / "data", options=options, max_length=99)


def test_finalize_says_what_is_missing(corpus, built, tmp_path):
    out, _ = built
    data = tmp_path / "data"
    corpus.build(data, options=RunOptions(executor="inline", quiet=True, task=(0, 2)))
    finalize = RunOptions(executor="inline", quiet=True, finalize=True)
    with pytest.raises(UserError, match=r"4 of 8 shards are not built yet \(shards/train-00001.tar"):
        corpus.build(data, options=finalize)
    corpus.build(data, options=RunOptions(executor="inline", quiet=True, task=(1, 2)))
    assert digests(data) == digests(out)


def test_a_remote_store_gets_the_same(corpus, built, tmp_path):
    import fsspec

    out, _ = built
    url = f"memory://{tmp_path.name}"
    corpus.build(url)
    memory = fsspec.filesystem("memory")
    root = f"/{tmp_path.name}"
    found = {path.removeprefix(f"{root}/"): memory.cat_file(path) for path in memory.find(root)}
    assert found == {name: (out / name).read_bytes() for name in digests(out)}
    assert len(Dataset(url)) == 94 and Dataset(url)[3].images == Dataset(out)[3].images


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


def killed_at(step, corpus, out):
    """Build in a child that kills itself at a durable step; -> whether it came that far."""

    def die(name, path):
        nonlocal step
        step -= 1
        if step < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        durable.on_step = die
        try:
            corpus.build(out, options=INLINE)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


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
    out = tmp_path / "data"  # of so many shards that the build is far from its end when its first one is seen
    process = subprocess.Popen(
        command(corpus, out),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not list(out.glob(".build/parts/train-0*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, how) if how == signal.SIGINT else process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (-how if how == signal.SIGKILL else 130)
    if how != signal.SIGKILL:
        assert "Run the same command again to go on" in errors and "Traceback" not in errors
    assert not (out / MANIFEST).exists()
    report = json.loads(
        subprocess.run(command(corpus, out, "--json"), capture_output=True, check=True).stdout
    )
    assert report["shards_built"] < report["num_shards"], "what was built is kept"
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
    with durable.locked(durable.Store(tmp_path / "data"), "build"):
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


def test_when_nothing_becomes_a_sample_the_reasons_are_told(tmp_path):
    corpus = write_corpus(tmp_path / "c", num_llava=30, num_chat=0, bad=False)
    source = (corpus.settings.source[0],)
    for photo in (corpus.folder / "photos").iterdir():
        photo.write_bytes(b"not a picture")
    lines = json.loads((corpus.folder / "llava.json").read_text())
    (corpus.folder / "llava.json").write_text(json.dumps([line for line in lines if "image" in line]))
    with pytest.raises(UserError, match=r"none of the 20 records.*image_format.*20"):
        corpus.build(tmp_path / "data", options=INLINE, source=source)


# --- --max-rejects, --dedup, --duplicate-ids, --shard-bytes -----------------------------------------------


@pytest.mark.parametrize(("limit", "stops"), [(0.05, True), (0.07, False), (5, True), (6, False), (0, True)])
def test_max_rejects_stops_and_a_higher_limit_goes_on(corpus, built, tmp_path, limit, stops):
    out, _ = built
    options = replace(INLINE, max_rejects=limit)
    if stops:
        with pytest.raises(UserError, match=r"refused, more than --max-rejects.*\n.*llava.json, item 7"):
            corpus.build(tmp_path / "data", options=options)
        corpus.build(tmp_path / "data", options=replace(INLINE, max_rejects=0.5))
    else:
        corpus.build(tmp_path / "data", options=options)
    assert digests(tmp_path / "data") == digests(out)


def test_dedup_keeps_the_first_of_equal_samples(tmp_path):
    corpus = write_corpus(tmp_path / "c", num_llava=20, num_chat=20, bad=False)
    with open(corpus.folder / "chat.jsonl", "a") as file:
        for number in (3, 4, 3):  # other ids, same text
            file.write(json.dumps(chat_record(number) | {"id": f"copy-{number}"}) + "\n")
    (corpus.folder / "photos" / "again.jpg").write_bytes((corpus.folder / "photos" / "1.jpg").read_bytes())
    llava = json.loads((corpus.folder / "llava.json").read_text())
    llava.append(llava[1] | {"id": "same-bytes", "image": ["again.jpg"]})
    llava.append(llava[1] | {"id": "other-bytes", "image": ["2.jpg"]})
    (corpus.folder / "llava.json").write_text(json.dumps(llava))
    for options in (INLINE, RunOptions(workers=2, quiet=True)):
        out = tmp_path / options.executor
        report = corpus.build(out, options=options, dedup="exact", samples_per_shard=4)
        assert report.rejects == {"duplicate_sample": 4} and report.num_records == 45
        dataset = Dataset(out)
        ids = set(dataset.index["id"].to_pylist())
        assert {"chat-3", "chat-4", "llava-1", "other-bytes"} <= ids
        assert not ids & {"copy-3", "copy-4", "same-bytes"}
        assert {row["id"] for row in dataset.rejects.to_pylist()} == {"copy-3", "copy-4", "same-bytes"}
        assert [dataset[i].key for i in range(len(dataset))] == dataset.index["key"].to_pylist()
    assert digests(tmp_path / "inline") == digests(tmp_path / "local")
    assert corpus.build(tmp_path / "off", options=INLINE).num_rejects == 0, "off unless asked for"


def test_a_shard_that_is_all_repeats_is_left_out(tmp_path):
    corpus = write_corpus(tmp_path / "c", num_llava=0, num_chat=4, bad=False)
    source = corpus.folder / "chat.jsonl"
    source.write_text(source.read_text() * 2)
    settings = {"source": (str(source),), "samples_per_shard": 4, "split": {}, "dedup": "exact"}
    report = corpus.build(tmp_path / "out", options=INLINE, **settings)
    assert (report.num_shards, report.num_samples, report.num_rejects) == (1, 4, 4)
    assert sorted(path.name for path in (tmp_path / "out" / "shards").iterdir()) == [
        "train-00000.tar",
        "train-00000.tar.idx",
    ]


def test_duplicate_ids_are_kept_unless_rejected(tmp_path):
    corpus = write_corpus(tmp_path / "c", num_llava=10, num_chat=10, bad=False)
    lines = [json.dumps(chat_record(number) | {"id": number % 7}) for number in range(10)]
    (corpus.folder / "chat.jsonl").write_text("\n".join(lines))
    kept = corpus.build(tmp_path / "keep", options=INLINE)
    assert kept.num_samples == 20
    report = corpus.build(tmp_path / "reject", options=INLINE, duplicate_ids="reject")
    assert report.rejects == {"duplicate_id": 3} and report.num_samples == 17
    assert [r["locator"] for r in Dataset(tmp_path / "reject").rejects.to_pylist()] == [
        "line 8",
        "line 9",
        "line 10",
    ]


def test_shard_bytes_is_a_target(corpus, tmp_path):
    for size in (20_000, 60_000):
        settings = {
            "samples_per_shard": None,
            "shard_bytes": size,
            "split": {},
            "source": corpus.settings.source[:1],
        }
        corpus.build(tmp_path / str(size), options=INLINE, **settings)
        shards = Dataset(tmp_path / str(size)).manifest.shards
        assert len(shards) > 1
        for shard in shards[:-1]:
            assert 0.4 * size < shard.num_bytes < 1.6 * size + 10_240
    corpus.build(tmp_path / "auto", options=INLINE, samples_per_shard=None)
    assert len(Dataset(tmp_path / "auto").manifest.shards) == 2, "a small corpus: one shard a split"


# --- worker death -----------------------------------------------------------------------------------------


def test_a_record_that_kills_its_worker_is_named(small, tmp_path, monkeypatch):
    from functools import partial

    from omnidata.builder import driver as module

    corpus, want = small
    monkeypatch.setattr(module, "work", partial(_poisoned, poison="llava-4"))
    with pytest.raises(UserError, match=r"train-00000.tar died \(killed by SIGKILL\).*llava.json, item 4"):
        corpus.build(tmp_path / "data", options=RunOptions(workers=2, quiet=True))
    monkeypatch.undo()
    corpus.build(tmp_path / "data", options=INLINE)
    assert digests(tmp_path / "data") == want


def _poisoned(job, task, report, *, poison):
    """The build's work, in which decoding the images of one record kills the process, as a bad codec does."""
    from omnidata.builder import stages, worker

    original = stages.Stages._finish

    def finish(self, position, record, *others):
        if record.id == poison:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, position, record, *others)

    stages.Stages._finish = finish
    return worker.work(job, task, report)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_becomes_a_clear_message(small, tmp_path, monkeypatch, number):
    corpus, want = small

    def interrupt(name, path):
        if path.endswith("train-00001.tar") and name == "sync":
            signal.raise_signal(number)

    monkeypatch.setattr(durable, "on_step", interrupt)
    with pytest.raises(BuildInterrupted, match="same command again"):
        corpus.build(tmp_path / "data", options=INLINE)
    monkeypatch.undo()
    assert corpus.build(tmp_path / "data", options=INLINE).shards_built == 2, "of 3"
    assert digests(tmp_path / "data") == want
