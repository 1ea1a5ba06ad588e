"""Augment: small changes to training images that depend on (seed, epoch, key) and nothing else.

The same sample of the same epoch is changed alike whatever worker reads it and wherever a run was resumed.
Everything is off unless asked for. ``crop`` and ``rotation`` move boxes and may remove what the text is
about; ``flip`` exchanges left and right, which carry meaning in conversations.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields
from hashlib import blake2b

import numpy as np

from omnidata.plan.order import mix
from omnidata.schema import UserError

MAX_ROTATION = 180.0  # degrees
YIQ_TO_RGB = np.array(
    [
        [1.0, 0.9468822170900693, 0.6235565819861433],
        [1.0, -0.27478764629897834, -0.6356910791873801],
        [1.0, -1.1085450346420322, 1.7090069284064666],
    ]
)


@dataclass(frozen=True, slots=True)
class Augment:
    """How much images may change; all zero changes nothing."""

    crop: float = 0.0  # at most this share of either side is cut off
    brightness: float = 0.0  # factor between 1 - x and 1 + x
    contrast: float = 0.0  # factor between 1 - x and 1 + x, around the image's mean
    rotation: float = 0.0  # degrees, at most, to either side; what comes in at the corners is white
    saturation: float = 0.0  # factor between 1 - x and 1 + x, around each pixel's gray
    hue: float = 0.0  # at most this share of the colour circle, to either side
    flip: float = 0.0  # probability that left and right are exchanged

    def __post_init__(self) -> None:
        for field in fields(self):
            most = MAX_ROTATION if field.name == "rotation" else 0.5 if field.name == "hue" else 1.0
            value = getattr(self, field.name)
            if not 0 <= value <= most or (value == most and field.name in ("crop", "brightness", "contrast")):
                raise UserError(f"augment.{field.name} is {value}, it must be in [0, {most:g})")
        if self.flip:
            warnings.warn(
                f"augment.flip {self.flip:g} exchanges left and right in pictures, not in their texts",
                stacklevel=2,
            )

    def apply(self, rgb: np.ndarray, *, seed: int, epoch: int, key: str, number: int = 0) -> np.ndarray:
        """Change image ``number`` of a sample; uint8 ``[H, W, 3]`` before the resize."""
        left, right, top, bottom, brightness, contrast, *more = _uniform(10, seed, epoch, key, number)
        rotation, saturation, hue, flip = more
        rgb = self._rotated(rgb, self.rotation * (2 * rotation - 1))
        rgb = self._cropped(rgb, left, right, top, bottom)
        rgb = _coloured(rgb, 1 + self.saturation * (2 * saturation - 1), self.hue * (2 * hue - 1))
        rgb = self._lit(
            rgb, 1 + self.contrast * (2 * contrast - 1), 1 + self.brightness * (2 * brightness - 1)
        )
        return np.ascontiguousarray(rgb[:, ::-1]) if flip < self.flip else rgb

    @staticmethod
    def _lit(rgb: np.ndarray, scale: float, light: float) -> np.ndarray:
        if scale == light == 1:
            return rgb
        table = np.arange(256) - float(rgb.mean())
        table = (table * scale + float(rgb.mean())) * light
        return np.clip(np.rint(table), 0, 255).astype(np.uint8)[rgb]

    @staticmethod
    def _rotated(rgb: np.ndarray, degrees: float) -> np.ndarray:
        if degrees == 0:
            return rgb
        from PIL import Image

        turned = Image.fromarray(rgb).rotate(degrees, Image.Resampling.BICUBIC, fillcolor=(255, 255, 255))
        return np.array(turned)

    def _cropped(self, rgb: np.ndarray, left: float, right: float, top: float, bottom: float) -> np.ndarray:
        height, width = rgb.shape[:2]
        half = self.crop / 2
        x0, x1 = int(left * half * width), width - int(right * half * width)
        y0, y1 = int(top * half * height), height - int(bottom * half * height)
        return rgb[y0:y1, x0:x1]


def _coloured(rgb: np.ndarray, saturation: float, hue: float) -> np.ndarray:
    """Both are one linear map of a pixel's colour, which leaves gray as it is.

    The hue turns around the gray axis by ``hue`` of a full circle (in YIQ, as Python's colorsys has it).
    """
    if saturation == 1 and hue == 0:
        return rgb
    turn = 2 * np.pi * hue
    rotation = np.array([[1, 0, 0], [0, np.cos(turn), -np.sin(turn)], [0, np.sin(turn), np.cos(turn)]])
    change = YIQ_TO_RGB @ np.diag([1, saturation, saturation]) @ rotation @ np.linalg.inv(YIQ_TO_RGB)
    return np.clip(np.rint(rgb @ change.T.astype(np.float32)), 0, 255).astype(np.uint8)


def _uniform(count: int, seed: int, epoch: int, key: str, number: int) -> list[float]:
    """Numbers in [0, 1)."""
    name = int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little")
    return [mix(seed, epoch, name, number, i) / 2**64 for i in range(count)]
