"""omnidata: raw conversations and images -> tokenized, label-masked shards, and back into training.

Attributes are loaded when they are first used, so that importing the package (and ``omnidata --help``)
costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"  # here, so that a checkout knows it without being installed

_LAZY = {
    "Dataset": "omnidata.dataset",
    "webdataset_pipeline": "omnidata.loader.wds",
    "Renderer": "omnidata.render",
    "EpochPlan": "omnidata.plan.epoch",
    "PackLoader": "omnidata.loader.packs",
}

__all__ = ["Dataset", "EpochPlan", "PackLoader", "Renderer", "webdataset_pipeline"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'omnidata' has no attribute {name!r}")
