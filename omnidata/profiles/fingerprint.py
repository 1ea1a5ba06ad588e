"""What a processor does, in numbers: its runs and pixels for fixed probe pictures, one to three per sample.

Kept in the manifest when a dataset is built, computed again by ``verify`` and by the loader. A release of
transformers that changed the processor is refused by name of what changed, and one that did not is not::

    {"runs": [["<|image_pad|>…", 300], …],
     "tensors": {"pixel_values": {"shape": […], "dtype": "float32", "values": [−1.79, …]}}}

Pixels are compared within ``TOLERANCE``: two processors (of computers) may round the same resize differently.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from omnidata.profiles import Size
from omnidata.profiles.tensors import pixel_tensors, probe_pictures
from omnidata.schema import RejectError, UserError

if TYPE_CHECKING:
    from omnidata.profiles.processor import ProcessorProfile

PROBES: tuple[tuple[Size, ...], ...] = (
    ((640, 480),),
    ((300, 500), (120, 90)),
    ((1200, 400), (64, 64), (500, 333)),
    ((37, 41),),
)
NUM_VALUES = 24  # of every tensor, evenly over it
TOLERANCE = 0.06  # of normalised values, about four of 255 levels; another filter moves edges by more
Fingerprint = dict[str, Any]


def fingerprint_of(profile: ProcessorProfile) -> Fingerprint:
    """The processor's answers, as plain JSON."""
    return {
        "runs": [_runs(profile, sizes) for sizes in PROBES],
        "image_token_ids": list(profile.image_token_ids),
        "tensors": [_tensors(profile, sizes, seed) for seed, sizes in enumerate(PROBES)],
    }


def _runs(profile: ProcessorProfile, sizes: tuple[Size, ...]) -> list[list[object]]:
    try:
        runs = profile.runs(sizes)
    except RejectError as error:
        return [["refused", str(error)]]
    return [[hashlib.sha256(run.text.encode()).hexdigest()[:16], run.num_tokens] for run in runs]


def _tensors(profile: ProcessorProfile, sizes: tuple[Size, ...], seed: int) -> dict[str, object]:
    try:
        tensors = pixel_tensors(profile, [probe_pictures(sizes, seed)])
    except ValueError as error:
        return {"refused": str(error)}
    return {name: _facts(tensor) for name, tensor in sorted(tensors.items())}


def _facts(tensor: Any) -> dict[str, object]:
    import torch

    flat = tensor.reshape(-1)
    places = torch.arange(min(NUM_VALUES, len(flat))) * max(len(flat) - 1, 0) // max(NUM_VALUES - 1, 1)
    values = [round(float(value), 4) for value in flat[places]]
    if tensor.is_floating_point() and len(flat) > 1:
        values += [round(float(tensor.float().mean()), 4), round(float(tensor.float().std()), 4)]
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch."), "values": values}


def describe(before: Fingerprint, now: Fingerprint) -> list[str]:
    """What differs, a line each; empty if the processor behaves as it did."""
    lines: list[str] = []
    if before["image_token_ids"] != now["image_token_ids"]:
        lines.append(f"image token ids were {before['image_token_ids']} and are {now['image_token_ids']}")
    for sizes, was, is_now in zip(PROBES, before["runs"], now["runs"], strict=True):
        if was != is_now:
            shown = " and ".join(f"{width}×{height}" for width, height in sizes)
            counts = [[item[1] for item in items] for items in (was, is_now)]
            kind = (
                f"took {counts[0]} tokens, now {counts[1]}" if counts[0] != counts[1] else "is another text"
            )
            lines.append(f"the run of pictures of {shown} {kind}")
    for sizes, was, is_now in zip(PROBES, before["tensors"], now["tensors"], strict=True):
        shown = " and ".join(f"{width}×{height}" for width, height in sizes)
        for name in sorted(was.keys() | is_now.keys()):
            if what := _difference(was.get(name), is_now.get(name)):
                lines.append(f"{name} of pictures of {shown}: {what}")
    return lines


def _difference(was: Any, is_now: Any) -> str:
    if was is None or is_now is None:
        return "is new" if was is None else "is gone"
    if isinstance(was, str) or isinstance(is_now, str):
        return "" if was == is_now else f"was {was!r} and is {is_now!r}"
    for key in ("shape", "dtype"):
        if was[key] != is_now[key]:
            return f"{key} was {was[key]} and is {is_now[key]}"
    limit = TOLERANCE if was["dtype"].startswith("float") else 0.0
    worst = max((abs(a - b) for a, b in zip(was["values"], is_now["values"], strict=True)), default=0.0)
    return f"values differ by up to {worst:.3g}" if worst > limit else ""


def check_fingerprint(profile: ProcessorProfile, expected: Fingerprint, *, where: str) -> None:
    """Refuse a processor that does not do what it did when the dataset was built.

    Raises:
        UserError: names what changed.
    """
    import transformers

    if changes := describe(expected, fingerprint_of(profile)):
        more = f" (and {len(changes) - 1} more)" if len(changes) > 1 else ""
        raise UserError(
            f"{where}: with transformers {transformers.__version__} the processor does not do what it did "
            f"when the dataset was built: {changes[0]}{more}. Use the release that the manifest names, or "
            "build anew"
        )
