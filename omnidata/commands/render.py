"""``omnidata render``, once its options are parsed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omnidata.builder.build import build
from omnidata.builder.report import BuildReport
from omnidata.builder.settings import options_of, parse_size
from omnidata.builder.view import open_view
from omnidata.executors import start_server
from omnidata.start import worker_imports


def render(dataset: str, flags: Mapping[str, Any], given: Mapping[str, Any]) -> BuildReport:
    """Build, or go on building, a view of ``dataset``; ``given``: the flags that the user gave.

    Raises:
        UserError: says what to do.
    """
    if flags["executor"] == "local" and not flags["finalize"]:
        start_server(worker_imports(model=flags["model"] or "", max_slices=0))
    values = dict(given)
    if values.get("shard_bytes") is not None:
        values["shard_bytes"] = parse_size(str(values["shard_bytes"]))
    view = open_view(dataset.rstrip("/"), values, out=flags["out"], refetch=flags["refetch"])
    return build(view.settings, flags["out"], options_of(dict(flags)), view=view)
