"""Worker: writes one shard of a copy, from byte ranges of the inputs' shards.

    index rows of the task ─▶ runs of adjacent samples, one read each ─▶ each sample parsed and held against
    its content hash ─▶ written as it is (or with its key's prefix in each header) ─▶ .idx and, last, the part

A sample that is not what its index says ends the copy: damage must not get a new, fitting checksum. As in a
build a shard is done when its part is there (builder.worker).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from omnidata.builder.worker import ShardResult, Tally, part_path
from omnidata.copier.columns import with_columns
from omnidata.copier.layout import CopyTask
from omnidata.dataset import Dataset
from omnidata.durable import Store
from omnidata.index import (
    idx_bytes,
    index_schema,
    numbers,
    open_parquet,
    read_table,
    reading_table,
    write_tables,
)
from omnidata.schema import INDEX, MANIFEST, ShardInfo, UserError
from omnidata.shards import (
    CorruptSampleError,
    HashedFile,
    content_hash,
    dialogue_hash,
    end_archive,
    prefix_names,
    read_sample,
)

RUN_BYTES = 8 << 20  # read at once, where samples are adjacent
REPORT_SECONDS = 0.5


@dataclass(frozen=True)
class CopyJob:
    """What every worker of a copy knows; picklable."""

    out: str
    paths: tuple[str, ...]  # of the inputs
    digests: tuple[str, ...]  # sha256 of the manifest of each
    prefixes: tuple[str, ...]  # before the keys of each
    kept: tuple[pa.Field, ...]  # kept columns of the new index

    def __call__(self, task: CopyTask, report: object) -> ShardResult:
        """Write the shard."""
        return copy_shard(self, task, report)


@lru_cache(maxsize=64)
def _open(path: str, digest: str) -> Dataset:
    dataset = Dataset(path)
    if hashlib.sha256(dataset.read_file(MANIFEST)).hexdigest() != digest:
        raise UserError(f"{path} changed while it was copied: run the command anew with --overwrite")
    return dataset


def copy_shard(job: CopyJob, task: CopyTask, report: object) -> ShardResult:
    """Write the shard, its ``.idx`` and, last, its part."""
    store = Store(job.out)
    for path in (task.path, f"{task.path}.idx", part_path(task)):
        store.remove_temps(path)
    tables: list[pa.Table] = []
    spans: list[tuple[int, int]] = []
    with store.write(task.path) as file:
        copy = _ShardCopy(task, HashedFile(file), report)
        for piece in task.pieces:
            dataset = _open(job.paths[piece.input], job.digests[piece.input])
            table = read_rows(dataset, piece.rows)
            prefix = job.prefixes[piece.input]
            spans += copy.samples(dataset, table, prefix)
            tables.append(with_columns(_renamed(table, task, prefix), index_schema(), job.kept))
        end_archive(copy.file, copy.file.num_bytes)
    table = _placed(pa.concat_tables(tables), spans)
    store.write_bytes(f"{task.path}.idx", idx_bytes(spans))
    result = _result(task, copy.file, table)
    with store.write(part_path(task)) as out:
        metadata = {"omnidata": json.dumps(asdict(result))}
        write_tables(out, table.schema.with_metadata(metadata), [table])
    return result


class _ShardCopy:
    """The file of a shard that is being written, and how far it is."""

    def __init__(self, task: CopyTask, file: HashedFile, report: Any) -> None:
        self.file, self._task, self._report = file, task, report
        self._num_samples, self._next_report = 0, time.monotonic() + REPORT_SECONDS

    def samples(self, dataset: Dataset, table: pa.Table, prefix: str) -> Iterator[tuple[int, int]]:
        """Copy the samples of these index rows; yield the (offset, nbytes) of each in the new shard."""
        shards = table["shard"].to_pylist()
        keys = table["key"].to_pylist()
        hashes = list(
            zip(*(table[name].to_pylist() for name in ("content_hash", "dialogue_hash")), strict=True)
        )
        offsets, nbytes = (numbers(table, name).tolist() for name in ("offset", "nbytes"))
        for start, stop in runs(shards, offsets, nbytes):
            first, end = offsets[start], offsets[stop - 1] + nbytes[stop - 1]
            read = self._read(dataset, shards[start], first, end - first)
            raw = memoryview(bytearray(read) if prefix else read)
            for at in range(start, stop):
                sample = raw[offsets[at] - first :][: nbytes[at]]
                check_sample(sample, keys[at], hashes[at], where=f"{dataset.path}/{shards[at]}")
                if prefix:
                    prefix_names(sample, prefix)
                yield self.file.num_bytes + offsets[at] - first, nbytes[at]
            self.file.write(raw)
            self._tell(stop - start)

    def _read(self, dataset: Dataset, shard: str, offset: int, nbytes: int) -> bytes:
        try:
            return dataset.read_range(shard, offset, nbytes)
        except CorruptSampleError as error:
            what = f"{error}: the dataset is damaged, run `omnidata verify {dataset.path}`"
            raise UserError(what) from error

    def _tell(self, num_samples: int) -> None:
        self._num_samples += num_samples
        if time.monotonic() >= self._next_report:
            self._next_report = time.monotonic() + REPORT_SECONDS
            self._report(Tally(self._num_samples, 0, self.file.num_bytes))


def runs(shards: list[str], offsets: list[int], nbytes: list[int]) -> Iterator[tuple[int, int]]:
    """(start, stop) of samples that lie beside each other in a shard, at most RUN_BYTES in all."""
    start = 0
    for at in range(1, len(shards) + 1):
        if (
            at == len(shards)
            or shards[at] != shards[start]
            or offsets[at] != offsets[at - 1] + nbytes[at - 1]
            or offsets[at] + nbytes[at] - offsets[start] > RUN_BYTES
        ):
            yield start, at
            start = at


def check_sample(raw: memoryview, key: str, expected: tuple[str, str], *, where: str) -> None:
    """Refuse bytes that are not the sample of this key and these hashes, of its content and its KEY.json."""
    try:
        sample = read_sample(raw)
        found = content_hash(sample), dialogue_hash(sample.dialogue)
    except CorruptSampleError as error:
        raise UserError(f"{where}, sample {key}: {error}; {_REMEDY}") from error
    if sample.key != key or found != expected:
        what = f"the key is {sample.key}" if sample.key != key else "it is not what its hashes say"
        raise UserError(f"{where}, sample {key}: {what}; {_REMEDY}")


_REMEDY = (
    "damage is not copied. `omnidata verify --deep` lists all of it; build the dataset again, or leave such "
    "samples out with `omnidata subset --exclude`"
)


# --- rows of the index ------------------------------------------------------------------------------------


def read_rows(dataset: Dataset, rows: np.ndarray) -> pa.Table:
    """These rows (ascending) of a dataset's index, kept columns included; only their row groups are read."""
    with dataset.open_table(INDEX) as file, reading_table(f"{dataset.path}/{INDEX}"):
        metadata = open_parquet(file)[0].metadata
        counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        ends = np.cumsum(counts)
        groups, owners = np.unique(np.searchsorted(ends, rows, side="right"), return_inverse=True)
        sizes = np.array(counts)[groups]
        shift = (ends[groups] - sizes) - (np.cumsum(sizes) - sizes)  # of each group's first row
        table = read_table(file, index_schema(), kept=True, row_groups=groups.tolist())
    return table.take(pa.array(rows - shift[owners]))


