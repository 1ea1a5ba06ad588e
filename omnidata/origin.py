"""Origin: what a dataset was copied from, as its manifest tells it, and the digest that proves it.

``omnidata merge``, ``subset`` and ``export`` write ``manifest.origin``; a build has none::

    {"command": "merge", "where": "", "exclude": "", "inputs": [{
        "path": "data/a",                    as given
        "digest": "9f…",                     sha256 of its manifest.json, and so of all of its bytes
        "key_prefix": "0-",                  before each key, "" if no two inputs share one
        "num_records": 106, "num_samples": 100, "rejects": {"bad_role": 6},       of the whole input
        "taken": {"train": 90, "val": 10},   samples that were copied
        "content": "c0…",                    content_digest of these (of a view's: with their images)
        "settings": {…}, "versions": {…},    of its build
        "origin": {…}}, …]}                  its own

In each split of the dataset stand the samples of the first input, then those of the second, in the order in
which they stood there. So anybody can tell, from the index alone, which input a sample is from, and compute
``content`` again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

_OF_INPUT = {
    **dict.fromkeys(("path", "digest", "key_prefix", "content"), str),
    **dict.fromkeys(("num_records", "num_samples"), int),
    **dict.fromkeys(("rejects", "taken", "settings", "versions", "origin"), dict),
}


def is_origin(value: Mapping[str, Any]) -> bool:
    """Whether a manifest's ``origin`` is empty or has the shape above, at every depth."""
    if not value:
        return True
    inputs = value.get("inputs")
    if not isinstance(inputs, list) or not inputs:
        return False
    if not all(isinstance(value.get(name), str) for name in ("command", "where", "exclude")):
        return False
    return all(isinstance(entry, dict) and _is_input(entry) for entry in inputs)


def _is_input(entry: Mapping[str, Any]) -> bool:
    if any(type(entry.get(name)) is not kind for name, kind in _OF_INPUT.items()):
        return False
    counts = [*entry["rejects"].values(), *entry["taken"].values()]
    return all(type(count) is int for count in counts) and is_origin(entry["origin"])


def content_digest(hashes: Iterable[pa.ChunkedArray | pa.Array]) -> str:
    """blake2b-128, in hex, of content hashes (a column of strings, in pieces) one after the other."""
    digest = hashlib.blake2b(digest_size=16)
    for column in hashes:
        for chunk in getattr(column, "chunks", [column]):
            _, offsets, text = chunk.buffers()
            if len(chunk) and text is not None:
                ends = np.frombuffer(offsets, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
                digest.update(memoryview(text)[ends[0] : ends[-1]])
    return digest.hexdigest()


def rows_of_inputs(
    splits: Sequence[str], takens: Sequence[Mapping[str, int]]
) -> Iterator[tuple[int, str, slice]]:
    """(input, split, rows of the index) in index order.

    Args:
        splits: the dataset's, in the order of its index.
        takens: ``taken`` of each input.

    >>> list(rows_of_inputs(["train", "val"], [{"train": 2, "val": 1}, {"train": 3}]))
    [(0, 'train', slice(0, 2, None)), (1, 'train', slice(2, 5, None)), (0, 'val', slice(5, 6, None))]
    """
    start = 0
    for split in splits:
        for number, taken in enumerate(takens):
            if count := taken.get(split, 0):
                yield number, split, slice(start, start + count)
                start += count


def settings_of_builds(settings: Mapping[str, Any], origin: Mapping[str, Any]) -> list[dict[str, object]]:
    """The settings of a dataset as each of the builds had them that its samples are from.

    Inputs of a copy may differ in how long a sample might be and in the date that a template prints; a sample
    rendered again is what it was by the settings of its own build.
    """
    if not origin:
        return [dict(settings)]
    found = [
        dict(settings) | {name: each[name] for name in ("max_length", "date") if name in each}
        for entry in origin["inputs"]
        for each in settings_of_builds(entry["settings"], entry["origin"])
    ]
    return [each for at, each in enumerate(found) if each not in found[:at]]


def describe(origin: Mapping[str, Any]) -> str:
    """An origin in words; "" of a dataset that was built.

    >>> describe({"command": "subset", "where": "n_images <= 1", "exclude": "", "inputs": [{"path": "a"}]})
    'subset of a: where n_images <= 1'
    """
    if not origin:
        return ""
    paths = ", ".join(entry["path"] for entry in origin["inputs"])
    if origin["command"] != "subset":
        return f"{origin['command']} of {paths}"
    conditions = [f"where {origin['where']}"] if origin["where"] else []
    conditions += [f"without the keys of {origin['exclude']}"] if origin["exclude"] else []
    return f"subset of {paths}: {', '.join(conditions)}"
