"""The profile of a dataset that is built: its processor, as it lies in the dataset's own folder."""

from __future__ import annotations

import json
from functools import lru_cache

from omnidata.durable import Store
from omnidata.profiles import OMNILMM
from omnidata.profiles.folder import load_processor
from omnidata.profiles.processor import ProcessorProfile
from omnidata.schema import PROCESSOR_DIR, Manifest


def processor_folder(url: str) -> str:
    """The dataset's ``processor/`` as a local folder: itself, or a copy of a remote one."""
    return _local_copy(url)


def open_profile(url: str, manifest: Manifest) -> ProcessorProfile:
    """The profile of a processor's dataset, loaded once per process; OmniLMM's has no processor.

    Raises:
        UserError: the processor cannot be loaded.
    """
    assert manifest.profile["name"] != OMNILMM, "asked only of a processor's dataset"
    return _open(processor_folder(url), json.dumps(manifest.profile["arguments"]))


@lru_cache(maxsize=4)
def _local_copy(url: str) -> str:
    return Store(url).local_copy(PROCESSOR_DIR)


@lru_cache(maxsize=4)
def _open(folder: str, arguments: str) -> ProcessorProfile:
    values: dict[str, object] = json.loads(arguments)
    return ProcessorProfile(load_processor(folder), values)
