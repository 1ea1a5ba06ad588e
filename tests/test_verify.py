"""verify and repair: a sound dataset passes, and each kind of damage is found, named and placed."""

import dataclasses
import io
import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
from tiny_dataset import make_jpeg

from omnidata import cli
from omnidata.durable import Store
from omnidata.index import index_schema, read_table, write_tables
from omnidata.manifest import manifest_from_json, manifest_to_json
from omnidata.schema import IGNORE_INDEX, INDEX, MANIFEST, REJECTS, UserError
from omnidata.shards import read_sample, write_shard
from omnidata.verify.findings import CODES
from omnidata.verify.repair import repair
from omnidata.verify.run import read_or_none, verify
from omnidata.verify.shard import ShardCheck, ShardChecker, check_ids
from omnidata.verify.shard_walk import Damage, ShardWalk
from omnidata.verify.tables import check_index

FIRST = "shards/train-00000.tar"


@pytest.fixture
def data(tiny_dataset, tmp_path):
    """A copy to damage."""
    return shutil.copytree(tiny_dataset, tmp_path / "data")


def rows(data):
    with (data / INDEX).open("rb") as file:
        return read_table(file, index_schema()).to_pylist()


def put_rows(data, changed):
    table = pa.Table.from_pylist(changed, schema=index_schema())
    shards = dict.fromkeys(row["shard"] for row in changed)
    tables = [
        pa.Table.from_pylist([r for r in changed if r["shard"] == s], schema=table.schema) for s in shards
    ]
    with (data / INDEX).open("wb") as file:
        write_tables(file, index_schema(), tables)


def put_manifest(data, **changes):
    manifest = manifest_from_json((data / MANIFEST).read_bytes(), where="m")
    (data / MANIFEST).write_bytes(manifest_to_json(dataclasses.replace(manifest, **changes)))


def manifest_of(data):
    return manifest_from_json((data / MANIFEST).read_bytes(), where="m")


def codes(data, *, deep=True):
    return {finding.code for finding in verify(data, deep=deep, num_workers=1).findings}


def flip(path, offset):
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 0x01
    path.write_bytes(raw)


def sample_of(data, row):
    raw = (data / row["shard"]).read_bytes()
    return read_sample(raw[row["offset"] : row["offset"] + row["nbytes"]])


def rewrite(data, change):
    """Write the first shard again with ``change(samples)`` applied, the index and manifest left alone."""
    mine = [row for row in rows(data) if row["shard"] == FIRST]
    samples = [sample_of(data, row) for row in mine]
    with (data / FIRST).open("wb") as file:
        write_shard(file, change(samples))


# --- sound ------------------------------------------------------------------------------------------------


def test_a_sound_dataset_passes_with_processes_too(tiny_dataset):
    report = verify(tiny_dataset, deep=True, num_workers=2)
    assert report.ok and report.findings == () and report.num_samples == 24


def test_a_built_dataset_in_memory_passes_over_fsspec(tiny_dataset):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(tiny_dataset), "/verify-me", recursive=True)
    assert verify("memory://verify-me", deep=True).ok
    memory.rm("/verify-me", recursive=True)


def test_without_a_manifest_there_is_nothing_to_verify(data):
    (data / MANIFEST).unlink()
    with pytest.raises(UserError, match="no complete dataset"):
        verify(data)


# --- quick ------------------------------------------------------------------------------------------------

