"""Slices: a picture larger than the model's square also enters as tiles, each seen at full size.

``choose_grid`` follows MiniCPM-V 2.x. A picture of the area of ``multiple`` tiles may be cut into
multiple - 1, multiple or multiple + 1 of them (never 1, never over ``max_slices``); of all grids with so many
tiles the one wins whose shape is nearest to the picture's::

    1344×896, tiles of 448   multiple 6   5×1 1×5  6×1 3×2 2×3 1×6  7×1 1×7   ->  3 columns × 2 rows
    448×448                  multiple 1                                       ->  whole

The overview is what the picture would be without slicing. The tiles are cut from the picture resized once to
columns·S × rows·S pixels, so no tile is resized again, and together they are that picture.

How far a picture is enlarged for that is bounded: with multiple tiles' worth of pixels or less, and more than
multiple - 1, there are at most multiple + 1 tiles, so their area is under (multiple + 1) / (multiple - 1)
times the picture's: 3 at most (just over one tile's worth, three in a row), 1.67 for five tiles, 1.29 for
nine. A picture of one tile's worth or less is never cut.

Build and inference call the same ``read_picture``, so a model sees a picture as it was trained on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from omnidata.images.header import MAX_PIXELS, read_header
from omnidata.images.pixels import decode_resized, encode_rgb, process_image
from omnidata.schema import SLICE_TOKENS, EncodedImage

Grid = tuple[int, int]  # columns, rows


@dataclass(frozen=True, slots=True)
class Slicing:
    """How large pictures are cut."""

    max_slices: int  # tiles per picture at most
    slice_size: int = 448  # pixels per side of a tile
    slice_tokens: tuple[str, str] = SLICE_TOKENS  # before and after a picture's tiles

    def to_json(self) -> dict[str, object]:
        """Plain JSON values, as a model's configuration carries them."""
        return asdict(self) | {"slice_tokens": list(self.slice_tokens)}


def slicing_of(settings: Mapping[str, Any] | None) -> Slicing | None:
    """The slicing in a manifest's settings or in what ``to_json`` gave; None: nothing is cut."""
    if not settings or not settings.get("max_slices"):
        return None
    start, end = settings["slice_tokens"]
    return Slicing(settings["max_slices"], settings["slice_size"], (start, end))


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture of a record as it is stored."""

    images: tuple[EncodedImage, ...]  # the overview, then the tiles row by row
    grid: Grid | None  # of the tiles; None: there are none
    size: tuple[int, int]  # (width, height) of the picture itself, upright


def read_picture(data: bytes, *, slicing: Slicing | None = None, **options: Any) -> Picture:
    """Verify a picture and make it ready to store; ``options`` are those of ``process_image``.

    Raises:
        RejectError: it cannot be trusted.
    """
    overview = process_image(data, **options)
    if slicing is None and overview.data is data:
        return Picture((overview,), None, (overview.width, overview.height))
    header = read_header(data, max_pixels=options.get("max_pixels", MAX_PIXELS))
    grid = None
    if slicing is not None:
        grid = choose_grid(*header.upright_size, slice_size=slicing.slice_size, max_slices=slicing.max_slices)
    if slicing is None or grid is None:
        return Picture((overview,), None, header.upright_size)
    size = grid[0] * slicing.slice_size, grid[1] * slicing.slice_size
    tiles = cut_tiles(decode_resized(data, *size), grid)
    lossless = header.lossless and size == header.upright_size  # as in process_image
    encoded = [encode_rgb(tile, lossless=lossless, quality=options.get("quality", 90)) for tile in tiles]
    return Picture((overview, *encoded), grid, header.upright_size)


def choose_grid(width: int, height: int, *, slice_size: int, max_slices: int) -> Grid | None:
    """(columns, rows) of the tiles of a picture; None if it stays whole."""
    multiple = min(-(-width * height // slice_size**2), max_slices)
    if multiple <= 1:
        return None
    counts = [n for n in (multiple - 1, multiple, multiple + 1) if 1 < n <= max_slices]
    grids = [(columns, n // columns) for n in counts for columns in range(1, n + 1) if n % columns == 0]
    shape = math.log(width / height)
    return min(grids, key=lambda grid: abs(shape - math.log(grid[0] / grid[1])))  # the first of equals


def cut_tiles(rgb: np.ndarray, grid: Grid) -> list[np.ndarray]:
    """uint8 ``[rows·S, columns·S, 3]`` -> tiles ``[S, S, 3]``, row by row."""
    columns, rows = grid
    return [tile for band in np.split(rgb, rows) for tile in np.split(band, columns, axis=1)]
