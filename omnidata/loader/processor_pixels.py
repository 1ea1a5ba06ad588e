"""ProcessorPixels: the pictures of a microbatch through the model's own processor, in one call.

stored images  ──decode, (augment)──▶  uint8 [3, H, W]  ──processor──▶  {"pixel_values": …, …}, positions
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from omnidata.loader.augment import Augment
from omnidata.loader.reader import Document, Work
from omnidata.loader.squares import augmented
from omnidata.schema import IGNORE_INDEX, RejectError, Sample, UserError

if TYPE_CHECKING:
    from omnidata.profiles.processor import ProcessorProfile

ALIGNMENT = 64  # bytes between tensors in shared memory
BYTES_PER_VALUE = 4  # float32; raw ones take one
FACTS = 4096  # bytes per picture for the small tensors about it
DUMMY_SIDES = (32, 56, 64, 112, 224, 448)  # pixels; the one of the fewest tokens is taken


@dataclass(frozen=True, eq=False)
class Dummy:
    """A document of one small black picture with nothing supervised, for packs without any picture."""

    sample: Sample
    side: int  # pixels
    num_pixels: int  # values of its tensors

    def picture(self) -> Any:
        """Decoded, uint8 ``[3, side, side]``."""
        import torch

        return torch.zeros(3, self.side, self.side, dtype=torch.uint8)


@dataclass(frozen=True)
class ProcessorPixels:
    """What becomes of a processor's images.

    Args:
        profile: asked.
        folder: the processor's, with the model's config.json if there is one.
        positions: ``mrope`` or ``1d``.
        raw: tensors neither rescaled nor normalised.
        with_dummy: documents without any picture get the ``dummy`` behind them.
    """

    profile: ProcessorProfile
    folder: str
    positions: str
    raw: bool = False
    augment: Augment | None = None
    seed: int = 0  # of the augmentation
    with_dummy: bool = False

    def __post_init__(self) -> None:
        if self.augment is not None and self.augment.crop:
            raise UserError("augment.crop changes a picture's size, and so its tokens: not with a processor")

    def num_bytes(self, work: Work) -> int:
        """Room that the tensors take, if no picture is padded far beyond the largest; else they are sent."""
        pixels = [pixels for document in work.documents for pixels in document.image_pixels]
        if not pixels and self.with_dummy:
            pixels = [self.dummy.num_pixels]
        return len(pixels) * (max(pixels, default=0) * (1 if self.raw else BYTES_PER_VALUE) + FACTS)

    def decode(self, sample: Sample, document: Document, *, epoch: int) -> list[Any]:
        """A sample's pictures, uint8 ``[3, H, W]``; RejectError if one does not decode."""
        import torch

        from omnidata.images.pixels import decode_rgb

        pictures = []
        for number, data in enumerate(sample.images):
            rgb = decode_rgb(data)
            if self.augment is not None:
                rgb = augmented(self.augment, rgb, document, number, seed=self.seed, epoch=epoch)
            pictures.append(torch.from_numpy(np.require(rgb, requirements=["C", "W"])).permute(2, 0, 1))
        return pictures

    @cached_property
    def dummy(self) -> Dummy:
        """The document of the fewest tokens."""
        found = []
        for side in DUMMY_SIDES:
            try:
                [run] = self.profile.runs(((side, side),))
            except RejectError:
                continue
            found.append((run.num_tokens, side, run))
        if not found:
            raise UserError(
                f"{type(self.profile.processor).__name__} takes no square picture of {DUMMY_SIDES}"
            )
        _, side, run = min(found, key=lambda each: each[:2])
        ids = self.profile.run_ids(run.text)
        labels = np.full(len(ids), IGNORE_INDEX, np.int32)
        # One "image", so that positions count it; its bytes are never read.
        return Dummy(Sample("", ids, labels, (b"",)), side, run.num_pixels)

    def tensors(self, pictures: Sequence[Sequence[Any]]) -> dict[str, np.ndarray]:
        """The processor's tensors of all documents' pictures, by name."""
        from omnidata.profiles.tensors import pixel_tensors

        found = pixel_tensors(self.profile, pictures, raw=self.raw)
        return {name: np.ascontiguousarray(as_numpy_has(tensor).numpy()) for name, tensor in found.items()}

    def position_ids(self, samples: Sequence[Sample], tensors: dict[str, np.ndarray]) -> np.ndarray | None:
        """int64 ``[4, T]``; None: 1-D, as everywhere else."""
        if self.positions != "mrope" or not samples:
            return None
        import torch

        from omnidata.profiles.positions import mrope_positions

        return mrope_positions(
            self.folder,
            [sample.input_ids for sample in samples],
            [len(sample.images) for sample in samples],
            {name: torch.from_numpy(array) for name, array in tensors.items()},
            self.profile.image_token_ids,
        )


# --- through shared memory ----------------------------------------------------------------------------------

Layout = tuple[tuple[str, str, tuple[int, ...], int], ...]  # name, dtype, shape, first byte


def pack_tensors(tensors: dict[str, np.ndarray], memory: np.ndarray) -> Layout | None:
    """Copy tensors into ``memory``, uint8; where they lie, or None if they do not fit."""
    layout, at = [], 0
    for name, array in tensors.items():
        layout.append((name, array.dtype.str, array.shape, at))
        at += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    if at > len(memory):
        return None
    for (_, _, _, first), array in zip(layout, tensors.values(), strict=True):
        memory[first : first + array.nbytes] = array.reshape(-1).view(np.uint8)
    return tuple(layout)


def unpack_tensors(layout: Layout, flat: np.ndarray) -> dict[str, np.ndarray]:
    """Views of the tensors in ``flat``, uint8; each keeps it alive."""
    tensors = {}
    for name, dtype, shape, first in layout:
        num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        tensors[name] = flat[first : first + num_bytes].view(dtype).reshape(shape)
    return tensors


def as_numpy_has(tensor: Any) -> Any:
    """bfloat16, which some processors give, as float32: numpy has no such numbers."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() == 2 else tensor