QUICK = {
    "a lost shard": ("file_missing", lambda d: (d / FIRST).unlink()),
    "a cut shard": ("file_size", lambda d: (d / FIRST).write_bytes((d / FIRST).read_bytes()[:-512])),
    "a stranger's shard": ("file_extra", lambda d: shutil.copy(d / FIRST, d / "shards/train-00009.tar")),
    "a lost card": ("file_missing", lambda d: (d / "README.md").unlink()),
    "a lost index": ("index_unreadable", lambda d: (d / INDEX).unlink()),
    "a cut index": ("index_unreadable", lambda d: (d / INDEX).write_bytes((d / INDEX).read_bytes()[:900])),
    "lost rejects": ("rejects", lambda d: (d / REJECTS).unlink()),
    "other rejects": ("rejects", lambda d: put_manifest(d, rejects={"bad_json": 3})),
    "a lost idx": ("file_missing", lambda d: (d / f"{FIRST}.idx").unlink()),
    "a flipped idx": ("idx", lambda d: flip(d / f"{FIRST}.idx", 9)),
    "a lost split.yaml": ("nv_meta", lambda d: (d / ".nv-meta/split.yaml").unlink()),
    "a changed info": ("nv_meta", lambda d: (d / ".nv-meta/.info.json").write_text("{}")),
    "records that do not add up": ("manifest", lambda d: put_manifest(d, num_records=28)),
    "other totals": ("totals", lambda d: put_manifest(d, num_supervised=1)),
    "other splits": ("totals", lambda d: put_manifest(d, splits={"train": 24})),
    "another template": ("tokenizer", lambda d: (d / "tokenizer/chat_template.jinja").write_text("x")),
    "an input without a source": ("manifest", lambda d: put_manifest(d, inputs=[{"num_records": 27}])),
    "no image tokens": ("manifest", lambda d: put_manifest(d, special_tokens={"bos": 1})),
    "a negative offset": ("index", lambda d: put_rows(d, [r | {"offset": -512} for r in rows(d)])),
    "a lost tokenizer": ("tokenizer", lambda d: shutil.rmtree(d / "tokenizer")),
    "a dropped row": ("totals", lambda d: put_rows(d, rows(d)[:3] + rows(d)[4:])),
    "a repeated key": ("duplicate_key", lambda d: put_rows(d, [r | {"key": "same"} for r in rows(d)])),
    "a bad key": ("index", lambda d: put_rows(d, [rows(d)[0] | {"key": "a.b"}, *rows(d)[1:]])),
    "a moved offset": (
        "index",
        lambda d: put_rows(d, [*rows(d)[:1], rows(d)[1] | {"offset": 512}, *rows(d)[2:]]),
    ),
    "no supervision": ("index", lambda d: put_rows(d, [rows(d)[0] | {"n_supervised": 0}, *rows(d)[1:]])),
    "image sizes missing": ("index", lambda d: put_rows(d, [r | {"image_sizes": []} for r in rows(d)])),
    "another source": ("totals", lambda d: put_rows(d, [r | {"source": "photos.json"} for r in rows(d)])),
    "rows in another order": ("index", lambda d: put_rows(d, rows(d)[8:] + rows(d)[:8])),
}


@pytest.mark.parametrize("name", QUICK)
def test_the_quick_check_finds(name, data):
    code, damage = QUICK[name]
    damage(data)
    assert code in codes(data, deep=False)


@pytest.mark.parametrize("name", [INDEX, REJECTS])
def test_a_flipped_bit_of_a_table_never_passes_as_other_data(name, data):
    """Either it is found, or it lay in metadata that nothing reads and the table is what it was."""
    raw, store = (data / name).read_bytes(), Store(data)
    good = read_or_none(store, name)
    outcomes = set()
    for offset in range(0, len(raw), len(raw) // 120):
        flip(data / name, offset)
        table = read_or_none(store, name)
        same = table is not None and table.equals(good)
        findings = (
            list(check_index(table, manifest_of(data))) if table is not None and name == INDEX else [table]
        )
        assert same or table is None or findings, f"flip at byte {offset}"
        outcomes.add(same)
        (data / name).write_bytes(raw)
    assert outcomes == {True, False}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("sha256", "sha257"),
        ("num_tokens", "num_tokenz"),
        ('"schema_version": 2', '"schema_version": 9'),
        ("{", "("),
    ],
)
def test_a_damaged_manifest_is_one_clear_line(before, after, data):
    text = (data / MANIFEST).read_text()
    (data / MANIFEST).write_text(text.replace(before, after))
    with pytest.raises(UserError, match=MANIFEST):
        verify(data)


# --- deep -------------------------------------------------------------------------------------------------


def other_label(samples):
    labels = samples[2].labels.copy()
    labels[np.flatnonzero(labels != IGNORE_INDEX)[0]] += 1
    samples[2] = dataclasses.replace(samples[2], labels=labels)
    return samples


def swap_images(samples):
    first, second = samples[1], samples[4]
    samples[1], samples[4] = (
        dataclasses.replace(first, images=second.images),
        dataclasses.replace(second, images=first.images),
    )
    return samples


