"""``omnidata verify --repair``: rebuild from intact shards what is only derived from them.

    shards (intact by sha256)  ─▶ index.parquet, shards/*.tar.idx
    manifest.json              ─▶ .nv-meta/, README.md

What is not derived cannot come back, and the report says so: the bytes of a damaged shard, the rejects, the
tokenizer, and (where the old index is unreadable too) each sample's id, source, locator and kept columns.
Nothing is written that would contradict the manifest.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from omnidata.durable import SCRATCH, Store
from omnidata.index import index_schema, index_table, kept_fields, write_tables
from omnidata.interop import dataset_card, energon_files
from omnidata.locks import locked
from omnidata.schema import CARD, INDEX, REJECTS, Manifest, UserError
from omnidata.shards import CorruptSampleError, read_sample
from omnidata.verify.files import check_tokenizer, idx_files
from omnidata.verify.run import OnShard, over_shards, read_manifest, read_or_none
from omnidata.verify.shard import Row, ShardCheck, stored_columns
from omnidata.verify.shard_walk import Damage, ShardWalk

if TYPE_CHECKING:
    import pyarrow as pa

PROVENANCE = ("id", "source", "locator")  # of a sample: only the index has them


@dataclass(slots=True)
class RepairReport:
    """What was rebuilt, and what cannot be."""

    dataset: str
    rebuilt: list[str] = field(default_factory=list)  # files
    lost: list[str] = field(default_factory=list)  # sentences: what, and what to do

    def as_dict(self) -> dict[str, object]:
        """Ready for JSON."""
        return asdict(self)


def repair(
    path: str | os.PathLike[str],
    *,
    num_workers: int | None = None,
    on_shard: OnShard = lambda done, total: None,
) -> RepairReport:
    """Rebuild the derived files of the dataset at ``path`` that are missing or wrong.

    Raises:
        UserError: there is no readable manifest.
    """
    store = Store(path)
    manifest = read_manifest(store)
    had_scratch = store.exists(SCRATCH)
    try:
        with locked(store, "build"):
            return _repair(store, manifest, num_workers=num_workers, on_shard=on_shard)
    finally:
        if not had_scratch:
            store.remove(SCRATCH)


def _repair(store: Store, manifest: Manifest, *, num_workers: int | None, on_shard: OnShard) -> RepairReport:
    """``repair``, while nobody else builds here."""
    report = RepairReport(store.url)
    old = read_or_none(store, INDEX)
    reader = ShardReader(store.url, manifest)
    shards = dict(over_shards(store, manifest, reader, old, num_workers=num_workers, on_shard=on_shard))
    index = _repair_index(store, manifest, old, shards, report)
    wanted = energon_files(manifest) | ({} if index is None else idx_files(manifest, index))
    for name, content in wanted.items():
        if store.size(name) is None or store.read_bytes(name) != content:
            store.write_bytes(name, content)
            report.rebuilt.append(name)
    if store.size(CARD) is None:
        kept = [] if index is None else kept_fields(index.schema)
        store.write_bytes(CARD, dataset_card(manifest, kept).encode())
        report.rebuilt.append(CARD)
    report.lost += _lost_files(store, manifest)
    return report


@dataclass(frozen=True)
class ShardReader:
    """Picklable work: the index rows that a shard proves, or a sentence that says why it proves none."""

    url: str
    manifest: Manifest

    def __call__(self, task: ShardCheck, report: object) -> list[Row] | str:
        """Walk one shard."""
        try:
            file = Store(self.url).open(task.shard.path)
        except FileNotFoundError:
            return f"{task.shard.path} is missing"
        except UserError as error:
            return str(error)
        with file:
            walk = ShardWalk(file)
            found = [span if isinstance(span, Damage) else self._proven_row(span) for span in walk]
        if walk.sha256 != task.shard.sha256:
            return f"{task.shard.path} is damaged (its sha256 is not the manifest's)"
        foreign = [item for item in found if isinstance(item, Damage)]
        if foreign:
            what = f"at byte {foreign[0].offset} ({foreign[0].what})"
            return f"{task.shard.path} holds what no build writes, {what}"
        where = {"split": task.shard.split, "shard": task.shard.path}
        return [row | where for row in found if not isinstance(row, Damage)]

    def _proven_row(self, span: Any) -> Row | Damage:
        try:
            row = stored_columns(span, read_sample(span.raw), self.manifest, url=self.url)
        except CorruptSampleError as error:  # a member that no build writes, in a shard that is whole
            return Damage(span.offset, str(error))
        what = row.pop("image_block", None)
        return row if what is None else Damage(span.offset, what)


def _repair_index(
    store: Store,
    manifest: Manifest,
    old: pa.Table | None,
    shards: dict[str, list[Row] | str],
    report: RepairReport,
) -> pa.Table | None:
    """Write the index that the shards prove, if it differs; return it, or None if there can be none."""
    import pyarrow as pa

    if manifest.base:  # where its images are, only its index says
        if old is None:
            report.lost.append(f"{INDEX} of a view: render it again (omnidata render), which takes minutes")
        return old
    known = {} if old is None else {row["key"]: row for row in old.to_pylist()}
    kept = [] if old is None else kept_fields(old.schema)
    schema, tables = pa.schema([*index_schema(), *kept]), []
    if old is None and (names := manifest.settings.get("keep_column")):
        report.lost.append(
            f"the columns of --keep-column {' '.join(map(str, names))}: only the old {INDEX} held them"
        )
    for shard in manifest.shards:
        rows = shards[shard.path]
        if isinstance(rows, str):
            report.lost.append(f"{rows}: its {shard.num_samples} samples must be built again")
            rows = [row for row in known.values() if row["shard"] == shard.path]
            if len(rows) != shard.num_samples:
                report.lost.append(f"{INDEX} stays as it is: it cannot be complete without {shard.path}")
                return None
        else:
            names = (*PROVENANCE, *(field.name for field in kept))
            rows = [row | _provenance(row["key"], known, manifest, names) for row in rows]
        tables.append(index_table(rows, schema))
    index = pa.concat_tables(tables)
    if old is None or not old.equals(index):
        with store.write(INDEX) as file:
            write_tables(file, schema, tables)
        report.rebuilt.append(INDEX)
    unknown = index["source"].to_pylist().count("")
    if unknown:
        what = "id and locator" if len(manifest.inputs) == 1 else "id, source and locator"
        report.lost.append(f"{what} of {unknown} samples: only the old {INDEX} held them")
    return index


def _provenance(key: str, known: dict[str, Row], manifest: Manifest, names: Sequence[str]) -> Row:
    """A sample's id, source, locator and kept columns (``names``) from the old index.

    Without it the source, if there is only one; the others are "".
    """
    if key in known:
        return {name: known[key][name] for name in names}
    sources = {entry["source"] for entry in manifest.inputs}
    return {"id": "", "locator": "", "source": sources.pop() if len(sources) == 1 else ""}


def _lost_files(store: Store, manifest: Manifest) -> Iterator[str]:
    if manifest.num_rejects and read_or_none(store, REJECTS) is None:
        yield (
            f"{REJECTS}: which {manifest.num_rejects} records were refused; the manifest has only the counts "
            "by reason. Building again gives it back."
        )
    for finding in check_tokenizer(store, manifest):
        yield f"{finding.where}: {finding.what}. Copy the tokenizer that the build used there."
