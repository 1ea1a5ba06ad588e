"""What a model makes of pictures. Nothing else in the project asks a model family anything.

    omnilmm.py      squares of image_size pixels, num_query tokens each, tiles with --max-slices
    processor.py    any processor of transformers, asked without a pixel for the runs of tokens
    opening.py      the profile of a dataset, opened once per process
    folder.py       a processor's files: the model's folder, the dataset's
    shrinking.py    a smaller size to store whose runs are proven equal
    tensors.py      the pixel tensors of a whole pack, by the processor's own batching
    positions.py    1-D positions, or M-RoPE for each document
    fingerprint.py  what the processor does with fixed probe pictures, piece by piece

Only the processor's modules load torch and transformers, and only when they are used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

OMNILMM, PROCESSOR = "omnilmm", "processor"
Size = tuple[int, int]  # (width, height) in pixels


@dataclass(frozen=True, slots=True)
class Run:
    """What stands for one picture in the text, and what the tower is given for it."""

    text: str  # exact; its tokens are the model's own
    num_tokens: int
    num_pixels: int  # values of its pixel tensors


class Profile(Protocol):
    """What the renderer, the builder and verify ask."""

    image_token: str  # what the chat template prints for a picture

    def runs(self, sizes: tuple[Size, ...]) -> tuple[Run, ...]:
        """The run of each of one sample's pictures; RejectError ``image_shape`` if there is none."""
        ...

    def smaller(self, sizes: tuple[Size, ...]) -> tuple[Size, ...]:
        """Sizes to store the pictures at under ``--image-policy shrink``; their runs are equal."""
        ...

    def to_json(self) -> dict[str, object]:
        """The manifest's ``profile``."""
        ...
