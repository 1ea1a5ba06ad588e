"""The builder: the same bytes whatever happens, every record accounted for, nothing half-written."""

import json
import os
from dataclasses import replace

import pytest
from tiny_corpus import BAD, chat_record, digests, write_corpus

from omnidata import durable
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
