"""Assembler: documents -> Parts. What a worker process does; it holds no index, no order and no state.

SampleReader.read        one ranged read a sample
decode, (augment), resize   each image straight into its place, which may be memory that processes share
lay_out                  ids and labels end to end
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from omnidata.loader.augment import Augment
from omnidata.loader.microbatch import Parts, lay_out
from omnidata.loader.reader import LESS_MEMORY, Document, LoadError, OutOfMemoryError, SampleReader
from omnidata.schema import IGNORE_INDEX, RejectError, Sample

OnError = Literal["raise", "skip"]


@dataclass(frozen=True, slots=True)
class Work:
    """What to read for one microbatch."""

    documents: tuple[Document, ...]
    num_supervised: int  # what their labels must add up to
    epoch: int


@dataclass(frozen=True, slots=True)
class ImageSettings:
    """What becomes of the images."""

    size: int  # pixels per side of the square that they become
    fit: str = "squash"  # squash | center_crop
    decode: bool = True  # False hands on the encoded bytes
    augment: Augment | None = None
    seed: int = 0  # of the augmentation


class Assembler:
    """Reads and lays out microbatches, in a worker or in the training process."""

    def __init__(
        self, reader: SampleReader, *, images: ImageSettings, on_error: OnError, im_start: int
    ) -> None:
        self._reader, self._images = reader, images
        self._on_error, self._im_start = on_error, im_start

    def num_bytes(self, work: Work) -> int:
        """Room that the images of ``work`` take at most."""
        if not self._images.decode:
            return sum(document.place.nbytes for document in work.documents if document.num_images)
        return sum(document.num_images for document in work.documents) * self._images.size**2 * 3

    def assemble(self, work: Work, memory: np.ndarray | None = None) -> Parts | LoadError:
        """Read and lay out one microbatch.

        Args:
            work: what to read.
            memory: uint8, at least ``num_bytes(work)``, where decoded images go; None: ordinary memory.

        Returns:
            The microbatch, or why there is none: without memory, and with ``on_error="raise"``.
        """
        try:
            return self._assembled(work, memory)
        except OutOfMemoryError as error:
            return error
        except MemoryError:
            keys = ", ".join(document.place.key for document in work.documents)
            return OutOfMemoryError(f"out of memory at the microbatch of {keys}; {LESS_MEMORY}")

    def _assembled(self, work: Work, memory: np.ndarray | None) -> Parts | LoadError:
        read = list(zip(work.documents, self._reader.read(work.documents), strict=True))
        images = self._decoded(work, read, memory) if self._images.decode else None
        kept = [sample for _, sample in read if isinstance(sample, Sample)]
        failed = [sample for _, sample in read if isinstance(sample, LoadError)]
        if failed and self._on_error == "raise":
            return failed[0]
        if images is None:
            images = tuple([image for sample in kept for image in sample.images])
        parts = lay_out(kept, images, im_start=self._im_start, num_skipped=len(failed))
        return parts if failed else self._checked(parts, work)

    def _checked(self, parts: Parts, work: Work) -> Parts | LoadError:
        found = int(np.count_nonzero(parts.labels != IGNORE_INDEX)), len(parts.image_positions)
        planned = work.num_supervised, sum(document.num_images for document in work.documents)
        if found == planned:
            return parts
        return LoadError(
            f"the samples {', '.join(parts.keys)} have {found} supervised tokens and image blocks, the index "
            f"says {planned}: the dataset is damaged, run `omnidata verify --deep`"
        )

    # --- images -------------------------------------------------------------------------------------------

    def _decoded(
        self, work: Work, read: list[tuple[Document, Sample | LoadError]], memory: np.ndarray | None
    ) -> np.ndarray:
        """uint8 ``[N, S, S, 3]``: every image goes straight into its place.

        A sample with an image that does not decode becomes a LoadError in ``read``.
        """
        size, num_bytes = self._images.size, self.num_bytes(work)
        memory = np.empty(num_bytes, np.uint8) if memory is None else memory[:num_bytes]
        rows, row = memory.reshape(-1, size, size, 3), 0
        for position, (document, sample) in enumerate(read):
            if isinstance(sample, LoadError):
                continue
            with self._reader.naming(document):
                try:
                    for number, data in enumerate(sample.images):
                        self._decode(data, work.epoch, document, number, out=rows[row + number])
                    row += len(sample.images)
                except RejectError as error:
                    read[position] = document, self._reader.error(document, error.detail)
        return rows[:row]

    def _decode(self, data: bytes, epoch: int, document: Document, number: int, *, out: np.ndarray) -> None:
        from omnidata.images.pixels import decode_resized, decode_rgb, fit_rgb

        size, augment, fit = self._images.size, self._images.augment, self._images.fit
        if augment is None and fit == "squash":
            decode_resized(data, size, size, out=out)
            return
        if augment is None:
            fit_rgb(decode_rgb(data), size, fit=fit, out=out)
            return
        # A dataset that an epoch passes twice counts on: the two passes differ.
        seed, key = self._images.seed + (document.passes << 32), document.place.key
        rgb = augment.apply(decode_rgb(data), seed=seed, epoch=epoch, key=key, number=number)
        fit_rgb(rgb, size, fit=fit, out=out)
