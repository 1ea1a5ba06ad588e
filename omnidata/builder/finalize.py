"""Finalize: from finished shards to a complete dataset. The manifest is written last, then .build/ goes.

    .build/parts/*.parquet          ─▶ index.parquet       one row group per shard, in shard order
    .build/parts/*.rejects.parquet  ─▶ rejects.parquet
    counts of all shards            ─▶ .nv-meta/, README.md, manifest.json

Every step may be repeated after a crash and writes the same bytes again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import pyarrow as pa

from omnidata.builder.build_plan import BuildPlan
from omnidata.builder.columns import KEPT, kept_fields, with_columns
from omnidata.builder.layout import ShardTask
from omnidata.builder.near import keep_ledger
from omnidata.builder.report import examples
from omnidata.builder.settings import BuildSettings
from omnidata.builder.worker import ShardResult, part_path, rejects_path, total_counts
from omnidata.builder.workspace import leave
from omnidata.durable import Store
from omnidata.images.pixels import backend
from omnidata.index import index_schema, read_table, reject_schema, write_tables
from omnidata.interop import dataset_card, energon_files
from omnidata.manifest import manifest_to_json
from omnidata.render import Renderer
from omnidata.schema import BASE, CARD, INDEX, MANIFEST, REJECTS, SCHEMA_VERSION, Manifest, UserError
from omnidata.text.tokenizer import fingerprint, special_token_ids, template_fingerprint
from omnidata.view_base import base_json

Results = Sequence[tuple[ShardTask, ShardResult]]  # in the order of the shards


def complete(
    store: Store,
    settings: BuildSettings,
    plan: BuildPlan,
    results: Results,
    renderer: Renderer,
    *,
    base: str = "",
) -> Manifest:
    """Write everything that the shards do not hold; ``base``: of a view, where its base is.

    Raises:
        UserError: not one sample was built.
    """
    manifest, kept = make_manifest(settings, plan, results, renderer)
    if not manifest.num_samples:
        raise UserError(
            f"none of the {manifest.num_records:,} records became a sample: {manifest.rejects}. Mostly the "
            f"format or --image-root is not right; all rejects: omnidata inspect {store.url} --rejects. "
            f"The first:{examples(first_rejects(store, results))}"
        )
    with store.write(INDEX) as file:
        write_tables(file, pa.schema([*index_schema(), *kept]), _index_tables(store, settings, results, kept))
    with store.write(REJECTS) as file:
        write_tables(file, reject_schema(), _reject_tables(store, results))
    keep_ledger(store)
    for path, content in energon_files(manifest).items():
        store.write_bytes(path, content)
    store.write_bytes(CARD, dataset_card(manifest, kept).encode())
    if base:
        store.write_bytes(BASE, base_json(store.url, base))
    store.write_bytes(MANIFEST, manifest_to_json(manifest))
    leave(store)
    return manifest


def _index_tables(
    store: Store, settings: BuildSettings, results: Results, kept: list[pa.Field]
) -> Iterator[pa.Table]:
    for task, result in results:
        if result.num_samples:
            with store.open(part_path(task)) as file:
                table = read_table(file, index_schema(), kept=True)
            yield with_columns(table, kept) if KEPT in table.column_names else table


def _reject_tables(store: Store, results: Results) -> Iterator[pa.Table]:
    for task, result in results:
        if result.rejects:
            with store.open(rejects_path(task)) as file:
                yield read_table(file, reject_schema())


def make_manifest(
    settings: BuildSettings, plan: BuildPlan, results: Results, renderer: Renderer
) -> tuple[Manifest, list[pa.Field]]:
    """Totals of all shards, and what they were made from; and the kept columns."""
    shards = [result.info for _, result in results if result.info]
    rejects, splits = Counter[str](), Counter[str]()
    for _, result in results:
        rejects.update(result.rejects)
    for shard in shards:
        splits[shard.split] += shard.num_samples
    num_samples, num_rejects = sum(splits.values()), sum(rejects.values())
    counts, tokenizer = total_counts(result for _, result in results), renderer.tokenizer
    kept, of_columns = kept_fields(settings.columns, counts["columns"])
    assert num_samples + num_rejects == plan.num_records, "samples + rejects = records"
    assert settings.image_policy is not None, "the settings resolve it when they are made"
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        versions=plan.identity["versions"],
        settings=settings.to_json(),
        tokenizer_fingerprint=fingerprint(tokenizer),
        chat_template_fingerprint=template_fingerprint(tokenizer),
        special_tokens=special_token_ids(tokenizer, settings.slice_tokens if settings.max_slices else ()),
        end_of_turn=list(renderer.end_of_turn),
        vocab_size=len(tokenizer),
        profile=plan.identity["profile"],
        image_policy=settings.image_policy,
        resize_backend=backend(),
        inputs=[
            {"num_records": count} | entry  # a view's have theirs
            for entry, count in zip(plan.identity["inputs"], plan.records_of_files(), strict=True)
        ],
        base=plan.identity.get("base", {}),
        num_records=plan.num_records,
        num_samples=num_samples,
        num_rejects=num_rejects,
        num_truncated=sum(len(result.truncated) for _, result in results),
        num_tokens=sum(shard.num_tokens for shard in shards),
        num_supervised=sum(result.num_supervised for _, result in results),
        num_images=sum(result.num_images for _, result in results),
        num_dialogue_bytes=sum(result.num_dialogue_bytes for _, result in results),
        splits={split: splits[split] for split in settings.splits if splits[split]},
        rejects=dict(sorted(rejects.items())),
        content_tokens={token: counts["content_tokens"].get(token, 0) for token in renderer.content_tokens},
        unread_keys=counts["unread_keys"],
        spelled_tokens=counts["spelled_tokens"],
        notes=counts["notes"] | of_columns,
        shards=shards,
    )
    return manifest, kept


def first_rejects(store: Store, results: Results, limit: int = 3) -> list[dict[str, object]]:
    """A few rejects, for messages."""
    rows: list[dict[str, object]] = []
    for table in _reject_tables(store, results):
        rows += table.slice(0, limit - len(rows)).to_pylist()
        if len(rows) >= limit:
            break
    return rows
