"""A smaller size to store a picture at: proposed here, taken only if the processor's answer is the same.

A processor resizes what it is given to a size of its own. A picture that is larger than that may be stored
smaller, if asked again it gets the same run of tokens and as many pixels. What training sees then differs a
little from the original's pixels (two resizes in place of one), so ``keep`` stays the default for processors.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt

from omnidata.profiles import Run, Size

MARGIN = 1.0  # times the processor's own number of pixels that is left, in area
STEPS = (1.0, 1.25, 1.6, 2.0, 2.8)  # of that area, tried in this order
CHANNELS = 3


def propose(sizes: tuple[Size, ...], runs: tuple[Run, ...]) -> Iterator[tuple[Size, ...]]:
    """Smaller sizes of the same shapes, the smallest first; nothing below what the tower is given."""
    tried: set[tuple[Size, ...]] = {sizes}
    for step in STEPS:
        proposed = tuple(
            _scaled(size, step * MARGIN * run.num_pixels / CHANNELS)
            for size, run in zip(sizes, runs, strict=True)
        )
        if proposed not in tried:
            tried.add(proposed)
            yield proposed


def _scaled(size: Size, area: float) -> Size:
    """``size`` at about ``area`` pixels, never enlarged, its shape kept as whole pixels allow."""
    width, height = size
    scale = sqrt(area / (width * height))
    if scale >= 1:
        return size
    return max(1, round(width * scale)), max(1, round(height * scale))
