"""Assembler: documents -> Parts. What a worker process does; it holds no index, no order and no state.

SampleReader.read            one ranged read per sample
Squares | ProcessorPixels    decode, (augment), then a square, or the model's own processor
lay_out                      ids and labels end to end
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from omnidata.loader.microbatch import Parts, lay_out
from omnidata.loader.processor_pixels import ProcessorPixels
from omnidata.loader.reader import LESS_MEMORY, Document, LoadError, OutOfMemoryError, SampleReader, Work
from omnidata.loader.squares import Squares
from omnidata.plan.places import Place
from omnidata.schema import IGNORE_INDEX, RejectError, Sample

OnError = Literal["raise", "skip"]
Reads = list[tuple[Document, Sample | LoadError]]


class Assembler:
    """Reads and lays out microbatches, in a worker or in the training process.

    Args:
        reader: of the samples.
        images: what becomes of the pictures; None hands on the encoded bytes.
        on_error: see PackLoader.
        im_start: id that opens an image block; None: a processor's dataset.
    """

    def __init__(
        self,
        reader: SampleReader,
        *,
        images: Squares | ProcessorPixels | None,
        on_error: OnError,
        im_start: int | None,
    ) -> None:
        self._reader, self._images = reader, images
        self._on_error, self._im_start = on_error, im_start

    @property
    def has_processor(self) -> bool:
        """Do pictures go through a model's own processor?"""
        return isinstance(self._images, ProcessorPixels)

    def num_bytes(self, work: Work) -> int:
        """Room to lend for the images of ``work``."""
        if self._images is None:
            return sum(document.place.nbytes for document in work.documents if document.num_images)
        return self._images.num_bytes(work)

    def assemble(self, work: Work, memory: np.ndarray | None = None) -> Parts | LoadError:
        """Read and lay out one microbatch.

        Args:
            work: what to read.
            memory: uint8, at least ``num_bytes(work)``, where squares are decoded to; None: ordinary memory.

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

    def of_samples(self, samples: list[Sample]) -> Parts | LoadError:
        """The microbatch of samples that somebody else has read."""
        documents = [
            Document(0, Place("", 0, 0, sample.key, ""), len(sample.input_ids), len(sample.images), 0)
            for sample in samples
        ]
        number = sum(int(np.count_nonzero(sample.labels[1:] != IGNORE_INDEX)) for sample in samples)
        work = Work(tuple(documents), number, epoch=0)
        return self._laid_out(work, list(zip(documents, samples, strict=True)), None)

    def _assembled(self, work: Work, memory: np.ndarray | None) -> Parts | LoadError:
        read = list(zip(work.documents, self._reader.read(work.documents), strict=True))
        return self._laid_out(work, read, memory)

    def _laid_out(self, work: Work, read: Reads, memory: np.ndarray | None) -> Parts | LoadError:
        squares, pictures = None, []
        if isinstance(self._images, Squares):
            squares = self._squares(self._images, work, read, memory)
        elif self._images is not None:
            pictures = self._pictures(self._images, work, read)
        kept = [sample for _, sample in read if isinstance(sample, Sample)]
        failed = [sample for _, sample in read if isinstance(sample, LoadError)]
        if failed and self._on_error == "raise":
            return failed[0]
        if isinstance(self._images, ProcessorPixels):
            parts = _with_processor(self._images, kept, pictures, num_skipped=len(failed))
        else:
            files = tuple([image for sample in kept for image in sample.images])
            images = files if squares is None else squares
            parts = lay_out(kept, images, im_start=self._im_start, num_skipped=len(failed))
        if isinstance(parts, LoadError):
            return parts
        pixels = sum(sum(document.image_pixels) for document, sample in read if isinstance(sample, Sample))
        parts = replace(parts, groups=_groups(read), num_pixels=pixels)
        if failed:
            return parts
        return self._checked(parts, work, sum(len(sample.images) for sample in kept))

    def _checked(self, parts: Parts, work: Work, num_images: int) -> Parts | LoadError:
        blocks = num_images if self._im_start is None else len(parts.image_positions)
        found = int(np.count_nonzero(parts.labels != IGNORE_INDEX)), blocks
        planned = work.num_supervised, sum(document.num_images for document in work.documents)
        if found == planned:
            return parts
        return LoadError(
            f"the samples {', '.join(parts.keys)} have {found} supervised tokens and image blocks, the index "
            f"says {planned}: the dataset is damaged, run `omnidata verify --deep`"
        )

    # --- images -------------------------------------------------------------------------------------------

    def _squares(self, images: Squares, work: Work, read: Reads, memory: np.ndarray | None) -> np.ndarray:
        """uint8 ``[N, S, S, 3]``: every image goes straight into its place.

        A sample with an image that does not decode becomes a LoadError in ``read``.
        """
        rows, row = images.rows(work, memory), 0
        for position, (document, sample) in enumerate(read):
            if isinstance(sample, LoadError):
                continue
            with self._reader.naming(document):
                try:
                    images.fill(rows[row:], sample, document, epoch=work.epoch)
                    row += len(sample.images)
                except RejectError as error:
                    read[position] = document, self._reader.error(document, error.detail)
        return rows[:row]

    def _pictures(self, images: ProcessorPixels, work: Work, read: Reads) -> list[list]:
        """The decoded pictures of each sample that is there; as above."""
        pictures = []
        for position, (document, sample) in enumerate(read):
            if isinstance(sample, LoadError):
                continue
            with self._reader.naming(document):
                try:
                    pictures.append(images.decode(sample, document, epoch=work.epoch))
                except RejectError as error:
                    read[position] = document, self._reader.error(document, error.detail)
        return pictures


def _with_processor(
    images: ProcessorPixels, samples: list[Sample], pictures: list[list], *, num_skipped: int
) -> Parts | LoadError:
    keys = ", ".join(sample.key for sample in samples)
    has_dummy = images.with_dummy and not any(pictures)
    if has_dummy:
        dummy = images.dummy
        samples, pictures = [*samples, dummy.sample], [*pictures, [dummy.picture()]]
    try:
        tensors = images.tensors(pictures)
        position_ids = images.position_ids(samples, tensors)
    except (ValueError, RuntimeError, IndexError) as error:  # what processors raise on pictures
        return LoadError(f"the processor fails on the pictures of the samples {keys}: {error}")
    return lay_out(
        samples,
        tensors,
        image_token_ids=images.profile.image_token_ids,
        position_ids=position_ids,
        num_skipped=num_skipped,
        has_dummy=has_dummy,
    )


def _groups(read: Reads) -> np.ndarray | None:
    """int64 ``[D]``: what the documents that were read are counted under; None if nothing is."""
    groups = [document.group for document, sample in read if isinstance(sample, Sample)]
    return np.array(groups, np.int64) if groups and groups[0] is not None else None
