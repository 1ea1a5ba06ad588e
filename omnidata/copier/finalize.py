"""Finalize: from copied shards to a complete dataset. The manifest is written last, then .build/ goes.

    .build/parts/*.parquet                          ─▶ index.parquet     a row group per shard, in order
    rejects.parquet of the inputs, what is left out ─▶ rejects.parquet   input after input
    near_duplicates.parquet of the inputs           ─▶ the same, keys as they are now
    counts of all shards and of the inputs          ─▶ .nv-meta/, README.md, manifest.json

Every step may be repeated after a crash and writes the same bytes again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from omnidata.builder.near import SCHEMA as NEAR_SCHEMA
from omnidata.builder.settings import LISTS
from omnidata.builder.worker import ShardResult, part_path
from omnidata.builder.workspace import leave
from omnidata.copier.columns import united
from omnidata.copier.inputs import Input, pick
from omnidata.copier.layout import CopyTask
from omnidata.copier.settings import CopySettings
from omnidata.durable import Store
from omnidata.index import index_schema, open_parquet, read_table, reading_table, reject_schema, write_tables
from omnidata.interop import dataset_card, energon_files
from omnidata.manifest import manifest_to_json
from omnidata.origin import content_digest
from omnidata.schema import CARD, INDEX, MANIFEST, NEAR, REJECTS, Manifest

Results = Sequence[tuple[CopyTask, ShardResult]]  # in the order of the shards
LEFT_OUT = "left_out"  # the reject of a sample that was not chosen
CHUNK = 100_000  # rows of rejects that are made at once


def complete(store: Store, settings: CopySettings, inputs: Sequence[Input], results: Results) -> Manifest:
    """Write everything that the shards do not hold."""
    content = None
    if settings.command == "export":  # images included, of which the view's own hashes know nothing
        content = content_digest(table["content_hash"] for table in _index_tables(store, results))
    manifest = make_manifest(settings, inputs, results, content=content)
    kept = united([each.kept for each in inputs])
    with store.write(INDEX) as file:
        write_tables(file, pa.schema([*index_schema(), *kept]), _index_tables(store, results))
    with store.write(REJECTS) as file:
        write_tables(file, reject_schema(), _reject_tables(settings, inputs))
    if ledger := list(_ledgers(inputs)):
        with store.write(NEAR) as file:
            write_tables(file, NEAR_SCHEMA, ledger)
    for path, text in energon_files(manifest).items():
        store.write_bytes(path, text)
    store.write_bytes(CARD, dataset_card(manifest, kept).encode())
    store.write_bytes(MANIFEST, manifest_to_json(manifest))
    leave(store)
    return manifest


# --- tables -----------------------------------------------------------------------------------------------


def _index_tables(store: Store, results: Results) -> Iterator[pa.Table]:
    for task, _ in results:
        with store.open(part_path(task)) as file:
            yield read_table(file, index_schema(), kept=True)


def _reject_tables(settings: CopySettings, inputs: Sequence[Input]) -> Iterator[pa.Table]:
    """The inputs' own rejects, and a row for each sample that was left out."""
    for each in inputs:
        with each.dataset.open_table(REJECTS) as file, reading_table(f"{each.dataset.path}/{REJECTS}"):
            groups = range(open_parquet(file)[0].num_row_groups)
        for group in groups:  # raw records may be large
            with each.dataset.open_table(REJECTS) as file:
                yield read_table(file, reject_schema(), row_groups=[group])
        yield from _left_out(settings, each)


def _left_out(settings: CopySettings, source: Input) -> Iterator[pa.Table]:
    """A row of the rejects for each sample that was not chosen, in the order of the index."""
    out = np.ones(len(source.nbytes), bool)
    out[source.rows] = False
    rows = np.flatnonzero(out)
    if not len(rows):
        return
    named = np.isin(rows, source.excluded)
    table = source.dataset.index_columns(["key", "source", "locator", "id"])
    for start in range(0, len(rows), CHUNK):
        part = table.take(pa.array(rows[start : start + CHUNK])).combine_chunks()
        why = pc.if_else(
            pa.array(named[start : start + CHUNK]),
            f" is named by --exclude {settings.exclude}",
            f" does not meet --where {settings.where}",
        )
        key = part["key"].combine_chunks()
        detail = pc.binary_join_element_wise("sample ", key, f" of {source.dataset.path}", why, "")
        columns = [part[name] for name in ("source", "locator", "id")]
        columns += [pa.array([LEFT_OUT] * part.num_rows), detail, pa.array([""] * part.num_rows)]
        yield pa.table(columns, schema=reject_schema())


def _ledgers(inputs: Sequence[Input]) -> Iterator[pa.Table]:
    """near_duplicates.parquet of the inputs that have one; a key there is the one it would have here."""
    for each in inputs:
        if NEAR in Store(each.dataset.path).names():
            with each.dataset.open_table(NEAR) as file:
                rows = read_table(file, NEAR_SCHEMA).to_pylist()
            keys = [{name: each.key_prefix + row[name] for name in ("key", "of_key")} for row in rows]
            yield pa.Table.from_pylist([row | new for row, new in zip(rows, keys, strict=True)], NEAR_SCHEMA)


