"""The quick check of the tables: index and rejects against the manifest, from whole columns, no shard opened.

rows       in shard order, one contiguous run of byte ranges a shard, from byte 0 to the end marker
keys       unique, of the allowed characters
numbers    0 < n_supervised <= n_tokens, n_images = image_sizes, blocks fit the tokens
totals     a shard's, a split's and the dataset's are the sums of their rows
records    samples + rejects = records, for the whole build and for every source
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from omnidata.corpus.columns import ALL, column_name
from omnidata.images.slices import slicing_of
from omnidata.schema import (
    IMAGE_TOKENS,
    INDEX,
    INDEX_COLUMNS,
    KEY_PATTERN,
    MANIFEST,
    REASONS,
    REJECTS,
    Manifest,
)
from omnidata.shards import BLOCK
from omnidata.verify.findings import Finding

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = [
    *("key", "split", "shard", "offset", "nbytes", "n_tokens", "n_supervised", "n_images", "image_sizes"),
    *("slices", "image_starts", "image_tokens", "image_pixels", "dialogue_bytes"),
]
LISTS = ("image_sizes", "slices", "image_starts", "image_tokens", "image_pixels")
END_OF_TAR = 2 * BLOCK


def check_index(table: pa.Table, manifest: Manifest) -> Iterator[Finding]:
    """Findings of the index; ``table`` has at least COLUMNS."""
    yield from _check_keys(table["key"].combine_chunks())
    yield from _check_kept(table, manifest)
    yield from _check_numbers(table, manifest)
    shards = table["shard"].combine_chunks().dictionary_encode()
    names, codes = shards.dictionary.to_pylist(), shards.indices.to_numpy()
    yield from _check_shard_order(names, codes, manifest)
    columns = {name: table[name].to_numpy() for name in COLUMNS if name not in ("key", "shard", *LISTS)}
    bounds = np.flatnonzero(np.diff(codes)) + 1 if len(codes) else codes
    known = {shard.path: shard for shard in manifest.shards}
    for run in np.split(np.arange(len(codes)), bounds):
        shard = known.get(names[codes[run[0]]]) if len(run) else None
        if shard is not None:
            yield from _check_run({name: values[run] for name, values in columns.items()}, shard, int(run[0]))
    yield from _check_totals(columns, manifest)


def _check_kept(table: pa.Table, manifest: Manifest) -> Iterator[Finding]:
    """The columns that the build was told to keep are there; their values only the index has."""
    names = manifest.settings.get("keep_column", [])
    wanted = [column_name(name) for name in names if isinstance(name, str) and name != ALL]
    for name in sorted(set(wanted) - set(table.column_names)):
        yield Finding("index", INDEX, f"lacks the column {name!r}, which the build kept")
    near = manifest.settings.get("dedup") == "near"
    if ALL in names or manifest.origin or manifest.base or near:
        return
    own = {column.name for column in INDEX_COLUMNS}
    for name in sorted(set(table.column_names) - own - set(wanted)):
        yield Finding("index", INDEX, f"has the column {name!r}, which the build did not keep")


def _row(number: int) -> str:
    return f"{INDEX}, row {number}"


def _check_keys(keys: pa.Array) -> Iterator[Finding]:
    import pyarrow.compute as pc

    counts = pc.value_counts(keys)
    for pair in counts.filter(pc.greater(counts.field("counts"), 1)).to_pylist():
        yield Finding("duplicate_key", INDEX, f"{pair['counts']} rows have the key {pair['values']!r}")
    good = pc.match_substring_regex(keys, f"^(?:{KEY_PATTERN.pattern})$")
    for row in np.flatnonzero(~good.to_numpy(zero_copy_only=False)).tolist():
        yield Finding("index", _row(row), f"key {keys[row].as_py()!r} is not of {KEY_PATTERN.pattern}")


def _check_numbers(table: pa.Table, manifest: Manifest) -> Iterator[Finding]:
    import pyarrow.compute as pc

    tokens, supervised, images = (table[n].to_numpy() for n in ("n_tokens", "n_supervised", "n_images"))
    lists = {name: pc.list_value_length(table[name]).to_numpy() for name in LISTS if name != "slices"}
    offsets, nbytes = table["offset"].to_numpy(), table["nbytes"].to_numpy()
    is_cut = np.full(len(images), slicing_of(manifest.settings) is not None)
    ends, firsts = _run_bounds(table)
    rules = (
        ((offsets < 0) | (nbytes <= 0), "offset or nbytes is not a place in a file"),
        (supervised < 1, "n_supervised is below 1"),
        (supervised > tokens, "n_supervised is above n_tokens"),
        *((found != images, f"n_images is not the number of {name}") for name, found in lists.items()),
        (is_cut & (_blocks_of_slices(table) != images), "slices does not account for n_images"),
        ((ends > tokens) | (firsts < 0), "the images' runs exceed n_tokens"),
    )
    for broken, what in rules:
        for row in np.flatnonzero(broken).tolist():
            yield Finding("index", _row(row), what)


def _run_bounds(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """A row's largest end of a run, and its smallest start or length; 0 if it has no image."""
    starts, counts = (table[name].combine_chunks() for name in ("image_starts", "image_tokens"))
    ends, firsts = np.zeros(len(starts), np.int64), np.zeros(len(starts), np.int64)
    offsets, others = starts.offsets.to_numpy(), counts.offsets.to_numpy()
    if not np.array_equal(np.diff(offsets), np.diff(others)):
        return ends, firsts  # another rule says so
    rows = np.repeat(np.arange(len(starts)), np.diff(offsets))
    first, number = starts.flatten().to_numpy().astype(np.int64), counts.flatten().to_numpy()
    np.maximum.at(ends, rows, first + number)
    np.minimum.at(firsts, rows, np.minimum(first, number))
    return ends, firsts


