"""Base of a view: the dataset that has its images, by place (base.json) and by content (the manifest).

    view/base.json        {"path": "../llava"}    relative to the view's folder, absolute, or a URL
    view/manifest.json    "base": {"digest": sha256 of the base's manifest.json, "name", ...}

The place is no part of what the view is: whoever moves the base changes base.json, and no digest changes.
"""

from __future__ import annotations

import json
import os
import posixpath
from typing import Any

from omnidata.schema import BASE, UserError


def base_json(view: str, base: str) -> bytes:
    """base.json of a view at ``view`` whose base the user calls ``base``.

    A relative path stays one (from the view's folder), so that both can be moved together; a base on this
    machine's disk of a view elsewhere is named from the root.
    """
    if "://" not in base and ("://" in view or os.path.isabs(base)):
        base = os.path.abspath(base)
    elif "://" not in base:
        base = os.path.relpath(base, view)
    return json.dumps({"path": base}, ensure_ascii=False).encode() + b"\n"


def base_path(view: str, raw: bytes) -> str:
    """Where base.json says that the base is.

    Raises:
        UserError: it says nothing of the kind.
    """
    try:
        content: Any = json.loads(raw)
    except ValueError:
        content = None
    path = content.get("path") if isinstance(content, dict) else None
    if not isinstance(path, str) or not path or "::" in path:
        raise UserError(
            f'{view}/{BASE} does not say where the base is: write {{"path": "DIR_OR_URL"}} into it'
        )
    if "://" in path or os.path.isabs(path):
        return path
    protocol, found, rest = view.rpartition("://")
    if not found:
        return os.path.normpath(os.path.join(view, path))
    return protocol + found + posixpath.normpath(posixpath.join(rest, path))


def base_entry(digest: str, path: str, num_samples: int, num_bytes: int) -> dict[str, Any]:
    """The manifest's ``base``."""
    name = path.rstrip("/").rpartition("/")[2]
    return {"digest": digest, "name": name, "num_samples": num_samples, "num_bytes": num_bytes}
