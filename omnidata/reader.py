"""Reader: the samples of a microbatch, one ranged read each.

    document (shard, offset, nbytes)  ->  bytes  ->  Sample, cut to what the plan keeps

Local shards are read with ``pread`` through a few open files. A sample that cannot be read stops the run
with its shard, key and reason, or is counted and left out; another sample never takes its place.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from omnidata.catalog import Place
from omnidata.schema import Sample, UserError
from omnidata.shards import CorruptSampleError, content_hash, read_sample

if TYPE_CHECKING:
    from omnidata.dataset import Dataset

MAX_OPEN_SHARDS = 128  # files that one process keeps open


class LoadError(UserError):
    """A sample cannot be read: says which, where and why."""


@dataclass(frozen=True, slots=True)
class Document:
    """One sample of a pack: where its bytes are, and what the plan takes of it."""

    dataset: int  # position in the blend
    place: Place
    num_tokens: int  # fewer than the sample has where the plan cut it
    num_supervised: int
    num_images: int
    passes: int  # times that the dataset had been exhausted before


class LocalShards:
    """Ranged reads of a local dataset."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._files: OrderedDict[str, int] = OrderedDict()  # shard -> file descriptor, oldest use first

    def read(self, places: Sequence[Place]) -> list[bytes | Exception]:
        """The bytes of each place, or why there are none."""
        return [self._read_one(place) for place in places]

    def _read_one(self, place: Place) -> bytes | Exception:
        try:
            return os.pread(self._open(place.shard), place.nbytes, place.offset)
        except OSError as error:
            return error

    def _open(self, shard: str) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        if len(self._files) >= MAX_OPEN_SHARDS:
            os.close(self._files.popitem(last=False)[1])
        self._files[shard] = os.open(os.path.join(self._root, shard), os.O_RDONLY | os.O_CLOEXEC)
        return self._files[shard]


class SampleReader:
    """Reads documents of a blend.

    Args:
        datasets: the datasets of the blend, in order.
        checksum: compare every sample's content hash with the index.
    """

    def __init__(self, datasets: Sequence[Dataset], *, checksum: bool = False) -> None:
        self._names = [dataset.path for dataset in datasets]
        self._shards = [LocalShards(dataset.path) for dataset in datasets]
        self._checksum = checksum

    def read(self, documents: Sequence[Document]) -> list[Sample | LoadError]:
        """The samples of ``documents``, or for each why there is none."""
        results: list[Sample | LoadError] = [LoadError("not read")] * len(documents)
        for number, shards in enumerate(self._shards):
            mine = [i for i, document in enumerate(documents) if document.dataset == number]
            for i, raw in zip(mine, shards.read([documents[i].place for i in mine]), strict=True):
                results[i] = self._parse(documents[i], raw)
        return results

    def _parse(self, document: Document, raw: bytes | Exception) -> Sample | LoadError:
        place = document.place
        if isinstance(raw, Exception):
            return self._error(document, f"{type(raw).__name__}: {raw}")
        if len(raw) != place.nbytes:
            return self._error(document, f"the shard ends {place.nbytes - len(raw)} bytes early")
        try:
            sample = read_sample(raw)
        except CorruptSampleError as error:
            return self._error(document, str(error))
        if sample.key != place.key:
            return self._error(document, f"another sample, {sample.key!r}, is there")
        if self._checksum and content_hash(sample) != place.content_hash:
            return self._error(document, "its content hash differs from the index's")
        return sample

    def _error(self, document: Document, reason: str) -> LoadError:
        place = document.place
        return LoadError(
            f"cannot read sample {place.key} of {self._names[document.dataset]}/{place.shard} at byte "
            f"{place.offset}: {reason}. Run `omnidata verify --deep`, or go on with on_error=skip"
        )
