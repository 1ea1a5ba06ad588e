"""The runs of a sample's pictures, read back from its ids: image_starts, image_tokens and image_pixels.

OmniLMM's are blocks from ``<im_start>`` on. A processor is asked again, with the stored pictures' sizes, and
what it says must stand in the ids, run after run, with no other image token anywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from omnidata.profiles.omnilmm import OmniLMMProfile
from omnidata.schema import IGNORE_INDEX, IM_START, Manifest, RejectError, Sample
from omnidata.verify.slices import LayoutError

if TYPE_CHECKING:
    from omnidata.profiles.processor import ProcessorProfile

Row = dict[str, Any]


def omnilmm_columns(sample: Sample, manifest: Manifest) -> Row:
    """The columns of OmniLMM's blocks."""
    profile = OmniLMMProfile(manifest.num_query, manifest.image_size)
    starts = np.flatnonzero(sample.input_ids == manifest.special_tokens[IM_START]).tolist()
    return {
        "image_starts": starts,
        "image_tokens": [profile.image_tokens] * len(starts),
        "image_pixels": [profile.image_pixels] * len(sample.images),
    }


def run_columns(sample: Sample, profile: ProcessorProfile, sizes: list[list[int]], row: Row | None) -> Row:
    """The columns of a processor's runs.

    A run may begin or end with line ends that the tokenizer joined with the text beside it, so where the
    index row's places hold the whole run, they are right.

    Raises:
        LayoutError: the ids do not hold the runs; says which picture's.
    """
    try:
        runs = profile.runs(tuple((width, height) for width, height in sizes)) if sizes else ()
    except RejectError as error:
        raise LayoutError(str(error)) from error
    ids, position, starts, tokens, inside = sample.input_ids, 0, [], [], 0
    for number, run in enumerate(runs):
        core, whole = profile.core_ids(run.text), profile.run_ids(run.text)
        at = _find(ids, core, position)
        if at is None:
            width, height = sizes[number]
            raise LayoutError(
                f"the {run.num_tokens} tokens that stand for picture {number} ({width}×{height}) are not in "
                f"the ids from token {position} on"
            )
        position, inside = at + len(core), inside + _count(core, profile)
        starts.append(at - _shared_lead(ids, at, whole, core))
        tokens.append(len(whole))
    if (found := _count(ids, profile)) != inside:
        raise LayoutError(f"{found} image tokens in the ids, the pictures' runs hold {inside}")
    columns = {"image_starts": starts, "image_tokens": tokens, "image_pixels": [r.num_pixels for r in runs]}
    return columns | ({} if row is None else _places_of(row, ids, runs, profile))


def check_unsupervised(sample: Sample, columns: Row) -> str | None:
    """What is wrong with the labels of the runs, if anything."""
    supervised = sample.labels != IGNORE_INDEX
    for start, number in zip(columns["image_starts"], columns["image_tokens"], strict=True):
        if supervised[start : start + number].any():
            return f"image token supervised at {start + int(supervised[start : start + number].argmax())}"
    return None


def _find(ids: np.ndarray, wanted: np.ndarray, start: int) -> int | None:
    for at in (np.flatnonzero(ids[start:] == wanted[0]) + start).tolist():
        if np.array_equal(ids[at : at + len(wanted)], wanted):
            return at
    return None


def _count(ids: np.ndarray, profile: ProcessorProfile) -> int:
    return int(np.isin(ids, profile.image_token_ids).sum())


def _shared_lead(ids: np.ndarray, at: int, whole: np.ndarray, core: np.ndarray) -> int:
    """Tokens of the run before its first added one, as far as they stand in the ids."""
    lead = _find(whole, core, 0) or 0
    while lead and not np.array_equal(ids[max(at - lead, 0) : at], whole[:lead]):
        lead -= 1
    return lead


def _places_of(row: Row, ids: np.ndarray, runs: Any, profile: ProcessorProfile) -> Row:
    """The row's places, if each holds its run's core, within a token or two."""
    places = list(zip(row["image_starts"], row["image_tokens"], strict=False))
    if len(places) != len(runs):
        return {}
    for (start, number), run in zip(places, runs, strict=True):
        core = profile.core_ids(run.text)
        at = _find(ids[start : start + number], core, 0)
        if at is None or number > run.num_tokens + 2:
            return {}
    return {"image_starts": row["image_starts"], "image_tokens": row["image_tokens"]}
