"""Search: each sample of a dataset against all entries of the benchmarks, in parallel over stretches of rows.

A text of a benchmark has leaked into a sample that has half of its runs, or MANY of them; a picture, if one
of the sample's looks alike (near.hashing.MAX_DISTANCE).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from omnidata.dataset import Dataset
from omnidata.executors import InlineExecutor, ProcessExecutor, num_cpus, run_tasks
from omnidata.leaks.benchmark import Table
from omnidata.leaks.ngrams import ngrams, word_hashes
from omnidata.leaks.texts import TextReader
from omnidata.near.hashing import HASH_DIGITS, IMAGES, MAX_DISTANCE, distances, image_hash, parse_image_hashes
from omnidata.schema import RejectError, Sample, UserError

ROWS_OF_A_TASK = 500
SHARE, MANY = 0.5, 50  # of a text's runs
COLUMNS = ("key", "id", "source", "locator", "shard", "offset", "nbytes")


@dataclass(frozen=True, slots=True, eq=False)
class Stretch:
    """Rows of the index that one worker looks at."""

    number: int
    rows: tuple[dict[str, object], ...]

    def __str__(self) -> str:
        return f"{self.rows[0]['key']} …"


@dataclass(frozen=True)
class Searcher:
    """Picklable work: the leaks of a stretch, as rows of the ledger."""

    path: str
    table: Table

    @cached_property
    def _reader(self) -> TextReader:
        return TextReader(Dataset(self.path))

    def __call__(self, stretch: Stretch, report: object) -> list[dict[str, object]]:
        return [leak for row in stretch.rows for leak in self._leaks(row)]

    def _leaks(self, row: dict[str, object]) -> Iterator[dict[str, object]]:
        sample = self._reader.sample(row)
        found: dict[int, dict[str, Any]] = {}
        for entry, share in self._texts(self._reader.text(sample)):
            if share > found.get(entry, {}).get("share", 0):
                found[entry] = {"share": share, "distance": None}
        for entry, distance in self._images(row, sample):
            before = found.setdefault(entry, {"share": 0.0, "distance": None})
            if before["distance"] is None or distance < before["distance"]:
                before["distance"] = distance
        place = {name: row[name] for name in ("key", "id", "source", "locator")}
        for entry, how in sorted(found.items()):
            benchmark, its_id, locator = self.table.places[entry]
            yield place | {"benchmark": benchmark, "of_id": its_id, "of_locator": locator} | how

    def _texts(self, text: str) -> Iterator[tuple[int, float]]:
        """(entry, share of its text's runs that the sample has)."""
        words = word_hashes(text)
        counts = np.zeros(len(self.table.text_sizes), np.int64)
        for length, (runs, owners) in self.table.grams.items():
            mine = np.unique(ngrams(words, length))
            first, last = (np.searchsorted(runs, mine, side=side) for side in ("left", "right"))
            for start, stop in zip(first[first < last].tolist(), last[first < last].tolist(), strict=True):
                counts[owners[start:stop]] += 1
        for at in np.flatnonzero((counts >= MANY) | (counts >= SHARE * self.table.text_sizes)).tolist():
            if counts[at]:
                yield (
                    int(self.table.text_entries[at]),
                    round(float(counts[at] / self.table.text_sizes[at]), 3),
                )

    def _images(self, row: dict[str, object], sample: Sample) -> Iterator[tuple[int, int]]:
        """(entry, bits in which one of its pictures differs from one of the sample's)."""
        if not len(self.table.images) or not sample.images:
            return
        hashes = str(row.get(IMAGES) or "").split()
        if [len(each) for each in hashes] != [HASH_DIGITS] * len(sample.images):  # none, or a kept column's
            hashes = [self._hash(row, image) for image in sample.images]
        for mine in parse_image_hashes(hashes):
            apart = distances(self.table.images, mine)
            for at in np.flatnonzero(apart <= MAX_DISTANCE).tolist():
                yield int(self.table.image_entries[at]), int(apart[at])

    def _hash(self, row: dict[str, object], image: bytes) -> str:
        try:
            return image_hash(image)
        except RejectError as error:
            raise UserError(
                f"{self.path}, sample {row['key']}: {error.detail}; run `omnidata verify --deep`"
            ) from error


def find_leaks(dataset: Dataset, table: Table, *, num_workers: int | None = None) -> list[dict[str, Any]]:
    """Every pair of a sample and an entry that leaked into it, in the order of the index."""
    has_hashes = [IMAGES] if IMAGES in dataset.kept_columns else []
    rows = dataset.index_columns([*COLUMNS, *has_hashes])
    spans = range(0, rows.num_rows, ROWS_OF_A_TASK)
    tasks = (Stretch(at, tuple(rows.slice(at, ROWS_OF_A_TASK).to_pylist())) for at in spans)
    work = Searcher(dataset.path, table)
    num_workers = min(num_workers or num_cpus(), max(1, len(spans)))
    preload = ("omnidata.leaks.search", "omnidata.without_pandas")
    executor: Any = InlineExecutor(work)
    if num_workers > 1 and dataset.local_root is not None:
        executor = ProcessExecutor(work, num_workers=num_workers, preload=preload)
    try:
        found = {task.number: leaks for task, leaks in run_tasks(executor, tasks)}
    finally:
        executor.close()
    return [leak for number in spans for leak in found[number]]
