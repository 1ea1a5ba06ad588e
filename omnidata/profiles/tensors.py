"""The pixel tensors of a whole pack, by the processor's own batching.

    pictures of each document, uint8 [3, H, W]  ->  one call, nested  ->  {"pixel_values": …, …}

Raw tensors are those of a call without rescaling and normalising: uint8 in most families, a quarter of the
memory to move. What is left to do is ``raw × scale + shift``, which is found by looking at black and at white
pictures, and used only if it gives the processor's own numbers on mixed packs too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from omnidata.profiles import Size

if TYPE_CHECKING:
    import torch

    from omnidata.profiles.processor import ProcessorProfile

TEXT_OUTPUTS = frozenset(
    ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "text_replacement_offsets")
)
RAW = {"do_rescale": False, "do_normalize": False}
TOLERANCE = 1e-5  # of normalised values: float32 rounding of values around 2
PROBES: tuple[tuple[Size, ...], ...] = (
    ((64, 48),),
    ((200, 120), (96, 224)),
    ((448, 448), (30, 61), (640, 100)),
)


def pixel_tensors(
    profile: ProcessorProfile, documents: Sequence[Sequence[torch.Tensor]], *, raw: bool = False
) -> dict[str, torch.Tensor]:
    """What the processor makes of the pictures of a pack.

    Args:
        profile: asked.
        documents: pictures uint8 ``[3, H, W]`` of each document; those without pictures may be there.
        raw: neither rescaled nor normalised.

    Returns:
        Named tensors as the model's forward takes them; empty if there is no picture.
    """
    nested = [list(pictures) for pictures in documents if len(pictures)]
    if not nested:
        return {}
    out = profile.processor(
        images=nested,
        text=[profile.image_token * len(pictures) for pictures in nested],
        return_tensors="pt",
        padding=True,  # of texts, which are left out below
        input_data_format="channels_first",
        **profile.arguments,
        **(RAW if raw else {}),
    )
    return {name: as_tensor(value) for name, value in out.items() if name not in TEXT_OUTPUTS}


def as_tensor(value: object) -> torch.Tensor:
    """A processor's output as one tensor; some give lists of equal ones."""
    import torch

    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
        return torch.stack(value)
    return torch.as_tensor(np.asarray(value))


def probe_pictures(sizes: Sequence[Size], seed: int = 0) -> list[torch.Tensor]:
    """Fixed pictures, uint8 ``[3, H, W]``: gradients with edges, alike on every machine."""
    import torch

    pictures = []
    for number, (width, height) in enumerate(sizes):
        y, x = np.mgrid[:height, :width]
        planes = [x * 255 // width + 16 * number, y * 255 // height, (x // 8 + y // 8) % 2 * 160 + 7 * seed]
        pictures.append(torch.from_numpy(np.stack(planes).astype(np.int64) % 256).to(torch.uint8))
    return pictures


# --- raw pixels ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Affine:
    """``raw × scale + shift``, both of a shape that broadcasts over the tensor."""

    scale: torch.Tensor
    shift: torch.Tensor
    _copies: dict[object, Any] = field(default_factory=dict, repr=False, compare=False)  # by device

    def __call__(self, raw: torch.Tensor) -> torch.Tensor:
        """Where ``raw`` is; scale and shift are copied there once."""
        if raw.device not in self._copies:
            self._copies[raw.device] = (self.scale.to(raw.device), self.shift.to(raw.device))
        scale, shift = self._copies[raw.device]
        return raw * scale + shift


@dataclass(frozen=True, slots=True)
class Normalisation:
    """What turns raw pixel tensors into the processor's own."""

    affines: Mapping[str, Affine]  # by the tensor's name

    def __call__(self, tensors: Mapping[str, torch.Tensor], dtype: object = None) -> dict[str, torch.Tensor]:
        """The tensors as the model wants them, on the device where they are; float32 unless ``dtype``."""
        return {name: self._one(name, tensor, dtype) for name, tensor in tensors.items()}

    def _one(self, name: str, tensor: torch.Tensor, dtype: Any) -> torch.Tensor:
        if name not in self.affines:
            return tensor
        scaled = self.affines[name](tensor)
        return scaled if dtype is None else scaled.to(dtype)


def find_normalisation(profile: ProcessorProfile) -> Normalisation | None:
    """How to use raw pixels; None if the processor's are no bytes or no such map gives its own numbers."""
    import torch

    names: dict[str, Affine] = {}
    black, white = (
        pixel_tensors(profile, [[torch.full((3, 448, 448), level, dtype=torch.uint8)]]) for level in (0, 255)
    )
    raw = pixel_tensors(profile, [probe_pictures([(448, 448)])], raw=True)
    for name, values in black.items():
        if values.is_floating_point():
            if name not in raw or raw[name].dtype != torch.uint8:
                return None
            shift = _narrowed(values)
            names[name] = Affine((_narrowed(white[name]) - shift) / 255, shift)
    found = Normalisation(names)
    packs = [[probe_pictures(sizes, seed) for seed, sizes in enumerate(PROBES)]]
    packs += [[pictures] for pictures in packs[0]]
    return found if names and all(_agrees(profile, found, pack) for pack in packs) else None


def _fits(found: Normalisation, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether every map broadcasts over its tensor without making it larger."""
    return all(
        name in tensors
        and tensors[name].ndim == part.ndim
        and all(one in (1, size) for one, size in zip(part.shape, tensors[name].shape, strict=True))
        for name, affine in found.affines.items()
        for part in (affine.scale, affine.shift)
    )


def _narrowed(values: torch.Tensor) -> torch.Tensor:
    """The tensor with every axis along which it is constant reduced to 1."""
    for axis in range(values.ndim):
        first = values.narrow(axis, 0, 1)
        if bool((values == first).all()):
            values = first
    return values


def _agrees(profile: ProcessorProfile, found: Normalisation, pack: Any) -> bool:
    own = pixel_tensors(profile, pack)
    raw = pixel_tensors(profile, pack, raw=True)
    if not _fits(found, raw):
        return False
    ours = found(raw)
    return own.keys() == ours.keys() and all(
        own[name].shape == ours[name].shape and bool(((own[name] - ours[name]).abs() <= TOLERANCE).all())
        for name in own
    )