def _blocks_of_slices(table: pa.Table) -> np.ndarray:
    """Image blocks a row by its slices: an overview for each picture, and columns × rows tiles."""
    import pyarrow.compute as pc

    rows = table["slices"].combine_chunks()
    pictures = rows.flatten()
    if (pc.list_value_length(pictures).to_numpy() != 2).any():
        return np.full(len(rows), -1)
    sides = pictures.flatten().to_numpy().reshape(-1, 2)
    ends = np.concatenate(([0], np.cumsum(1 + sides[:, 0].astype(np.int64) * sides[:, 1])))
    last = np.cumsum(pc.list_value_length(rows).to_numpy())
    return np.diff(ends[last], prepend=0)


def _check_shard_order(names: list[str], codes: np.ndarray, manifest: Manifest) -> Iterator[Finding]:
    listed = [shard.path for shard in manifest.shards if shard.num_samples]
    runs = [names[code] for code in codes[np.flatnonzero(np.diff(codes, prepend=-1))]] if len(codes) else []
    for name in sorted(set(runs) - set(listed)):
        yield Finding("index", INDEX, f"has rows of {name}, which the manifest does not list")
    for name in listed:
        if name not in names:
            yield Finding("index", INDEX, f"has no row of {name}")
    if set(runs) == set(listed) and runs != listed:
        yield Finding("index", INDEX, "its rows are not in the order of the manifest's shards")


def _check_run(columns: dict[str, np.ndarray], shard: Any, first: int) -> Iterator[Finding]:
    """The rows of one shard: contiguous from 0, ending where the tar's end marker begins, with its totals."""
    starts, ends = columns["offset"], columns["offset"] + columns["nbytes"]
    expected = np.concatenate(([0], ends[:-1]))
    for row in np.flatnonzero(starts != expected).tolist():
        what = f"offset {starts[row]} of {shard.path}, but the sample before ends at {expected[row]}"
        yield Finding("index", _row(first + row), what)
    if not END_OF_TAR <= shard.num_bytes - int(ends[-1]) < END_OF_TAR + 20 * BLOCK:
        what = (
            f"the last sample ends at {ends[-1]}, the shard of {shard.num_bytes} bytes should end soon after"
        )
        yield Finding("index", f"{INDEX}, {shard.path}", what)
    found = {"num_samples": len(starts), "num_tokens": int(columns["n_tokens"].sum(dtype=np.int64))}
    for name, value in found.items():
        if value != getattr(shard, name):
            what = f"the index has {value}, the manifest says {getattr(shard, name)}"
            yield Finding("totals", f"{shard.path}, {name}", what)
    for split in set(columns["split"].tolist()) - {shard.split}:
        yield Finding(
            "index", f"{INDEX}, {shard.path}", f"rows of split {split!r} in a shard of {shard.split!r}"
        )