DEEP = {
    "a flipped byte of an image": ({"sha256"}, lambda d: flip(d / FIRST, rows(d)[1]["offset"] + 2000)),
    "a flipped byte of padding": ({"sha256"}, lambda d: flip(d / FIRST, rows(d)[1]["offset"] - 1)),
    "a flipped byte of a header": (
        {"sha256", "damaged"},
        lambda d: flip(d / FIRST, rows(d)[2]["offset"] + 3),
    ),
    "a cut tar": (
        {"file_size", "damaged", "sample_missing"},
        lambda d: cut(d / FIRST, rows(d)[3]["offset"] + 700),
    ),
    "a tar cut between samples": (
        {"damaged", "sample_missing"},
        lambda d: cut(d / FIRST, rows(d)[3]["offset"]),
    ),
    "an appended byte": ({"file_size", "damaged"}, lambda d: append(d / FIRST, b"x")),
    "a changed label": ({"sha256", "labels", "index"}, lambda d: rewrite(d, other_label)),
    "swapped images": ({"sha256", "index"}, lambda d: rewrite(d, swap_images)),
    "swapped samples": ({"index"}, lambda d: rewrite(d, lambda s: [s[1], s[0], *s[2:]])),
    "a sample twice": ({"not_in_index"}, lambda d: rewrite(d, lambda s: [s[0], *s])),
    "a sample gone": ({"sample_missing"}, lambda d: rewrite(d, lambda s: s[1:])),
}


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def append(path, more):
    path.write_bytes(path.read_bytes() + more)


@pytest.mark.parametrize("name", DEEP)
def test_the_deep_check_finds(name, data):
    expected, damage = DEEP[name]
    damage(data)
    assert expected <= codes(data)


