"""Sources: what a recipe names as ``data`` -> the datasets of a blend, opened and checked against each other.

data: data/llava                                      one dataset, its train split, one pass an epoch
data: [data/llava, data/shapes]                       each once an epoch, mixed in proportion to their sizes
data: [{path: data/llava, weight: 3}, {path: data/shapes, weight: 1}]
data: [{path: data/llava, epochs: 1, exclude: bad_keys.txt}, {path: data/shapes, epochs: 2.5}]
data: [{path: data/llava, where: relevance_min >= 4 and n_images <= 8}]    those samples only
data: [{path: data/llava, cap: 1000, cap_by: task}]      1,000 of each task a pass, others in the next
data: [{path: data/llava, order: length}]                the shortest first; or a column, -column: falling
data: [{path: data/llava, weights: [{until: 0.5, weight: 3}, {weight: 1}]}, …]    see phases.py
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omnidata.dataset import Dataset
from omnidata.plan.blend import SHUFFLED, Source
from omnidata.plan.catalog import IndexCatalog
from omnidata.plan.phases import parse_phases
from omnidata.schema import UserError

DEFAULT_SPLIT = "train"
_KEYS = (
    *("path", "split", "where", "weight", "epochs", "exclude"),
    *("cap", "cap_by", "order", "weights"),
)


def open_sources(data: object) -> list[Source]:
    """The sources of a blend from what the user gave.

    Raises:
        UserError: an unknown key, no such dataset or split, or datasets rendered by different tokenizers.
    """
    entries = list(data) if isinstance(data, Sequence) and not isinstance(data, str) else [data]
    if not entries:
        raise UserError("`data` is empty: name at least one dataset")
    sources = [_open(entry) for entry in entries]
    _check_compatible([source.catalog for source in sources if isinstance(source.catalog, IndexCatalog)])
    return sources


def _open(entry: Any) -> Source:
    if isinstance(entry, Source):
        return entry
    if isinstance(entry, str | os.PathLike):
        return Source(IndexCatalog(Dataset(entry, DEFAULT_SPLIT)))
    if isinstance(entry, Dataset):
        return Source(IndexCatalog(entry))
    if isinstance(entry, Mapping):
        return _open_mapping(entry)
    return Source(entry)  # a catalog


def _open_mapping(entry: Mapping[str, Any]) -> Source:
    unknown = sorted(entry.keys() - set(_KEYS))
    if unknown or "path" not in entry:
        raise UserError(f"an entry of `data` has the keys {sorted(entry)}; it takes `path` and {_KEYS[1:]}")
    dataset = Dataset(entry["path"], entry.get("split") or DEFAULT_SPLIT, entry.get("where"))
    catalog = IndexCatalog(dataset, exclude=read_keys(entry["exclude"]) if entry.get("exclude") else ())
    weights = entry.get("weights")
    if weights is not None and (isinstance(weights, str | Mapping) or not isinstance(weights, Sequence)):
        raise UserError(f"{catalog.name}: `weights` is {weights!r}, not a list of {{until, weight}}")
    return Source(
        catalog,
        weight=entry.get("weight"),
        epochs=entry.get("epochs"),
        weights=parse_phases(weights or (), name=catalog.name),
        cap=entry.get("cap"),
        cap_by=entry.get("cap_by"),
        order=str(entry.get("order") or SHUFFLED),
    )


def read_keys(path: str) -> list[str]:
    """The keys of an exclusions file: one per line; blank lines and ``#`` comments are left out."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the exclusions {path}: {error}") from error
    return [key for line in lines if (key := line.partition("#")[0].strip())]


def _check_compatible(catalogs: list[IndexCatalog]) -> None:
    """Refuse to mix datasets whose ids mean different things."""
    for catalog in catalogs[1:]:
        for name in ("tokenizer_fingerprint", "special_tokens", "profile"):
            first, other = (getattr(c.dataset.manifest, name) for c in (catalogs[0], catalog))
            if name == "profile":
                first, other = (_of_ids(profile) for profile in (first, other))
            if name == "special_tokens":  # one that cuts pictures also names the tokens around the tiles
                first, other = ({k: x[k] for k in first.keys() & other.keys()} for x in (first, other))
            if first != other:
                raise UserError(
                    f"{catalogs[0].name} and {catalog.name} differ in {name} ({first} and {other}): "
                    "build them with the same --model, or the same tokenizer and --num-query"
                )


def _of_ids(profile: Mapping[str, object]) -> dict[str, object]:
    """What of a profile decides the ids and the pixels: not OmniLMM's size of stored pictures."""
    left_out = ("image_size", "transformers", "fingerprint")
    return {name: value for name, value in profile.items() if name not in left_out}
