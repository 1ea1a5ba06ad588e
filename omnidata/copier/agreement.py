"""Agreement: what must be equal in datasets whose samples are to stand in one.

Ids must mean the same (tokenizer, special tokens, profile of pictures), turns must begin and end alike (chat
template, end of turn), and whatever a manifest says of all samples at once must be true of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from omnidata.images.slices import slicing_of
from omnidata.profiles.fingerprint import describe
from omnidata.schema import Manifest, UserError

if TYPE_CHECKING:
    from omnidata.dataset import Dataset

EQUAL = (
    *("tokenizer_fingerprint", "chat_template_fingerprint", "special_tokens", "end_of_turn", "vocab_size"),
)
# Which release ran is no part of what a processor does; its answers are compared within their tolerance.
_NOT_COMPARED = ("transformers", "fingerprint")


def check_agreement(datasets: Sequence[Dataset]) -> None:
    """Refuse datasets that do not fit into one.

    Raises:
        UserError: lists everything in which any of them differs from the first.
    """
    first = datasets[0]
    lines = [
        f"\n  {other.path}: {what}"
        for other in datasets[1:]
        for what in differences(first.manifest, other.manifest)
    ]
    if lines:
        raise UserError(
            f"these datasets do not fit into one: compared with {first.path},{''.join(lines)}\n"
            "Build them with the same settings, or name them all in a recipe's `data`: it mixes what it can."
        )


def differences(first: Manifest, other: Manifest) -> Iterator[str]:
    """Everything in which samples of the two cannot stand beside each other, a phrase each."""
    for name in EQUAL:
        if (was := getattr(first, name)) != (found := getattr(other, name)):
            yield f"{name} is {found}, not {was}"
    keys = sorted((first.profile.keys() | other.profile.keys()) - set(_NOT_COMPARED))
    for key in keys:
        if (was := first.profile.get(key)) != (found := other.profile.get(key)):
            yield f"{key} of the profile is {found!r}, not {was!r}"
    if all("fingerprint" in manifest.profile for manifest in (first, other)):
        yield from describe(first.profile["fingerprint"], other.profile["fingerprint"])
    for what, was, found in _settings(first, other):
        if was != found:
            yield f"{what} is {found}, not {was}"


def _settings(first: Manifest, other: Manifest) -> Iterator[tuple[str, object, object]]:
    """(what, in the first, in the other) of settings that a dataset has once for all of its samples."""
    yield "the cutting of pictures (--max-slices)", slicing_of(first.settings), slicing_of(other.settings)
    was, found = (m.settings.get("image_fit", "squash") for m in (first, other))
    yield "--image-fit", was, found
    # By these a conversation is rendered again: one value for all, or `omnidata render` would change some.
    was, found = (m.settings.get("train_on", "all") for m in (first, other))
    yield "--train-on", was, found
    yield "--system", first.settings.get("system"), other.settings.get("system")
    was, found = (sorted(m.settings.get("content_token", ())) for m in (first, other))
    yield "--content-token", was, found
