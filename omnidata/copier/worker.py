"""Worker: writes one shard of a copy, from byte ranges of the inputs' shards.

    index rows of the task ─▶ runs of adjacent samples, one read each ─▶ each sample parsed and held against
    its hashes ─▶ written as it is (or with its key's prefix in each header) ─▶ .idx and, last, the part

As in a build a shard is done when its part is there (builder.worker).
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from omnidata.builder.worker import ShardResult, Tally, part_path
from omnidata.copier.columns import with_columns
from omnidata.copier.layout import CopyTask, Selection
from omnidata.copier.rows import Place, check_sample, places_of, read_rows, read_run, replaced, runs
from omnidata.copier.views import WholeSamples
from omnidata.dataset import Dataset
from omnidata.durable import Store
from omnidata.index import idx_bytes, index_schema, numbers, write_tables
from omnidata.schema import MANIFEST, ShardInfo, UserError
from omnidata.shards import HashedFile, end_archive, prefix_names, write_samples

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
    with store.write(task.path) as file:
        copy = _ShardCopy(HashedFile(file), report)
        tables = [copy.selection(job, task, selection) for selection in task.selections]
        end_archive(copy.file, copy.file.num_bytes)
    table = pa.concat_tables(tables)
    spans = list(zip(*(table[name].to_pylist() for name in ("offset", "nbytes")), strict=True))
    store.write_bytes(f"{task.path}.idx", idx_bytes(spans))
    result = _result(task, copy.file, table)
    with store.write(part_path(task)) as out:
        metadata = {"omnidata": json.dumps(asdict(result))}
        write_tables(out, table.schema.with_metadata(metadata), [table])
    return result


class _ShardCopy:
    """The file of a shard that is being written, and how far it is."""

    def __init__(self, file: HashedFile, report: Any) -> None:
        self.file, self._report = file, report
        self._num_samples, self._next_report = 0, time.monotonic() + REPORT_SECONDS

    def selection(self, job: CopyJob, task: CopyTask, selection: Selection) -> pa.Table:
        """Copy the samples of one input; their rows as the new index has them."""
        dataset = _open(job.paths[selection.input], job.digests[selection.input])
        table, prefix = read_rows(dataset, selection.rows), job.prefixes[selection.input]
        if dataset.base is None:
            spans = self._samples(dataset, places_of(table), prefix)
        else:
            whole = WholeSamples(dataset, table, self._tell)
            spans = write_samples(self.file, whole, start=self.file.num_bytes)
            table = whole.table
        columns = {
            "key": [prefix + key for key in table["key"].to_pylist()],
            "split": [task.split] * len(spans),
            "shard": [task.path] * len(spans),
            "offset": [offset for offset, _ in spans],
            "nbytes": [nbytes for _, nbytes in spans],
        }
        return with_columns(replaced(table, columns), index_schema(), job.kept)

    def _samples(self, dataset: Dataset, places: list[Place], prefix: str) -> list[tuple[int, int]]:
        """Copy byte ranges; the (offset, nbytes) of each in the new shard."""
        spans = []
        for run in runs(places):
            read = read_run(dataset, run)
            raw, first = memoryview(bytearray(read) if prefix else read), run[0].offset
            for place in run:
                sample = raw[place.offset - first :][: place.nbytes]
                check_sample(sample, place, where=f"{dataset.path}/{place.shard}")
                if prefix:
                    prefix_names(sample, prefix)
                spans.append((self.file.num_bytes + place.offset - first, place.nbytes))
            self.file.write(raw)
            self._tell(len(run))
        return spans

    def _tell(self, num_samples: int) -> None:
        self._num_samples += num_samples
        if time.monotonic() >= self._next_report:
            self._next_report = time.monotonic() + REPORT_SECONDS
            self._report(Tally(self._num_samples, 0, self.file.num_bytes))


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
