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
    "PackLoader": "omnidata.loader.loader",
}

__all__ = ["Dataset", "EpochPlan", "PackLoader", "Renderer", "webdataset_pipeline"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        found = getattr(import_module(_LAZY[name]), name)
        if name == "Dataset":
            found._repr_html_ = _gallery  # here, because a dataset knows nothing of those who look at it
        return found
    raise AttributeError(f"module 'omnidata' has no attribute {name!r}")


def _gallery(dataset: Any) -> str:
    """What a notebook shows for a Dataset: totals and a small gallery."""
    from omnidata.inspect.notebook import gallery

    return gallery(dataset)