# --- the manifest -----------------------------------------------------------------------------------------


def make_manifest(
    settings: CopySettings, inputs: Sequence[Input], results: Results, *, content: str | None = None
) -> Manifest:
    """Totals of all shards, and where they come from.

    Counts that only a build can make (samples cut to fit, keys that nothing read, …) are the sums of the
    inputs', so in a subset they are of the dataset that it was taken from.
    """
    manifests = [each.dataset.manifest for each in inputs]
    first, shards = manifests[0], [result.info for _, result in results if result.info]
    splits, rejects = Counter[str](), Counter[str]()
    for shard in shards:
        splits[shard.split] += shard.num_samples
    num_samples, num_records = sum(splits.values()), sum(m.num_records for m in manifests)
    for manifest in manifests:
        rejects.update(manifest.rejects)
    rejects[LEFT_OUT] += sum(m.num_samples for m in manifests) - num_samples
    rejects = +rejects
    assert num_samples + sum(rejects.values()) == num_records, "samples + rejects = records"
    counts = ("content_tokens", "unread_keys", "spelled_tokens", "notes")
    return Manifest(
        schema_version=first.schema_version,
        versions=_joined([m.versions for m in manifests]),
        settings=common_settings([m.settings for m in manifests], settings),
        tokenizer_fingerprint=first.tokenizer_fingerprint,
        chat_template_fingerprint=first.chat_template_fingerprint,
        special_tokens=first.special_tokens,
        end_of_turn=first.end_of_turn,
        vocab_size=first.vocab_size,
        profile=first.profile,
        image_policy="shrink" if any(m.image_policy == "shrink" for m in manifests) else first.image_policy,
        resize_backend=", ".join(dict.fromkeys(m.resize_backend for m in manifests)),
        inputs=[entry for manifest in manifests for entry in manifest.inputs],
        num_records=num_records,
        num_samples=num_samples,
        num_rejects=sum(rejects.values()),
        num_truncated=sum(m.num_truncated for m in manifests),
        num_tokens=sum(shard.num_tokens for shard in shards),
        num_supervised=sum(result.num_supervised for _, result in results),
        num_images=sum(result.num_images for _, result in results),
        num_dialogue_bytes=sum(result.num_dialogue_bytes for _, result in results),
        splits=dict(splits),
        rejects=dict(sorted(rejects.items())),
        **{name: _summed([getattr(manifest, name) for manifest in manifests]) for name in counts},
        shards=shards,
        origin=make_origin(settings, inputs, list(splits), content=content),
    )


def make_origin(
    settings: CopySettings, inputs: Sequence[Input], splits: Sequence[str], *, content: str | None = None
) -> dict[str, Any]:
    """What omnidata.origin describes; ``content`` of the input, where it is not what its own index gives."""
    return {
        "command": settings.command,
        "where": settings.where,
        "exclude": settings.exclude,
        "inputs": [_origin_of(each, splits, content) for each in inputs],
    }


def _origin_of(source: Input, splits: Sequence[str], content: str | None) -> dict[str, Any]:
    manifest = source.dataset.manifest
    rows = [source.chosen.get(split, np.zeros(0, np.int64)) for split in splits]
    hashes = source.dataset.index_columns(["content_hash"])["content_hash"]
    return {
        "path": source.dataset.path,
        "digest": source.digest,
        "key_prefix": source.key_prefix,
        "num_records": manifest.num_records,
        "num_samples": manifest.num_samples,
        "rejects": manifest.rejects,
        "taken": {split: len(mine) for split, mine in zip(splits, rows, strict=True) if len(mine)},
        "content": content or content_digest(part for mine in rows for part in pick(hashes, mine)),
        "settings": manifest.settings,
        "versions": manifest.versions,
        "origin": manifest.origin,
    }


def common_settings(settings: Sequence[dict[str, Any]], copy: CopySettings) -> dict[str, object]:
    """The settings that hold for every sample; those that differ are told of each input, in the origin.

    Lists are united, so ``keep_column`` names all columns; ``max_length`` is the largest.
    """
    merged: dict[str, object] = {}
    for name in dict.fromkeys(name for each in settings for name in each):
        values = [each[name] for each in settings if name in each]
        if name in LISTS:
            merged[name] = list(dict.fromkeys(item for value in values for item in value))
        elif name == "max_length":
            merged[name] = max(values)
        elif len(values) == len(settings) and all(value == values[0] for value in values):
            merged[name] = values[0]
    if copy.command == "export":
        merged["conversation"] = True  # its base has them
    return merged | {"samples_per_shard": copy.samples_per_shard, "shard_bytes": copy.shard_bytes}


def _joined(versions: Sequence[dict[str, str]]) -> dict[str, str]:
    """Package -> its version, or all of them: ``"5.24.0, 5.25.1"``."""
    names = dict.fromkeys(name for each in versions for name in each)
    return {name: ", ".join(dict.fromkeys(each[name] for each in versions if name in each)) for name in names}


def _summed(counts: Sequence[dict[str, int]]) -> dict[str, int]:
    names = dict.fromkeys(name for each in counts for name in each)
    return {name: sum(each.get(name, 0) for each in counts) for name in names}
