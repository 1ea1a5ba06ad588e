"""merge and subset: what goes in comes out, byte for byte, once, and the manifest says where it is from."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_corpus import write_corpus
from tiny_dataset import build_tiny_dataset

from omnidata import Dataset
from omnidata.builder.settings import RunOptions
from omnidata.cli import run
from omnidata.copier.layout import cuts
from omnidata.copier.run import copy
from omnidata.copier.settings import CopySettings
from omnidata.loader.loader import PackLoader
from omnidata.manifest import manifest_from_json, manifest_to_json
from omnidata.origin import content_digest
from omnidata.schema import MANIFEST, UserError
from omnidata.shards import iter_members
from omnidata.verify.run import verify

INLINE = RunOptions(executor="inline", quiet=True)
PLACE = ("id", "source", "locator")
ONLY_HERE = ("key", "shard", "offset")  # what the copy's index says of a sample's new place


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two datasets of one tokenizer that share keys: 40 and 30 samples, train and val."""
    return build_pair(tmp_path_factory.mktemp("pair"))


def build_pair(folder):
    return tuple(
        build_tiny_dataset(folder / name, num_samples=count, samples_per_shard=9)
        for name, count in (("a", 40), ("b", 30))
    )


def merge(*paths, out, **more):
    return copy(CopySettings("merge", tuple(map(str, paths)), **more), str(out), INLINE)


def subset(path, *, out, options=INLINE, **more):
    return copy(CopySettings("subset", (str(path),), **more), str(out), options)


def members(path):
    """Key -> [(suffix, bytes)] of every sample as it stands in the shards, and its index row."""
    dataset, found = Dataset(path), {}
    for row in dataset.index.to_pylist():
        raw = dataset.read_range(row["shard"], row["offset"], row["nbytes"])
        parts = [(*name.partition(".")[::2], raw[at : at + size]) for name, at, size in iter_members(raw)]
        assert {key for key, _, _ in parts} == {row["key"]}
        content = [(suffix, data) for _, suffix, data in parts]
        found[row["key"]] = content, {name: row[name] for name in row if name not in ONLY_HERE}
    return found


def changed(path, **values):
    """Rewrite the manifest with these values."""
    manifest = manifest_from_json((path / MANIFEST).read_bytes(), where="m")
    (path / MANIFEST).write_bytes(manifest_to_json(replace(manifest, **values)))


def codes(path, **options):
    return {finding.code for finding in verify(path, num_workers=1, **options).findings}


# --- what comes out ---------------------------------------------------------------------------------------


def test_a_merge_holds_every_sample_of_both_and_says_where_it_is_from(pair, tmp_path):
    report = merge(*pair, out=tmp_path / "c", samples_per_shard=20)
    want = {f"{n}-{key}": value for n, path in enumerate(pair) for key, value in members(path).items()}
    assert members(tmp_path / "c") == want and len(want) == report.num_samples == 70
    dataset, inputs = Dataset(tmp_path / "c"), [Dataset(path) for path in pair]
    manifest = dataset.manifest
    assert manifest.num_records == 76 == manifest.num_samples + manifest.num_rejects
    assert manifest.splits == {"train": 54, "val": 16} and list(manifest.splits) == ["train", "val"]
    assert [shard.num_samples for shard in manifest.shards] == [20, 20, 14, 16]
    assert dataset.rejects.num_rows == 6
    assert [entry["path"] for entry in manifest.origin["inputs"]] == list(map(str, pair))
    for entry, source in zip(
        manifest.origin["inputs"], inputs, strict=True
    ):  # anybody who has it can prove it
        assert entry["content"] == content_digest([source.index["content_hash"]])
        assert entry["taken"] == source.manifest.splits
    assert codes(tmp_path / "c", deep=True) == set()