def _check_totals(columns: dict[str, np.ndarray], manifest: Manifest) -> Iterator[Finding]:
    names, counts = np.unique(columns["split"].astype(str), return_counts=True)
    found = {
        "num_samples": len(columns["offset"]),
        "num_tokens": int(columns["n_tokens"].sum(dtype=np.int64)),
        "num_supervised": int(columns["n_supervised"].sum(dtype=np.int64)),
        "num_images": int(columns["n_images"].sum(dtype=np.int64)),
        "num_dialogue_bytes": int(columns["dialogue_bytes"].sum(dtype=np.int64)),
        "splits": dict(zip(names.tolist(), counts.tolist(), strict=True)),
    }
    for name, value in found.items():
        if value != getattr(manifest, name):
            what = f"the manifest says {getattr(manifest, name)}, the index gives {value}"
            yield Finding("totals", f"{MANIFEST}, {name}", what)


# --- the manifest itself, and the rejects -----------------------------------------------------------------


def check_manifest(manifest: Manifest) -> Iterator[Finding]:
    """Whether the manifest agrees with itself."""
    sums = {
        "num_records": manifest.num_samples + manifest.num_rejects,
        "num_samples": sum(shard.num_samples for shard in manifest.shards),
        "num_tokens": sum(shard.num_tokens for shard in manifest.shards),
        "num_rejects": sum(manifest.rejects.values()),
    }
    for name, value in sums.items():
        if value != getattr(manifest, name):
            yield Finding(
                "manifest", f"{MANIFEST}, {name}", f"is {getattr(manifest, name)}, parts give {value}"
            )
    missing = [name for name in IMAGE_TOKENS if name not in manifest.special_tokens]
    if missing and manifest.is_omnilmm:
        yield Finding("manifest", f"{MANIFEST}, special_tokens", f"lacks {', '.join(missing)}")
    if any(not {"source", "num_records"} <= entry.keys() for entry in manifest.inputs):
        yield Finding("manifest", f"{MANIFEST}, inputs", "an entry lacks its source or num_records")
    elif sum(entry["num_records"] for entry in manifest.inputs) != manifest.num_records:
        yield Finding("manifest", f"{MANIFEST}, inputs", "their num_records do not add up to num_records")


def check_rejects(table: pa.Table, manifest: Manifest) -> Iterator[Finding]:
    """The rejects against the manifest's counts."""
    counts = dict(Counter(table["reason"].to_pylist()))
    if counts != manifest.rejects:
        yield Finding("rejects", REJECTS, f"holds {counts}, the manifest says {manifest.rejects}")
    for reason in sorted(counts.keys() - REASONS.keys()):
        yield Finding("rejects", REJECTS, f"unknown reason {reason!r}")


def check_sources(index: pa.Table, rejects: pa.Table, manifest: Manifest) -> Iterator[Finding]:
    """samples + rejects = records, for every source (unless a repair has had to leave sources unknown)."""
    if "" in index["source"].unique().to_pylist():
        return
    found: Counter[str] = Counter()
    for table in (index, rejects):
        found.update({pair["values"]: pair["counts"] for pair in table["source"].value_counts().to_pylist()})
    records: Counter[str] = Counter()
    for entry in manifest.inputs:
        records[entry.get("source", "")] += entry.get("num_records", 0)
    for source in sorted(found.keys() | records.keys(), key=str):
        if found[source] != records[source]:
            what = f"{found[source]} samples and rejects, the manifest says {records[source]} records"
            yield Finding("totals", f"source {source}", what)
