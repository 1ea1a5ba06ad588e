"""The layout of cut pictures, read back from a sample's ids: what the column ``slices`` must say.

    block block <slice> block block block, text, block block block </slice>
      ->  [[0, 0], [3, 2]]      a whole picture; one of 3 columns × 2 rows, its overview in front

Tiles of one row follow each other without a token between them.
"""

from __future__ import annotations

import numpy as np

from omnidata.images.slices import slicing_of
from omnidata.schema import IGNORE_INDEX, IM_START, Manifest, Sample


class LayoutError(ValueError):
    """The ids hold slice tokens or tiles where a build puts none."""


def slice_layout(sample: Sample, manifest: Manifest) -> list[list[int]]:
    """[columns, rows] of each picture, [0, 0] if it is whole; empty if the build cuts nothing.

    Raises:
        LayoutError: what is there is no layout; says at which token.
    """
    slicing = slicing_of(manifest.settings)
    if slicing is None:
        return []
    start, end = (manifest.special_tokens.get(token, -1) for token in slicing.slice_tokens)
    tokens = sample.input_ids
    width = manifest.num_query + 2
    layout: list[list[int]] = []
    rows: list[int] | None = None  # tiles in each row of the picture that is open
    last = -1  # where the tile before ends
    for at in np.flatnonzero(np.isin(tokens, (start, end, manifest.special_tokens[IM_START]))).tolist():
        if tokens[at] == start:
            if rows is not None or not layout or layout[-1] != [0, 0]:
                raise LayoutError(f"tiles at token {at} without an overview in front")
            rows, last = [], -1
        elif tokens[at] == end:
            if not rows or len(set(rows)) > 1:
                raise LayoutError(f"the tiles before token {at} form no grid: rows of {rows}")
            layout[-1], rows = [rows[0], len(rows)], None
        elif rows is None:
            layout.append([0, 0])
        elif at == last:
            rows[-1], last = rows[-1] + 1, at + width
        else:
            rows, last = [*rows, 1], at + width
    if rows is not None:
        raise LayoutError("the last picture's tiles have no end")
    return layout


def check_slices(sample: Sample, manifest: Manifest) -> str | None:
    """What is wrong with the sample's tiles, if anything."""
    try:
        slice_layout(sample, manifest)
    except LayoutError as error:
        return str(error)
    slicing = slicing_of(manifest.settings)
    ids = [manifest.special_tokens.get(token, -1) for token in slicing.slice_tokens] if slicing else []
    supervised = np.isin(sample.input_ids, ids) & (sample.labels != IGNORE_INDEX)
    return f"slice token supervised at {np.flatnonzero(supervised)[0]}" if supervised.any() else None
