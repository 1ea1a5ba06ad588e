"""The quick check of a copy: what ``merge`` or ``subset`` says it took from where, against index and rejects.

counts     records and rejects are the sums of the inputs'; what was not taken is a reject of its own reason
keys       the rows of each input have its prefix
content    each input's rows hold the content that was taken from it, in its order (omnidata.origin)

That the shards hold what the index says is proven as in any dataset: by sizes, or byte by byte (--deep).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from omnidata.origin import content_digest, rows_of_inputs
from omnidata.schema import INDEX, MANIFEST, Manifest
from omnidata.verify.findings import Finding

if TYPE_CHECKING:
    import pyarrow as pa


def check_origin(index: pa.Table | None, manifest: Manifest) -> Iterator[Finding]:
    """Findings of a copy; none of a dataset that was built."""
    if not manifest.origin:
        return
    inputs = manifest.origin["inputs"]
    yield from _check_counts(inputs, manifest)
    if index is not None:
        yield from _check_rows(index, inputs, manifest)


def _check_counts(inputs: list[dict[str, Any]], manifest: Manifest) -> Iterator[Finding]:
    rejects, taken = Counter[str](), Counter[str]()
    for entry in inputs:
        rejects.update(entry["rejects"])
        taken.update(entry["taken"])
    rejects["left_out"] += sum(entry["num_samples"] for entry in inputs) - taken.total()
    found = {
        "num_records": sum(entry["num_records"] for entry in inputs),
        "rejects": {reason: count for reason, count in rejects.items() if count},
        "splits": dict(taken),
    }
    for name, value in found.items():
        if value != (said := getattr(manifest, name)):
            yield Finding("origin", f"{MANIFEST}, {name}", f"is {said}, what was copied gives {value}")


def _check_rows(index: pa.Table, inputs: list[dict[str, Any]], manifest: Manifest) -> Iterator[Finding]:
    import pyarrow.compute as pc

    hashes: list[list[object]] = [[] for _ in inputs]
    takens = [entry["taken"] for entry in inputs]
    for number, split, rows in rows_of_inputs(list(manifest.splits), takens):
        part, source = index.slice(rows.start, rows.stop - rows.start), inputs[number]
        hashes[number].append(part["content_hash"])
        others = pc.sum(pc.invert(pc.starts_with(part["key"], source["key_prefix"]))).as_py()
        if others:
            what = f"{others} keys of {split} do not begin with {source['key_prefix']!r}"
            yield Finding("origin", INDEX, f"{what}, as those of {source['path']} should")
    for entry, columns in zip(inputs, hashes, strict=True):
        if content_digest(columns) != entry["content"]:
            what = f"the samples from {entry['path']} are not, in this order, those that were copied from it"
            yield Finding("origin", INDEX, what)
