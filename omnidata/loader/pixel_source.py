"""Pixel source: a processor's datasets load with their own processor, proven to behave as at the build."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from omnidata.loader.processor_pixels import ProcessorPixels
from omnidata.schema import UserError

if TYPE_CHECKING:
    from omnidata.dataset import Dataset
    from omnidata.loader.augment import Augment
    from omnidata.profiles.processor import ProcessorProfile
    from omnidata.profiles.tensors import Normalisation


def open_pixels(
    datasets: Sequence[Dataset],
    *,
    raw: bool | None,
    augment: Augment | None,
    seed: int,
    with_dummy: bool = False,
) -> ProcessorPixels:
    """The first dataset's processor; that of every dataset must do what it did when it was built.

    ``raw``: tensors of bytes; None: if the processor has such.

    Raises:
        UserError: names what changed; or ``raw`` and the processor's tensors are no bytes.
    """
    from omnidata.profiles.fingerprint import check_fingerprint
    from omnidata.profiles.opening import open_profile, processor_folder

    first = datasets[0]
    profile = open_profile(first.path, first.manifest)
    for dataset in datasets:
        check_fingerprint(profile, dataset.manifest.profile["fingerprint"], where=dataset.path)
    if raw is None:
        raw = normalisation_of(profile) is not None
    elif raw and normalisation_of(profile) is None:
        raise UserError(
            f"raw_pixels: {type(profile.processor).__name__}'s tensors are no bytes before they "
            "are normalised, or padded otherwise; leave it out"
        )
    positions = first.manifest.profile["positions"]
    return ProcessorPixels(profile, processor_folder(first.path), positions, raw, augment, seed, with_dummy)


@lru_cache(maxsize=4)
def normalisation_of(profile: ProcessorProfile) -> Normalisation | None:
    """What turns its raw tensors into its own; None: there is no such map. About a second, once."""
    from omnidata.profiles.tensors import find_normalisation

    return find_normalisation(profile)
