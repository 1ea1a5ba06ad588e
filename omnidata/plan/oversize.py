"""Oversize: samples that are longer, or have more images, than a pack holds.

A recipe refuses them (nothing trains until somebody decides), leaves them out and counts them, or cuts them.
A cut ends right after a reply, so no image block and no supervised turn is broken::

    <s> system  user <img> ...  reply </s>  user ...  reply </s>  user ...  reply </s>
                                          ^ may end here        ^ or here
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from omnidata.schema import IGNORE_INDEX

Oversize = Literal["refuse", "cut", "leave_out"]


def cut_length(
    labels: np.ndarray, image_starts: np.ndarray, *, max_tokens: int, max_images: int | None
) -> tuple[int, int, int] | None:
    """How much of a sample to keep.

    Args:
        labels: int32 ``[L]``, unshifted.
        image_starts: position of each image's ``<im_start>``.

    Returns:
        Tokens, supervised tokens and images of the longest prefix that ends with a reply and fits, or None
        when not even the first reply fits.
    """
    supervised = np.append(labels != IGNORE_INDEX, False)
    ends = np.flatnonzero(supervised[:-1] & ~supervised[1:]) + 1
    images = np.searchsorted(image_starts, ends)
    fits = ends <= max_tokens
    if max_images is not None:
        fits &= images <= max_images
    if not fits.any():
        return None
    last = np.flatnonzero(fits)[-1]
    return int(ends[last]), int(supervised[: ends[last]].sum()), int(images[last])