def test_a_subset_holds_what_where_finds_and_accounts_for_the_rest(pair, tmp_path):
    where = 'n_images<=1 and split=="train"'
    report = subset(pair[0], out=tmp_path / "b", where=where)
    chosen = Dataset(pair[0], where=where)
    everything = members(pair[0])
    keys = chosen.index["key"].to_pylist()
    assert members(tmp_path / "b") == {key: everything[key] for key in keys} and 0 < len(keys) < 40
    dataset = Dataset(tmp_path / "b")
    rejects = dataset.rejects.to_pylist()
    left_out = [row for row in rejects if row["reason"] == "left_out"]
    assert len(left_out) == report.num_left_out == 40 - len(keys) == dataset.manifest.rejects["left_out"]
    assert dataset.manifest.num_records == 43 == len(keys) + len(rejects)
    others = {row["key"]: row for row in Dataset(pair[0]).index.to_pylist() if row["key"] not in keys}
    for row in left_out:
        other = others.pop(row["detail"].split()[1])
        assert [row[name] for name in PLACE] == [other[name] for name in PLACE]
        assert row["detail"].endswith(' does not meet --where n_images <= 1 and split == "train"')
    assert not others and codes(tmp_path / "b", deep=True) == set()


def test_parts_of_one_dataset_keep_their_keys_and_bytes_when_they_are_merged(pair, tmp_path):
    for name, where in (("few", "n_images == 0"), ("many", "n_images > 0")):
        subset(pair[0], out=tmp_path / name, where=where)
    report = merge(tmp_path / "few", tmp_path / "many", out=tmp_path / "all")
    assert members(tmp_path / "all") == members(pair[0])
    assert {each["key_prefix"] for each in report.inputs} == {""}
    assert codes(tmp_path / "all", deep=True) == set()


def test_training_reads_the_same_samples(pair, tmp_path):
    def batches(path, **entry):
        loader = PackLoader(
            [{"path": str(path), **entry}],
            global_batch=4,
            max_tokens=450,
            image_size=24,
            num_epochs=1,
            tail="pad",
        )
        found = {}
        for microbatch in loader:
            edges = microbatch.cu_seqlens.tolist()
            for key, start, stop in zip(microbatch.keys, edges, edges[1:], strict=False):
                found[key] = (
                    microbatch.input_ids[start:stop].tolist(),
                    microbatch.labels[start:stop].tolist(),
                )
        return found

    where = "n_tokens < 100"
    subset(pair[0], out=tmp_path / "short", where=where)
    merge(*pair, out=tmp_path / "all")
    a, b = (batches(path) for path in pair)
    assert batches(tmp_path / "short") == batches(pair[0], where=where)
    assert batches(tmp_path / "all") == {
        f"{n}-{key}": sample for n, each in enumerate((a, b)) for key, sample in each.items()
    }


def test_two_builds_merged_are_one_build_of_both(tmp_path):
    corpus = write_corpus(tmp_path / "c", num_llava=30, num_chat=12, bad=False)
    records = json.loads((corpus.folder / "llava.json").read_text())
    for number, record in enumerate(records):
        record |= {"score": number if number % 2 else number + 0.5, "mark": number % 3 == 0}
    (corpus.folder / "llava.json").write_text(json.dumps(records))
    chat = [json.loads(line) for line in (corpus.folder / "chat.jsonl").read_text().splitlines()]
    for number, record in enumerate(chat):
        record |= {"score": number, "mark": f"m{number}", "lang": "en"} if number else {"messages": []}
    (corpus.folder / "chat.jsonl").write_text("\n".join(map(json.dumps, chat)))
    llava, text = corpus.settings.source
    names = ("score", "mark", "lang")
    for out, sources, columns in (
        ("a", (llava,), names[:2]),
        ("b", (text,), names),
        ("ab", (llava, text), names),
    ):
        corpus.build(tmp_path / out, options=INLINE, source=sources, keep_column=columns)
    report = merge(tmp_path / "a", tmp_path / "b", out=tmp_path / "merged", samples_per_shard=15)
    one, other = (Dataset(tmp_path / name) for name in ("ab", "merged"))
    assert one.index.drop_columns(ONLY_HERE).equals(other.index.drop_columns(ONLY_HERE))
    assert one.rejects.equals(other.rejects)
    facts = [
        {
            name: getattr(each.manifest, name)
            for name in each.manifest.__slots__
            if name not in ("shards", "origin")
        }
        for each in (one, other)
    ]
    for each in facts:
        each["settings"] = {
            name: each["settings"][name] for name in each["settings"] if name != "keep_column"
        }
    assert facts[0] == facts[1]
    assert report.columns == [
        "'lang' has no value in samples of datasets that did not keep it",
        f"'mark' is string here, and was bool in {tmp_path / 'a'}",
        f"'score' is double here, and was int64 in {tmp_path / 'b'}",
    ]
    assert codes(tmp_path / "merged", deep=True) == set()


