"""Squares: OmniLMM's pictures, each brought to one size, straight into its place in memory.

stored images  ──decode, (augment), resize──▶  uint8 [N, S, S, 3]
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from omnidata.loader.augment import Augment
from omnidata.loader.reader import Document, Work
from omnidata.schema import Sample


@dataclass(frozen=True, slots=True)
class Squares:
    """What becomes of OmniLMM's images."""

    size: int  # pixels per side of the square that they become
    fit: str = "squash"  # squash | center_crop
    augment: Augment | None = None
    seed: int = 0  # of the augmentation

    def num_bytes(self, work: Work) -> int:
        """Room that the images of ``work`` take."""
        return sum(document.num_images for document in work.documents) * self.size**2 * 3

    def rows(self, work: Work, memory: np.ndarray | None) -> np.ndarray:
        """uint8 ``[N, S, S, 3]`` to fill, in ``memory`` if there is some."""
        num_bytes = self.num_bytes(work)
        memory = np.empty(num_bytes, np.uint8) if memory is None else memory[:num_bytes]
        return memory.reshape(-1, self.size, self.size, 3)

    def fill(self, rows: np.ndarray, sample: Sample, document: Document, *, epoch: int) -> None:
        """Decode a sample's images into ``rows``, one each; RejectError if one does not decode."""
        for number, data in enumerate(sample.images):
            self._decode(data, epoch, document, number, out=rows[number])

    def _decode(self, data: bytes, epoch: int, document: Document, number: int, *, out: np.ndarray) -> None:
        from omnidata.images.pixels import decode_resized, decode_rgb, fit_rgb

        if self.augment is None and self.fit == "squash":
            decode_resized(data, self.size, self.size, out=out)
            return
        if self.augment is None:
            fit_rgb(decode_rgb(data), self.size, fit=self.fit, out=out)
            return
        rgb = augmented(self.augment, decode_rgb(data), document, number, seed=self.seed, epoch=epoch)
        fit_rgb(rgb, self.size, fit=self.fit, out=out)


def augmented(
    augment: Augment, rgb: np.ndarray, document: Document, number: int, *, seed: int, epoch: int
) -> np.ndarray:
    """A changed picture. A dataset that an epoch passes twice counts on: the two passes differ."""
    seed += document.passes << 32
    return augment.apply(rgb, seed=seed, epoch=epoch, key=document.place.key, number=number)