def test_every_flipped_bit_of_a_shard_is_found(data):
    """The checksum alone would do; the point is that no flip makes the walk raise or pass."""
    raw = (data / FIRST).read_bytes()
    manifest = manifest_of(data)
    task = ShardCheck(manifest.shards[0], [row for row in rows(data) if row["shard"] == FIRST])
    for offset in range(0, len(raw), len(raw) // 150):
        flip(data / FIRST, offset)
        assert ShardChecker(str(data), manifest)(task, None), f"flip at {offset}"
        (data / FIRST).write_bytes(raw)


def test_findings_say_where_and_nothing_else_is_blamed(data):
    offset = rows(data)[2]["offset"]
    flip(data / FIRST, offset + 3)
    report = verify(data, deep=True, num_workers=1)
    wheres = {finding.where for finding in report.findings}
    assert wheres == {FIRST, f"{FIRST}, byte {offset}", f"{FIRST}, sample sample-000002"}


def checked(data, sample):
    """Findings of one sample that no checksum would catch, since it was built so."""
    checker = ShardChecker("", manifest_of(data))
    file = io.BytesIO()
    write_shard(file, [sample])
    (span,) = ShardWalk(io.BytesIO(file.getvalue()))
    return {finding.code: finding.what for finding in checker.check_sample("here", span, None)}


def test_a_wrongly_built_sample_is_found(data):
    good = sample_of(data, rows(data)[4])  # one image
    start, patch = (manifest_of(data).special_tokens[name] for name in ("<im_start>", "<im_patch>"))

    def changed(**arrays):
        return checked(data, dataclasses.replace(good, **arrays))

    assert checked(data, good) == {}
    at = int(np.flatnonzero(good.input_ids == start)[0])
    ids = good.input_ids.copy()
    ids[0] = 355  # one past the end of the vocabulary
    assert "vocabulary" in changed(input_ids=ids)
    uneven = dataclasses.replace(good, labels=good.labels[:-1])
    assert [code for code, _ in check_ids(uneven, manifest_of(data))] == ["labels"]
    assert "no supervised token" in changed(labels=np.full_like(good.labels, IGNORE_INDEX))["labels"]
    labels = good.labels.copy()
    labels[at + 1] = patch
    assert "supervised" in changed(labels=labels)["image_block"]
    ids = good.input_ids.copy()
    ids[at + 2] = ids[0]
    assert "broken at token" in changed(input_ids=ids)["image_block"]
    assert "image" in changed(images=(good.images[0][:300],))
    two = (good.images[0], make_jpeg(1, 8, 8))
    assert (
        "1 image blocks but 2 images" in changed(images=two, image_extensions=("jpg", "jpg"))["image_block"]
    )
    # a block that the end of the sample cuts short
    cut_ids, cut_labels = good.input_ids[: at + 3], good.labels[: at + 3]
    assert "broken" in changed(input_ids=cut_ids, labels=cut_labels)["image_block"]


def test_the_hash_of_the_index_is_compared(data):
    changed = rows(data)
    changed[5]["content_hash"] = "0" * 32
    put_rows(data, changed)
    (finding,) = verify(data, deep=True, num_workers=1).findings
    assert finding.code == "index" and "content_hash" in finding.what and "sample-000005" in finding.where


def test_the_walk_stops_at_damage_without_known_starts_but_hashes_all(data):
    raw = (data / FIRST).read_bytes()
    broken = bytearray(raw)
    broken[rows(data)[2]["offset"]] = 0xFF
    walk = ShardWalk(io.BytesIO(bytes(broken)))
    found = list(walk)
    assert isinstance(found[-1], Damage) and walk.num_bytes == len(raw)


# --- repair -----------------------------------------------------------------------------------------------

REPAIRS = {
    "a dropped row": lambda d: put_rows(d, rows(d)[:3] + rows(d)[4:]),
    "wrong offsets": lambda d: put_rows(d, [row | {"offset": 0} for row in rows(d)]),
    "wrong counts": lambda d: put_rows(d, [row | {"n_tokens": 1} for row in rows(d)]),
    "a lost idx": lambda d: (d / f"{FIRST}.idx").unlink(),
    "a damaged idx": lambda d: flip(d / f"{FIRST}.idx", 0),
    "lost Energon files": lambda d: shutil.rmtree(d / ".nv-meta"),
    "a lost card": lambda d: (d / "README.md").unlink(),
}


@pytest.mark.parametrize("name", REPAIRS)
def test_repair_gives_back(name, data):
    before = rows(data)
    REPAIRS[name](data)
    assert codes(data, deep=False)
    report = repair(data, num_workers=1)
    assert report.rebuilt
    assert codes(data) == set()
    after = rows(data)
    dropped = [row for row in before if row["id"] not in {r["id"] for r in after}]
    assert [{**row, "id": 0, "source": 0, "locator": 0} for row in after] == [
        {**row, "id": 0, "source": 0, "locator": 0} for row in before
    ]
    assert len(dropped) == (name == "a dropped row")  # its id was only there
    assert bool(report.lost) == (name == "a dropped row")
    assert not (data / ".build").exists()


def test_a_lost_index_comes_back_without_provenance_and_that_is_said(data):
    before = rows(data)
    (data / INDEX).unlink()
    report = repair(data, num_workers=2)
    assert report.rebuilt == [INDEX] and "24 samples" in report.lost[0]
    proven = [{k: v for k, v in row.items() if k not in ("id", "source", "locator")} for row in before]
    assert [
        {k: v for k, v in row.items() if k not in ("id", "source", "locator")} for row in rows(data)
    ] == proven
    assert codes(data) == set()


def test_repair_says_what_it_cannot_do(data):
    flip(data / FIRST, 600)
    (data / REJECTS).unlink()
    index = (data / INDEX).read_bytes()
    report = repair(data, num_workers=1)
    assert report.rebuilt == [] and (data / INDEX).read_bytes() == index
    assert FIRST in report.lost[0] and REJECTS in report.lost[1]
    (data / INDEX).unlink()
    assert any("stays as it is" in sentence for sentence in repair(data, num_workers=1).lost)
    assert not (data / INDEX).exists()


# --- command line -----------------------------------------------------------------------------------------


def test_the_command_lists_every_finding_and_exits_1(data, capsys):
    assert cli.run(["verify", str(data)]) == 0
    assert "is intact: 24 samples" in capsys.readouterr().out
    (data / FIRST).unlink()
    flip(data / f"{FIRST}.idx", 0)
    assert cli.run(["verify", str(data)]) == 1
    out = capsys.readouterr().out
    assert f"file_missing: {FIRST}: 8 samples" in out and f"idx: {FIRST}.idx:" in out and "2 findings" in out


def test_the_json_of_the_command(data, capsys):
    (data / INDEX).unlink()
    assert cli.run(["verify", str(data), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"dataset", "deep", "num_shards", "num_samples", "num_bytes", "findings", "ok"}
    assert report["ok"] is False and {f["code"] for f in report["findings"]} <= CODES.keys()
    assert cli.run(["verify", str(data), "--repair", "--json", "--workers", "1"]) == 1
    repaired = json.loads(capsys.readouterr().out)
    assert repaired["ok"] and repaired["repair"]["rebuilt"] == [INDEX] and repaired["repair"]["lost"]
