"""Assembler: documents -> Parts. What a worker process does; it holds no index, no order and no state.

SampleReader.read        one ranged read a sample
decode, (augment), resize   each image straight into its place in shared memory
lay_out                  ids and labels end to end
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from omnidata.loader.augment import Augment
from omnidata.loader.microbatch import Parts, lay_out
from omnidata.loader.reader import Document, LoadError, SampleReader
from omnidata.schema import IGNORE_INDEX, RejectError, Sample

if TYPE_CHECKING:
    import torch

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

    size: int  # pixels; squashed to size x size
    decode: bool = True  # False hands on the encoded bytes
    augment: Augment | None = None
    seed: int = 0  # of the augmentation


class Assembler:
    """Reads and lays out one microbatch: ``assembler[work]``, as torch's DataLoader calls it."""

    def __init__(
        self, reader: SampleReader, *, images: ImageSettings, on_error: OnError, im_start: int
    ) -> None:
        self._reader, self._images = reader, images
        self._on_error, self._im_start = on_error, im_start

    def __getitem__(self, work: Work) -> Parts | LoadError:
        """A LoadError is returned, not raised: torch would wrap it in a worker's traceback."""
        read = list(zip(work.documents, self._reader.read(work.documents), strict=True))
        images = self._decoded(work, read) if self._images.decode else None
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

    def _decoded(self, work: Work, read: list[tuple[Document, Sample | LoadError]]) -> torch.Tensor:
        """uint8 [N, 3, S, S], in channels-last memory: no transposition on the CPU.

        A sample with an image that does not decode becomes a LoadError in ``read``.
        """
        size = self._images.size
        batch = _shared(sum(document.num_images for document in work.documents), size)
        rows, row = batch.numpy(), 0
        for position, (document, sample) in enumerate(read):
            if isinstance(sample, LoadError):
                continue
            try:
                for number, data in enumerate(sample.images):
                    rows[row + number] = self._decode(data, work.epoch, document, number)
                row += len(sample.images)
            except RejectError as error:
                read[position] = document, self._reader.error(document, error.detail)
        return batch[:row].permute(0, 3, 1, 2)

    def _decode(self, data: bytes, epoch: int, document: Document, number: int) -> np.ndarray:
        from omnidata.images.pixels import decode_resized, decode_rgb, resize_rgb

        size, augment = self._images.size, self._images.augment
        if augment is None:
            return decode_resized(data, size, size)
        # A dataset that an epoch passes twice counts on: the two passes differ.
        seed, key = self._images.seed + (document.passes << 32), document.place.key
        rgb = augment.apply(decode_rgb(data), seed=seed, epoch=epoch, key=key, number=number)
        return resize_rgb(rgb, size, size)


def _shared(count: int, size: int) -> torch.Tensor:
    """uint8 [count, size, size, 3]; in a worker, in memory that the training process can map.

    ``torch.utils.data.default_collate`` does the same: a tensor in ordinary memory would be copied.
    """
    import torch

    shape = (count, size, size, 3)
    if torch.utils.data.get_worker_info() is None or not count:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(count * size * size * 3)
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)
