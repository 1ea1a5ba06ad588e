"""Augment: small changes to training images that depend on (seed, epoch, key) and nothing else.

The same sample of the same epoch is changed alike whatever worker reads it and wherever a run was resumed.
Nothing is mirrored (left and right carry meaning in conversations), and cropping is off unless asked for: it
moves boxes and may remove what the text is about.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from hashlib import blake2b

import numpy as np

from omnidata.plan.order import mix
from omnidata.schema import UserError


@dataclass(frozen=True, slots=True)
class Augment:
    """How much images may change; all zero changes nothing."""

    crop: float = 0.0  # at most this share of either side is cut off
    brightness: float = 0.0  # factor between 1 - x and 1 + x
    contrast: float = 0.0  # factor between 1 - x and 1 + x, around the image's mean

    def __post_init__(self) -> None:
        for field in fields(self):
            if not 0 <= getattr(self, field.name) < 1:
                raise UserError(f"augment.{field.name} is {getattr(self, field.name)}, it must be in [0, 1)")

    def apply(self, rgb: np.ndarray, *, seed: int, epoch: int, key: str, number: int = 0) -> np.ndarray:
        """Change image ``number`` of a sample; uint8 ``[H, W, 3]`` before the resize."""
        left, right, top, bottom, brightness, contrast = _uniform(6, seed, epoch, key, number)
        rgb = self._cropped(rgb, left, right, top, bottom)
        scale = 1 + self.contrast * (2 * contrast - 1)
        light = 1 + self.brightness * (2 * brightness - 1)
        if scale == light == 1:
            return rgb
        table = np.arange(256) - float(rgb.mean())
        table = (table * scale + float(rgb.mean())) * light
        return np.clip(np.rint(table), 0, 255).astype(np.uint8)[rgb]

    def _cropped(self, rgb: np.ndarray, left: float, right: float, top: float, bottom: float) -> np.ndarray:
        height, width = rgb.shape[:2]
        half = self.crop / 2
        x0, x1 = int(left * half * width), width - int(right * half * width)
        y0, y1 = int(top * half * height), height - int(bottom * half * height)
        return rgb[y0:y1, x0:x1]


def _uniform(count: int, seed: int, epoch: int, key: str, number: int) -> list[float]:
    """Numbers in [0, 1)."""
    name = int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little")
    return [mix(seed, epoch, name, number, i) / 2**64 for i in range(count)]
