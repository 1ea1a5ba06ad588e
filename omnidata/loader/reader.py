"""Reader: the samples of a microbatch, one ranged read each.

    Documents (shard, offset, nbytes)  ->  bytes  ->  Sample, cut to what the plan keeps

Local shards are read with ``pread`` through a few open files, remote ones by remote.py. A sample
that cannot be read stops the run with its shard, key and reason, or is counted and left out; another sample
never takes its place.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

from omnidata.files import open_regular
from omnidata.loader.remote import Remote, RemoteShards
from omnidata.loader.sample_bytes import check_content, parse
from omnidata.plan.places import Place
from omnidata.schema import Sample, UserError
from omnidata.shards import CorruptSampleError, with_images

if TYPE_CHECKING:
    from omnidata.dataset import Dataset

MAX_OPEN_SHARDS = 128  # files that one process keeps open


class LoadError(UserError):
    """A sample cannot be read: says which, where and why."""


class OutOfMemoryError(LoadError):
    """The machine's fault, not the sample's: it stops the run whatever ``on_error`` says."""


LESS_MEMORY = "use fewer workers, a smaller prefetch or smaller packs"


class Document(NamedTuple):
    """One sample of a pack: where its bytes are, and what the plan takes of it."""

    dataset: int  # position in the blend
    place: Place
    num_tokens: int  # fewer than the sample has if the plan cut it
    num_images: int
    passes: int  # times that the dataset had been exhausted before
    image_pixels: tuple[int, ...] = ()  # values of each image's pixel tensors, of a processor's dataset
    group: int | None = None  # what it is counted under (groups.py); None: nothing is counted
    base: Place | None = None  # of a view: the base's sample, which has the images; None: they are its own


@dataclass(frozen=True, slots=True)
class Work:
    """What to read for one microbatch."""

    documents: tuple[Document, ...]
    num_supervised: int  # what their labels must add up to
    epoch: int


class Shards(Protocol):
    """Where a dataset's bytes come from."""

    def read(self, places: Sequence[Place]) -> list[bytes | Exception]:
        """The bytes of each place, or why there are none."""
        ...


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
        except (OSError, UserError, MemoryError) as error:
            return error

    def _open(self, shard: str) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        if len(self._files) >= MAX_OPEN_SHARDS:
            os.close(self._files.popitem(last=False)[1])
        self._files[shard] = open_regular(os.path.join(self._root, shard))
        return self._files[shard]

    def __del__(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)


class SampleReader:
    """Reads documents of a blend.

    Args:
        datasets: the datasets of the blend, in order.
        checksum: compare every local sample's content hash with the index, too; remote ones always are.
        remote: how to read those that are not local.
    """

    def __init__(self, datasets: Sequence[Dataset], *, remote: Remote, checksum: bool = True) -> None:
        self._names = [dataset.path for dataset in datasets]
        self._shards = [_shards_of(dataset, remote) for dataset in datasets]
        self._bases = [_shards_of(dataset.base, remote) if dataset.base else None for dataset in datasets]
        self._checksum = checksum

    def read(self, documents: Sequence[Document]) -> list[Sample | LoadError]:
        """The samples of ``documents``, or for each why there is none."""
        raws: list[bytes | Exception] = [b""] * len(documents)
        of_bases: dict[int, bytes | Exception] = {}  # of documents whose images lie in a base
        for number in {document.dataset for document in documents}:
            mine = [i for i, document in enumerate(documents) if document.dataset == number]
            places = [documents[i].place for i in mine]
            for i, raw in zip(mine, self._shards[number].read(places), strict=True):
                raws[i] = raw
            if (base := self._bases[number]) is not None:
                wanted = {i: documents[i].base for i in mine if documents[i].num_images}
                found = {i: place for i, place in wanted.items() if place}
                of_bases |= dict(zip(found, base.read(list(found.values())), strict=True))
        samples = []
        for i, (document, raw) in enumerate(zip(documents, raws, strict=True)):
            with self.naming(document):
                samples.append(self._sample(document, raw, of_bases.get(i)))
        return samples

    def _sample(
        self, document: Document, raw: bytes | Exception, of_base: bytes | Exception | None
    ) -> Sample | LoadError:
        try:
            sample = self._parsed(raw, document.place)
            if of_base is not None and document.base:
                stored = self._parsed(of_base, document.base)
                sample = with_images(sample, stored, document.num_images)
            return _cut(sample, document)
        except (OSError, CorruptSampleError, UserError) as error:
            return self.error(document, f"{type(error).__name__}: {error}")

    def _parsed(self, raw: bytes | Exception, place: Place) -> Sample:
        if isinstance(raw, Exception):
            raise raw
        sample = parse(raw, place)
        if self._checksum:
            check_content(sample, place)
        return sample

    def error(self, document: Document, reason: str) -> LoadError:
        """What to tell the user about a document that cannot be used."""
        return LoadError(
            f"cannot read {self._describe(document)}: {reason}. Run `omnidata verify --deep`, or go on with "
            "on_error=skip"
        )

    @contextmanager
    def naming(self, document: Document) -> Iterator[None]:
        """Errors that are none of the sample's, such as a lack of memory, tell at which one they came.

        Raises:
            OutOfMemoryError: instead of a MemoryError.
        """
        try:
            yield
        except MemoryError as error:
            raise OutOfMemoryError(f"out of memory at {self._describe(document)}; {LESS_MEMORY}") from error
        except Exception as error:
            error.add_note(f"at {self._describe(document)}")
            raise

    def _describe(self, document: Document) -> str:
        place = document.place
        return f"sample {place.key} of {self._names[document.dataset]}/{place.shard} at byte {place.offset}"


def _shards_of(dataset: Dataset, remote: Remote) -> Shards:
    return LocalShards(dataset.local_root) if dataset.local_root else RemoteShards(dataset, remote)


def _cut(sample: Sample, document: Document) -> Sample:
    """The sample as far as the plan keeps it."""
    tokens, images = document.num_tokens, document.num_images
    if len(sample.input_ids) < tokens or len(sample.labels) < tokens or len(sample.images) < images:
        found = f"{len(sample.input_ids)} tokens and {len(sample.images)} images"
        raise CorruptSampleError(f"{found}, the index says {tokens} and {images}")
    if len(sample.input_ids) == len(sample.labels) == tokens and len(sample.images) == images:
        return sample
    return replace(
        sample,
        input_ids=sample.input_ids[:tokens],
        labels=sample.labels[:tokens],
        images=sample.images[:images],
        image_extensions=sample.image_extensions[:images],
    )
