"""A dataset of somebody else's: damage and malice in it are one clear line, or passed over."""

import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from omnidata import Dataset
from omnidata.durable import Store
from omnidata.loader import PackLoader
from omnidata.locks import locked
from omnidata.plan import EpochPlan
from omnidata.schema import INDEX, MANIFEST, UserError
from omnidata.verify.repair import repair
from omnidata.verify.run import verify

FIRST = "shards/train-00000.tar"


@pytest.fixture
def data(tiny_dataset, tmp_path):
    """A copy to damage."""
    return shutil.copytree(tiny_dataset, tmp_path / "data")


def change_manifest(data, change):
    content = json.loads((data / MANIFEST).read_bytes())
    change(content)
    (data / MANIFEST).write_text(json.dumps(content))


def loader(data, **options):
    options = {"global_batch": 2, "max_tokens": 400, "num_epochs": 1} | options
    return PackLoader(str(data), **options)


# --- the manifest -----------------------------------------------------------------------------------------

VALUES = {
    "a path that leads out": lambda m: m["shards"][0].update(path="shards/../../out.tar"),
    "an absolute path": lambda m: m["shards"][0].update(path="/tmp/out.tar"),
    "another folder": lambda m: m["shards"][0].update(path="tokenizer/x.tar"),
    "the manifest itself": lambda m: m["shards"][0].update(path="manifest.json"),
    "a shard twice": lambda m: m["shards"].append(m["shards"][0]),
    "a null": lambda m: m.update(num_samples=None),
    "a negative count": lambda m: m.update(num_tokens=-1),
    "a huge count": lambda m: m["shards"][0].update(num_bytes=10**30),
    "a true": lambda m: m["profile"].update(num_query=True),
    "a string": lambda m: m["splits"].update(train="8"),
    "no list": lambda m: m.update(shards={}),
    "a shard that is none": lambda m: m["shards"].append(None),
    "nested settings": lambda m: m["settings"].update(x=json.loads("[" * 200 + "]" * 200)),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_of_a_manifest_are_checked(data, name):
    change_manifest(data, VALUES[name])
    for door in (Dataset, verify, repair, EpochPlan):
        with pytest.raises(UserError, match=r"manifest.json.*damaged"):
            door(str(data))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["shards"][0].update(split="traio"),  # its samples would be left out without a word
        lambda m: m["shards"][0].update(split="val"),
        lambda m: m["splits"].update(train=15),
        lambda m: m["special_tokens"].pop("<im_start>"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_not_read(data, change):
    change_manifest(data, change)
    for door in (Dataset, EpochPlan, lambda path: list(loader(path))):
        with pytest.raises(UserError, match=r"manifest.json.*damaged"):
            door(str(data))
    assert not verify(data).ok


def test_a_manifest_nested_without_end_is_one_line(data):
    (data / MANIFEST).write_text("[" * 200_000)
    with pytest.raises(UserError, match="not valid JSON"):
        Dataset(data)


def test_repair_writes_nothing_outside_of_the_dataset(data, tmp_path):
    before = sorted(tmp_path.iterdir())
    change_manifest(data, lambda m: m["shards"][0].update(path="shards/../../planted.tar"))
    with pytest.raises(UserError):
        repair(data)
    assert sorted(tmp_path.iterdir()) == before


def test_repair_waits_for_no_build_and_a_build_for_no_repair(data):
    with locked(Store(str(data)), "build"), pytest.raises(UserError, match="another builder"):
        repair(data)


# --- files that are none ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [FIRST, INDEX, MANIFEST])
def test_a_pipe_in_place_of_a_file_blocks_nobody(data, path):
    (data / path).unlink()
    os.mkfifo(data / path)
    with pytest.raises(UserError, match="not a regular file"):
        for _ in loader(data):
            pass
    with pytest.raises(UserError, match="not a regular file"):
        Dataset(data)[0]
        Dataset(data).index  # noqa: B018
    if path == FIRST:
        assert any("regular" in finding.what for finding in verify(data, deep=True, num_workers=1).findings)


# --- the index --------------------------------------------------------------------------------------------


def put_index(data, change):
    table = pq.read_table(data / INDEX)
    groups = pq.ParquetFile(data / INDEX).metadata
    sizes = [groups.row_group(i).num_rows for i in range(groups.num_row_groups)]
    table = change(table)
    with pq.ParquetWriter(data / INDEX, table.schema) as writer:
        for size in sizes:
            writer.write_table(table.slice(0, size))
            table = table.slice(size)


def with_column(name, values):
    def change(table):
        return table.set_column(table.schema.names.index(name), name, values(table))

    return change


INDEXES = {
    "no tokens": with_column("n_tokens", lambda t: pa.array([0] * len(t), pa.int32())),
    "negative images": with_column("n_images", lambda t: pa.array([-1] * len(t), pa.int32())),
    "more supervised than tokens": with_column(
        "n_supervised", lambda t: pa.array([10**6] * len(t), pa.int32())
    ),
    "nulls": with_column("n_tokens", lambda t: pa.array([None] * len(t), pa.int32())),
    "text": with_column("n_tokens", lambda t: pa.array(["9"] * len(t))),
    "an offset behind the shard": with_column("offset", lambda t: pa.array([2**40] * len(t), pa.int64())),
    "a negative offset": with_column("offset", lambda t: pa.array([-512] * len(t), pa.int64())),
    "another shard": with_column("shard", lambda t: pa.array(["shards/../../x.tar"] * len(t))),
    "null keys": with_column("key", lambda t: pa.array([None] * len(t), pa.string())),
}


@pytest.mark.parametrize("name", INDEXES)
def test_values_of_an_index_are_checked(data, name):
    put_index(data, INDEXES[name])
    with pytest.raises(UserError, match=r"index.parquet|index is damaged"):
        for _ in loader(data):
            pass
    assert not verify(data).ok


def test_a_missing_index_is_one_line(data):
    (data / INDEX).unlink()
    for door in (lambda: list(loader(data)), lambda: EpochPlan(str(data)), lambda: Dataset(data).index):
        with pytest.raises(UserError, match=r"has no index.parquet.*damaged"):
            door()


def test_flipped_bits_of_the_index_are_found_or_change_nothing(data):
    want = [batch.keys for batch in loader(data)]
    raw = (data / INDEX).read_bytes()
    found = 0
    for at in np.random.default_rng(0).integers(4, len(raw) - 8, 60).tolist():
        damaged = bytearray(raw)
        damaged[at] ^= 1 << at % 8
        (data / INDEX).write_bytes(damaged)
        try:
            assert [batch.keys for batch in loader(data)] == want
        except UserError:
            found += 1
    assert found > 10


# --- shards -----------------------------------------------------------------------------------------------


def contents(batches):
    """All that is trained on, by sample."""
    fields = ("input_ids", "labels", "images")
    return [(batch.keys, *(getattr(batch, name).numpy().tobytes() for name in fields)) for batch in batches]


def flip(path, at, bit=0x10):
    raw = bytearray(path.read_bytes())
    raw[at] ^= bit
    path.write_bytes(raw)


def test_flipped_bits_of_a_local_shard_are_never_trained_on(data):
    row = Dataset(data, "train").row(1)
    size = row["nbytes"]
    random = np.random.default_rng(0)
    raw, whole = (data / FIRST).read_bytes(), contents(loader(data))
    for at in random.integers(0, size, 40).tolist():
        flip(data / FIRST, row["offset"] + at, 1 << at % 8)
        batches = list(loader(data, on_error="skip"))
        kept = [key for batch in batches for key in batch.keys]
        skipped = sum(batch.num_skipped for batch in batches)
        changed = any(row["key"] in batch.keys for batch in batches)
        assert len(kept) + skipped == 16
        if changed:  # the bit was in padding or in a header field that says nothing
            assert skipped == 0 and contents(batches) == whole
        else:
            assert skipped == 1
            with pytest.raises(UserError, match=row["key"]):
                list(loader(data))
        (data / FIRST).write_bytes(raw)


@pytest.mark.parametrize("where", [0, 100, 124, 130, 134, 148, 156, 257])
@pytest.mark.parametrize("value", [b"9", b"\xff", b"\0", b"x"])
def test_every_damage_of_a_header_is_passed_over(data, where, value):
    row = Dataset(data, "train").row(1)
    raw = bytearray((data / FIRST).read_bytes())
    raw[row["offset"] + where : row["offset"] + where + 1] = value
    (data / FIRST).write_bytes(raw)
    batches = list(loader(data, on_error="skip"))
    assert sum(len(batch.keys) for batch in batches) + sum(batch.num_skipped for batch in batches) == 16