def test_samples_of_builds_of_other_lengths_render_again_to_what_they_were(tmp_path):
    corpus = write_corpus(tmp_path / "c", num_llava=0, num_chat=4, bad=False)
    turn = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A red square."}]
    long = json.dumps({"id": "long", "messages": turn * 4})
    (corpus.folder / "chat.jsonl").write_text(f"{long}\n{long}\n")
    for length in (60, 2048):
        source = (str(corpus.folder / "chat.jsonl"),)
        corpus.build(tmp_path / str(length), options=INLINE, source=source, max_length=length)
    merge(tmp_path / "60", tmp_path / "2048", out=tmp_path / "all")
    assert len(set(Dataset(tmp_path / "all").index["n_tokens"].to_pylist())) == 2
    assert Dataset(tmp_path / "all").manifest.settings["max_length"] == 2048
    assert codes(tmp_path / "all", deep=True) == set()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 100), st.integers(1, 9))
def test_shards_hold_every_sample_once_and_no_more_than_they_may(sizes, room, most):
    spans = list(cuts(np.array(sizes, np.int64), room, most))
    assert [at for start, stop in spans for at in range(start, stop)] == list(range(len(sizes)))
    for start, stop in spans:
        assert stop - start <= most and (sum(sizes[start:stop]) <= room or stop - start == 1)


def test_other_file_systems(pair, tmp_path):
    import fsspec

    fsspec.filesystem("memory").put(str(pair[0]), "/from", recursive=True)
    merge("memory://from", pair[1], out="memory://to", samples_per_shard=20)
    merge(*pair, out=tmp_path / "c", samples_per_shard=20)
    assert members("memory://to") == members(tmp_path / "c") and codes("memory://to", deep=True) == set()


# --- what is refused --------------------------------------------------------------------------------------


def test_datasets_that_do_not_fit_are_refused_with_everything_that_differs(pair, tmp_path):
    other = shutil.copytree(pair[1], tmp_path / "other")
    changed(
        other,
        tokenizer_fingerprint="x",
        end_of_turn=[7],
        profile={"name": "omnilmm", "num_query": 16, "image_size": 32},
        settings={"max_slices": 9, "slice_size": 32, "slice_tokens": ["<slice>", "</slice>"]},
    )
    with pytest.raises(UserError) as refused:
        merge(*pair, other, out=tmp_path / "c")
    message = str(refused.value)
    for what in ("tokenizer_fingerprint", "end_of_turn", "num_query", "--max-slices"):
        assert f"other: {what}" in message or what in message
    assert message.count(str(other)) == 4 and str(pair[1]) not in message
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["subset", "A", "--out", "C"], "give --where, --exclude or both"),
        (["subset", "A", "--where", "n_images > 99", "--out", "C"], "no sample of A meets n_images > 99"),
        (["subset", "A", "--where", "n_image > 9", "--out", "C"], "did you mean n_images"),
        (["merge", "A", "B", "--out", "A", "--overwrite"], "--out A is a dataset that is copied from"),
        (["merge", "A", "nowhere", "--out", "C"], "nowhere is not a complete dataset"),
        (["merge", "A", "--out", "B"], "B already holds a complete dataset"),
        (["merge", "A", "--shard-bytes", "9MB", "--samples-per-shard", "3", "--out", "C"], "give one"),
        (["subset", "A", "--exclude", "keys.txt", "--out", "C"], "1 keys of --exclude keys.txt are not in A"),
    ],
)
def test_mistakes_are_one_clear_line(pair, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name, path in zip("AB", pair, strict=True):
        (tmp_path / name).symlink_to(path)
    (tmp_path / "keys.txt").write_text("sample-000001\nnobody\n")
    assert run(arguments) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "C").exists()


