"""Benchmarks: what of them must not be trained on.

    questions.json, test.jsonl.gz, data.parquet    every text of a record, at any depth, and every picture
    another dataset                                its samples' texts and pictures

A text that is long enough stands for its runs of NGRAM words; a shorter one, of a record without pictures,
for itself if it has MIN_WORDS. Runs that more than MOST_ENTRIES entries have are instructions ("answer with
the option's letter from the given choices directly"), and are left out and counted.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from omnidata import corpus
from omnidata.dataset import Dataset
from omnidata.durable import Store
from omnidata.images.references import looks_like_base64
from omnidata.images.store import ImageStore
from omnidata.leaks.ngrams import ngrams, word_hashes
from omnidata.leaks.texts import TextReader
from omnidata.near.hashing import image_hash, parse_image_hashes
from omnidata.schema import MANIFEST, ImageRef, Record, Reject, RejectError, UserError

NGRAM, MIN_WORDS, MOST_ENTRIES = 13, 8, 10
_PICTURE = re.compile(r"\.(?:jpe?g|png|webp|gif|bmp|tiff?)(?:[?#]\S*)?$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Entry:
    """A record of a benchmark."""

    benchmark: str
    id: str
    locator: str
    texts: tuple[str, ...]
    images: tuple[str, ...]  # hashes


@dataclass(frozen=True, eq=False)
class Table:
    """All entries, ready to be searched."""

    places: tuple[tuple[str, str, str], ...]  # benchmark, id, locator of each entry
    text_entries: np.ndarray  # int64: the entry of each text
    text_sizes: np.ndarray  # int64: how many runs it has
    grams: dict[int, tuple[np.ndarray, np.ndarray]]  # words -> sorted uint64 runs, the text of each
    images: np.ndarray  # uint64 [M, IMAGE_WORDS]
    image_entries: np.ndarray  # int64: the entry of each picture
    num_common: int  # runs left out, since too many entries have them

    @property
    def num_bare(self) -> int:
        """Entries with nothing to compare: no picture, and no text that is long enough and their own."""
        return len(self.places) - len({*self.text_entries.tolist(), *self.image_entries.tolist()})


def read_benchmarks(names: Sequence[str], *, image_root: str | None, ngram: int) -> Table:
    """Open the benchmarks and make their table.

    Raises:
        UserError: one cannot be read, has a picture that cannot be, or nothing to compare with.
    """
    entries = [entry for name in names for entry in _entries(name, image_root)]
    table = make_table(entries, ngram=ngram)
    if not len(table.text_sizes) and not len(table.images):
        raise UserError(f"{', '.join(names)}: no picture and no text of {MIN_WORDS} words to compare with")
    return table


def make_table(entries: Sequence[Entry], *, ngram: int = NGRAM) -> Table:
    """The texts' runs and the pictures' hashes of all entries."""
    found: list[tuple[int, int, np.ndarray]] = []  # entry, words of a run, runs
    for number, entry in enumerate(entries):
        for text in entry.texts:
            words = word_hashes(text)
            if len(words) >= ngram:
                found.append((number, ngram, np.unique(ngrams(words, ngram))))
            elif len(words) >= MIN_WORDS and not entry.images:
                found.append((number, len(words), ngrams(words, len(words))))
    common = np.array([run for run, count in _holders(found).items() if count > MOST_ENTRIES], np.uint64)
    kept = [(entry, length, runs[~np.isin(runs, common)]) for entry, length, runs in found]
    kept = [(entry, length, runs) for entry, length, runs in kept if len(runs)]
    images = [(number, image) for number, entry in enumerate(entries) for image in entry.images]
    return Table(
        places=tuple((entry.benchmark, entry.id, entry.locator) for entry in entries),
        text_entries=np.array([entry for entry, _, _ in kept], np.int64),
        text_sizes=np.array([len(runs) for _, _, runs in kept], np.int64),
        grams={length: _sorted_runs(kept, length) for length in sorted({length for _, length, _ in kept})},
        images=parse_image_hashes([image for _, image in images]),
        image_entries=np.array([number for number, _ in images], np.int64),
        num_common=len(common),
    )


def _holders(found: Sequence[tuple[int, int, np.ndarray]]) -> Counter[int]:
    """Run -> entries that have it."""
    of_entry: dict[int, set[int]] = {}
    for entry, _, runs in found:
        of_entry.setdefault(entry, set()).update(runs.tolist())
    holders: Counter[int] = Counter()
    for of_one in of_entry.values():
        holders.update(of_one)
    return holders


def _sorted_runs(kept: Sequence[tuple[int, int, np.ndarray]], length: int) -> tuple[np.ndarray, np.ndarray]:
    mine = [(text, runs) for text, (_, words, runs) in enumerate(kept) if words == length]
    runs = np.concatenate([runs for _, runs in mine])
    owners = np.repeat(np.array([text for text, _ in mine]), [len(runs) for _, runs in mine])
    order = np.argsort(runs, kind="stable")
    return runs[order], owners[order]


# --- reading them -----------------------------------------------------------------------------------------


def _entries(name: str, image_root: str | None) -> Iterator[Entry]:
    if Store(name).exists(MANIFEST):
        yield from _entries_of_dataset(name)
        return
    for file in corpus.open_source(name):
        root = image_root or os.path.dirname(file.source) or "."
        store = ImageStore(root, assumed=image_root is None, allow_any_path=True)
        for unit in corpus.scan(file):
            for record in corpus.read(file, unit):
                if isinstance(record, Reject):
                    raise UserError(f"{record.source}, {record.locator}: {record.detail}")
                yield _entry(record, store)


def _entry(record: Record, store: ImageStore) -> Entry:
    texts: list[str] = []
    hashes: list[str] = []
    for value in _leaves(record.payload):
        if isinstance(value, ImageRef):
            try:
                hashes.append(image_hash(store.read(value)))
            except RejectError as error:
                raise UserError(
                    f"{record.source}, {record.locator}: {error.detail}. Pictures of a benchmark must be "
                    "there to be compared: give --image-root, or a file without them"
                ) from error
        else:
            texts.append(value)
    return Entry(record.source, record.id, record.locator, tuple(texts), tuple(hashes))


def _leaves(value: object) -> Iterator[str | ImageRef]:
    """Every text and every picture, however deep; a picture's bytes stand for the path beside them."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, Mapping):
            has_bytes = isinstance(value.get("bytes"), bytes) and value["bytes"]
            left += [inner for key, inner in value.items() if not (has_bytes and key == "path")]
        elif isinstance(value, list | tuple):
            left += value
        elif isinstance(value, bytes) and value:
            yield ImageRef(data=value)
        elif isinstance(value, str) and looks_like_base64(value):
            yield ImageRef(path=f"data:image/jpeg;base64,{value}")
        elif isinstance(value, str) and (value.startswith("data:image/") or _is_path(value)):
            yield ImageRef(path=value)
        elif isinstance(value, str):
            yield value


def _is_path(text: str) -> bool:
    return len(text) < 1024 and len(text.split()) <= 3 and _PICTURE.search(text) is not None


def _entries_of_dataset(path: str) -> Iterator[Entry]:
    dataset = Dataset(path)
    reader = TextReader(dataset)
    for row in dataset.index.to_pylist():
        sample = reader.sample(row)
        hashes = tuple(image_hash(image) for image in sample.images)
        yield Entry(path, row["id"], row["locator"], (reader.text(sample),), hashes)
