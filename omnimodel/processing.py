"""Pixels for the model: a square, bicubic with antialiasing, the tower's mean and standard deviation.

The whole image is squashed, as the original does at evaluation, or (``center_crop``) its centre is cut, which
loses half of an image of 2:1. Resizing runs on uint8 exactly as the training loader does it.

>>> ImageProcessor(448)(PIL.Image.open("photo.jpg")).shape
torch.Size([3, 448, 448])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from omnimodel import vision


class ImageProcessor:
    """``ImageProcessor(448)(image)`` -> float32 ``[3, 448, 448]``; a list -> ``[N, 3, 448, 448]``."""

    def __init__(
        self,
        image_size: int = 448,
        image_fit: str = "squash",
        *,
        image_mean: Sequence[float] | None = None,  # None: CLIP's; a model's config has its tower's
        image_std: Sequence[float] | None = None,
    ) -> None:
        if image_size < 1:
            raise ValueError(f"image_size={image_size} must be positive")
        if image_fit not in ("squash", "center_crop"):
            raise ValueError(f"image_fit={image_fit!r}: squash and center_crop are known")
        self.image_size, self.image_fit = image_size, image_fit
        self.image_mean, self.image_std = image_mean or vision.CLIP_MEAN, image_std or vision.CLIP_STD

    def __call__(self, images: Any) -> torch.Tensor:
        """PIL images or uint8 arrays ``[H, W, 3]`` / ``[H, W]``, one or a list."""
        if isinstance(images, Sequence):
            if not images:
                return torch.empty(0, 3, self.image_size, self.image_size)
            return self.normalize(torch.stack([self.resize(image) for image in images]))
        return self.normalize(self.resize(images))

    def resize(self, image: Any) -> torch.Tensor:
        """One image -> uint8 ``[3, S, S]``."""
        rgb = torch.from_numpy(as_rgb(image)).permute(2, 0, 1)[None]
        size = (self.image_size, self.image_size)
        if self.image_fit == "center_crop":
            side = min(rgb.shape[-2:])
            top, left = ((length - side) // 2 for length in rgb.shape[-2:])
            rgb = rgb[..., top : top + side, left : left + side].contiguous()
        if tuple(rgb.shape[-2:]) == size:
            return rgb[0].contiguous()
        return F.interpolate(rgb, size=size, mode="bicubic", antialias=True)[0].contiguous()

    def normalize(self, images: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """uint8 ``[..., 3, H, W]`` -> normalised, on its own device."""
        return vision.normalize(images, dtype, mean=self.image_mean, std=self.image_std)


def as_rgb(image: Any) -> np.ndarray:
    """A PIL image or array -> contiguous uint8 ``[H, W, 3]`` of its own."""
    if hasattr(image, "convert"):  # PIL, without importing it
        image = image.convert("RGB")
    array = np.array(image)
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, axis=2)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(
            f"expected a PIL image or a uint8 array [H, W, 3], got {array.dtype} {array.shape}; "
            "convert 16-bit and float images to 8 bits first"
        )
    return np.ascontiguousarray(array)