def test_damage_is_not_copied(pair, tmp_path):
    own = shutil.copytree(pair[0], tmp_path / "own")
    row = Dataset(own).row(12)
    raw = bytearray((own / row["shard"]).read_bytes())
    raw[row["offset"] + 512 + 128] ^= 1  # an id
    (own / row["shard"]).write_bytes(raw)
    with pytest.raises(UserError, match=f"sample {row['key']}: it is not what its hashes say"):
        subset(own, out=tmp_path / "c", where="n_tokens > 0")
    assert not (tmp_path / "c" / MANIFEST).exists()
    (tmp_path / "bad.txt").write_text(f"{row['key']}  # damaged\n")
    report = subset(own, out=tmp_path / "d", exclude=str(tmp_path / "bad.txt"))
    assert report.num_left_out == 1 and codes(tmp_path / "d", deep=True) == set()
    assert Dataset(tmp_path / "d").rejects.to_pylist()[-1]["detail"].endswith("bad.txt")


def test_verify_sees_a_copy_that_does_not_hold_what_it_says(pair, tmp_path):
    merge(*pair, out=tmp_path / "c")
    manifest, origin = Dataset(tmp_path / "c").manifest, Dataset(tmp_path / "c").manifest.origin
    first, second = origin["inputs"]

    def found(one, other):
        changed(tmp_path / "c", origin=origin | {"inputs": [one, other]})
        return codes(tmp_path / "c")

    assert found(first, second) == set()
    assert found(first | {"content": second["content"]}, second) == {"origin"}
    assert found(first | {"taken": {"train": 31, "val": 9}}, second) == {"origin"}
    assert found(first | {"num_samples": 41}, second) == {"origin"}
    assert found(first | {"rejects": {}}, second) == {"origin"}
    assert found(first | {"num_records": 44}, second) == {"origin"}
    assert found(first, second | {"key_prefix": "2-"}) == {"origin"}
    sound = (tmp_path / "c" / MANIFEST).read_bytes()
    with pytest.raises(UserError, match="does not say what was copied from where"):
        found(first, {})
    (tmp_path / "c" / MANIFEST).write_bytes(sound)
    changed(tmp_path / "c", origin=origin)
    shard = tmp_path / "c" / manifest.shards[0].path
    raw = bytearray(shard.read_bytes())
    raw[700] ^= 1
    shard.write_bytes(raw)
    assert codes(tmp_path / "c") == set() and "sha256" in codes(tmp_path / "c", deep=True)


# --- the commands -----------------------------------------------------------------------------------------


def test_the_commands_report_and_a_dry_run_writes_nothing(pair, tmp_path, capsys):
    arguments = ["merge", *map(str, pair), "--out", str(tmp_path / "c"), "--json", "--quiet"]
    assert run([*arguments, "--dry-run"]) == 0
    foreseen = json.loads(capsys.readouterr().out)
    assert foreseen["dry_run"] and not (tmp_path / "c").exists()
    assert run(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    same = ("num_records", "num_samples", "num_rejects", "splits", "num_shards", "inputs", "columns")
    assert [report[name] for name in same] == [foreseen[name] for name in same]
    assert report["num_bytes"] == sum(shard.num_bytes for shard in Dataset(tmp_path / "c").manifest.shards)
    assert run(["inspect", str(tmp_path / "c"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["origin"] == f"merge of {pair[0]}, {pair[1]}"
    assert f"merge of {pair[0]}" in (tmp_path / "c" / "README.md").read_text()
    assert run([*arguments[:-2], "--overwrite"]) == 0
    assert "40 samples; its keys begin with 0- here" in capsys.readouterr().out