def _renamed(table: pa.Table, task: CopyTask, prefix: str) -> pa.Table:
    """The rows with the key, split and shard that they have in the copy."""
    columns = {"shard": [task.path] * table.num_rows, "split": [task.split] * table.num_rows}
    if prefix:
        columns["key"] = [prefix + key for key in table["key"].to_pylist()]
    return _replaced(table, columns)


def _placed(table: pa.Table, spans: list[tuple[int, int]]) -> pa.Table:
    return _replaced(table, {"offset": [offset for offset, _ in spans]})


def _replaced(table: pa.Table, columns: dict[str, list[Any]]) -> pa.Table:
    for name, values in columns.items():
        field = table.schema.field(name)
        table = table.set_column(table.column_names.index(name), field, pa.array(values, field.type))
    return table


def _result(task: CopyTask, file: HashedFile, table: pa.Table) -> ShardResult:
    names = ("n_tokens", "n_supervised", "n_images", "dialogue_bytes")
    tokens, supervised, images, dialogues = (int(numbers(table, name).sum(dtype=np.int64)) for name in names)
    digest = file.sha256.hexdigest()
    return ShardResult(
        num_records=table.num_rows,
        num_samples=table.num_rows,
        rejects={},
        num_bytes=file.num_bytes,
        truncated=[],
        num_supervised=supervised,
        num_images=images,
        num_dialogue_bytes=dialogues,
        counts={},
        info=ShardInfo(task.path, task.split, table.num_rows, tokens, file.num_bytes, digest),
    )
