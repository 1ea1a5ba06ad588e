"""Index, manifest, Dataset: tables come back; incomplete or foreign datasets are refused in one line."""

import dataclasses
import io
import json

import numpy as np
import pytest

from omnidata import Dataset
from omnidata.index import idx_bytes, index_schema, index_table, read_idx, read_table, write_tables
from omnidata.manifest import manifest_from_json, manifest_to_json
from omnidata.schema import (
    IMAGE_TOKENS,
    INDEX_COLUMNS,
    MANIFEST,
    SCHEMA_VERSION,
    Manifest,
    ShardInfo,
    UserError,
)
from omnidata.shards import CorruptSampleError


def a_row(**changes):
    empty = {"string": "", "int32": 0, "int64": 0}
    return {column.name: empty.get(column.type, []) for column in INDEX_COLUMNS} | changes


def a_manifest(**changes):
    empty = {"int": 0, "str": "", "list": [], "dict": {}}
    values = {field.name: empty[field.type.partition("[")[0]] for field in dataclasses.fields(Manifest)}
    values |= {"schema_version": SCHEMA_VERSION, "splits": {"train": 0}}
    values["profile"] = {"name": "omnilmm", "num_query": 4, "image_size": 32}
    values["special_tokens"] = {name: i for i, name in enumerate(IMAGE_TOKENS)}
    return Manifest(**(values | changes))


def test_index_comes_back_with_one_row_group_a_shard():
    import pyarrow.parquet as pq

    tables = [
        index_table([a_row(key="a", image_sizes=[[3, 4], [5, 6]]), a_row(key="b")]),
        index_table([]),
        index_table([a_row(key="c")]),
    ]
    file = io.BytesIO()
    assert write_tables(file, index_schema(), tables) == 3
    assert pq.ParquetFile(file).num_row_groups == 2
    table = read_table(file, index_schema())
    assert table["key"].to_pylist() == ["a", "b", "c"]
    assert table["image_sizes"].to_pylist()[0] == [[3, 4], [5, 6]]
    assert read_table(file, index_schema(), columns=["key"]).column_names == ["key"]


def test_a_foreign_parquet_file_is_refused():
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.write_table(pa.table({"key": ["a"]}), file)
    with pytest.raises(UserError, match="lacks the column "):
        read_table(file, index_schema())
    with pytest.raises(UserError, match="Parquet"):
        read_table(io.BytesIO(b"no table"), index_schema())


def test_idx_is_offsets_then_the_end():
    np.testing.assert_array_equal(read_idx(idx_bytes([(0, 2048), (2048, 1024)])), [0, 2048, 3072])
    assert idx_bytes([]) == b""


def test_manifest_round_trip_and_strictness():
    manifest = a_manifest(shards=[ShardInfo("shards/train-00000.tar", "train", 1, 2, 3, "ab")])
    raw = manifest_to_json(manifest)
    assert manifest_from_json(raw, where="m") == manifest
    data = json.loads(raw)
    for change, message in [
        ({"schema_version": 1}, "schema version 1"),
        ({"surplus": 1}, "surplus"),
    ]:
        with pytest.raises(UserError, match=message):
            manifest_from_json(json.dumps(data | change).encode(), where="m")
    for profile in ({"name": "omnilmm", "num_query": 4}, {"name": "other"}, {"name": "processor"}, None):
        with pytest.raises(UserError, match="profile"):
            manifest_from_json(json.dumps(data | {"profile": profile}).encode(), where="m")
    del data["profile"]
    with pytest.raises(UserError, match="profile"):
        manifest_from_json(json.dumps(data).encode(), where="m")
    with pytest.raises(UserError, match="not valid JSON"):
        manifest_from_json(raw[: len(raw) // 2], where="m")


def test_a_folder_without_a_manifest_is_no_dataset(tmp_path):
    with pytest.raises(UserError, match="not a complete dataset"):
        Dataset(tmp_path)


def test_an_unknown_split_and_a_short_shard_are_named(tmp_path):
    (tmp_path / MANIFEST).write_bytes(manifest_to_json(a_manifest()))
    with pytest.raises(UserError, match="no split 'val'"):
        Dataset(tmp_path, split="val")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/train-00000.tar").write_bytes(b"12345")
    with pytest.raises(CorruptSampleError, match="ends at 5"):
        Dataset(tmp_path).read_range("shards/train-00000.tar", 2, 10)
