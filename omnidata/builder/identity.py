"""Identity: all that can change a byte of a dataset, but a folder of pictures. Equal identities, equal bytes.

identity_of   settings, tokenizer, profile, versions, inputs
what_changed  why an unfinished build cannot go on
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from omnidata import __version__
from omnidata.builder.settings import BuildSettings
from omnidata.builder.survey import Opened
from omnidata.schema import SCHEMA_VERSION

# Packages that decide bytes: pixels, ids, templates, Parquet.
PACKAGES = (
    "cykooz-resizer",
    "numpy",
    "pillow",
    "pyarrow",
    "simplejpeg",
    "tokenizers",
    "torch",
    "transformers",
)


def versions() -> dict[str, str]:
    """Versions of the packages that shape the bytes."""
    return {"omnilmm-toolkit": __version__} | {name: version(name) for name in PACKAGES}


def identity_of(
    settings: BuildSettings,
    opened: Sequence[Opened],
    tokenizer: dict[str, str],
    profile: dict[str, object],
    *,
    images: str | None = None,
) -> dict[str, object]:
    """Everything that decides the bytes of the dataset. Equal identities, equal datasets.

    ``images`` is the digest of an archive that is the image root. A folder of pictures has none: to read
    them all takes as long as the build. Whoever changes one there while a build is stopped gets the old
    one in shards that were done and the new one in the others; begin anew with --overwrite.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "settings": settings.to_json(),
        "tokenizer": tokenizer,
        "profile": profile,
        "versions": versions(),
        "images": images,
        "inputs": [
            {
                "source": each.file.source,
                "format": each.file.format,
                "num_bytes": each.file.num_bytes,
                "digest": each.digest,
            }
            for each in opened
        ],
    }


def what_changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Differences between two identities, one line each.

    Example: ``["--max-length was 2048 and is 1024", "corpus.json changed (1200 -> 1350 bytes)"]``
    """
    old, new = before["settings"], now["settings"]
    was, is_now = (settings.get("command", "build-shards") for settings in (old, new))
    if was != is_now:
        return [f"`omnidata {was}` began it"]
    flags = sorted(old.keys() | new.keys())
    lines = [
        f"--{name.replace('_', '-')} was {old.get(name)} and is {new.get(name)}"
        for name in flags
        if old.get(name) != new.get(name)
    ]
    for name in ("tokenizer", "profile", "versions"):
        was_of, now_of = before.get(name, {}), now.get(name, {})
        keys = sorted(was_of.keys() | now_of.keys())
        pairs = [(key, was_of.get(key), now_of.get(key)) for key in keys]
        lines += [f"{name} {key} was {was} and is {is_now}" for key, was, is_now in pairs if was != is_now]
    if before.get("images") != now.get("images"):
        lines.append(f"--image-root {new['image_root']} changed")
    if before.get("base") != now.get("base"):
        lines.append("the dataset that it is a view of changed")
    was_in = {entry["source"]: entry for entry in before["inputs"]}
    is_in = {entry["source"]: entry for entry in now["inputs"]}
    lines += [f"{source} is new" for source in is_in.keys() - was_in.keys()]
    lines += [f"{source} is gone" for source in was_in.keys() - is_in.keys()]
    for source in sorted(was_in.keys() & is_in.keys()):
        if was_in[source] != is_in[source]:
            sizes = f"{was_in[source]['num_bytes']:,} -> {is_in[source]['num_bytes']:,} bytes"
            lines.append(f"{source} changed ({sizes})")
    if not lines and before != now:
        lines.append("the order of the inputs or the schema version")
    return lines
