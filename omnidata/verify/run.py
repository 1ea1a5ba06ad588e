"""``omnidata verify``: prove that a dataset is what its manifest says, or list everything that is not.

    quick    (1) check_manifest, check_files     the manifest with itself, files and sizes
             (2) check_index, check_rejects      tables against the manifest; samples + rejects = records
                 check_origin                    a copy against what it says that it took from where
             (3) check_idx, check_energon        what other readers use, against the index
             (4) check_tokenizer                 still computes the same ids
    deep     (5) check_shard, in parallel        every byte of every shard

``verify(...)`` returns a VerifyReport; its ``as_dict()`` is the JSON of ``--json``: the fields below, each
finding with ``code`` (a key of findings.CODES), ``where`` and ``what``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from omnidata.durable import Store
from omnidata.executors import InlineExecutor, ProcessExecutor, run_tasks
from omnidata.index import index_schema, read_table, reject_schema, rows_of_shards
from omnidata.manifest import manifest_from_json
from omnidata.schema import INDEX, MANIFEST, REJECTS, Manifest, UserError
from omnidata.verify.base import check_base
from omnidata.verify.files import (
    check_energon,
    check_files,
    check_idx,
    check_processor,
    check_tokenizer,
)
from omnidata.verify.findings import Finding
from omnidata.verify.origin import check_origin
from omnidata.verify.shard import ShardCheck, ShardChecker
from omnidata.verify.tables import check_index, check_manifest, check_rejects, check_sources

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

OnShard = Callable[[int, int], None]  # (shards checked, shards in all)


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The outcome of a verification."""

    dataset: str
    deep: bool  # every byte was read
    num_shards: int  # that the manifest lists
    num_samples: int
    num_bytes: int
    findings: tuple[Finding, ...]  # in the order of the checks

    @property
    def ok(self) -> bool:
        """Nothing was found."""
        return not self.findings

    def as_dict(self) -> dict[str, object]:
        """Ready for JSON."""
        return {**asdict(self), "ok": self.ok}


def verify(
    path: str | os.PathLike[str],
    *,
    deep: bool = False,
    num_workers: int | None = None,
    on_shard: OnShard = lambda done, total: None,
) -> VerifyReport:
    """Check the dataset at ``path``.

    Args:
        deep: read every shard, too.
        num_workers: processes for that; by default one per core.
        on_shard: called after each shard.

    Raises:
        UserError: there is no manifest, or it cannot be read: nothing can be checked against it.
    """
    store = Store(path)
    manifest = read_manifest(store)
    index = read_or_none(store, INDEX)
    findings = list(quick_findings(store, manifest, index))
    if deep:
        findings += deep_findings(store, manifest, index, num_workers=num_workers, on_shard=on_shard)
    return VerifyReport(
        dataset=store.url,
        deep=deep,
        num_shards=len(manifest.shards),
        num_samples=manifest.num_samples,
        num_bytes=sum(shard.num_bytes for shard in manifest.shards),
        findings=tuple(dict.fromkeys(findings)),
    )


def read_manifest(store: Store) -> Manifest:
    """The manifest; UserError if there is none."""
    if not store.exists(MANIFEST):
        raise UserError(
            f"{store.url} has no {MANIFEST}: it is no complete dataset, and without it nothing can be "
            "checked or repaired. If a build was interrupted, run the same `omnidata build-shards` again."
        )
    return manifest_from_json(store.read_bytes(MANIFEST), where=f"{store.url}/{MANIFEST}")


def read_or_none(store: Store, name: str) -> pa.Table | None:
    """The index or the rejects; None if the file is missing or no such table."""
    import pyarrow as pa

    schema = index_schema() if name == INDEX else reject_schema()
    try:
        with store.open(name) as file:
            table = read_table(file, schema, kept=name == INDEX)
        table.validate(full=True)  # offsets and UTF-8 of every string
    except (FileNotFoundError, UserError, pa.ArrowInvalid):
        return None  # the caller reports it
    return table


def quick_findings(store: Store, manifest: Manifest, index: pa.Table | None) -> Iterator[Finding]:
    """Everything that can be found without reading the shards."""
    yield from check_manifest(manifest)
    yield from check_files(store, manifest)
    if index is None:
        yield _unreadable(store, INDEX, "index_unreadable")
    else:
        yield from check_index(index, manifest)
        yield from check_idx(store, manifest, index)
    rejects = read_or_none(store, REJECTS)
    if rejects is None:
        yield _unreadable(store, REJECTS, "rejects")
    else:
        yield from check_rejects(rejects, manifest)
        if index is not None:
            yield from check_sources(index, rejects, manifest)
    yield from check_origin(index, manifest)
    yield from check_base(store.url, manifest, index)
    yield from check_energon(store, manifest)
    yield from check_tokenizer(store, manifest)
    yield from check_processor(store, manifest)


def _unreadable(store: Store, name: str, code: str) -> Finding:
    size = store.size(name)
    what = "is missing" if size is None else f"its {size} bytes are no table of this schema"
    return Finding(code, name, what)


def deep_findings(
    store: Store, manifest: Manifest, index: pa.Table | None, *, num_workers: int | None, on_shard: OnShard
) -> list[Finding]:
    """Findings of every shard, in shard order, whichever worker was first."""
    work = ShardChecker(store.url, manifest)
    found = dict(over_shards(store, manifest, work, index, num_workers=num_workers, on_shard=on_shard))
    return [finding for shard in manifest.shards for finding in found[shard.path]]


def over_shards(
    store: Store,
    manifest: Manifest,
    work: Any,
    index: pa.Table | None,
    *,
    num_workers: int | None = None,
    on_shard: OnShard = lambda done, total: None,
) -> Iterator[tuple[str, Any]]:
    """Run ``work`` on every shard with its index rows, in parallel; yield (shard's path, result)."""
    total = len(manifest.shards)
    num_workers = min(num_workers or os.cpu_count() or 1, max(total, 1))
    executor = (
        InlineExecutor(work)
        if store.is_private or num_workers == 1
        else ProcessExecutor(
            work, num_workers=num_workers, preload=("omnidata.verify.shard", "omnidata.without_pandas")
        )
    )
    try:
        for done, (task, result) in enumerate(run_tasks(executor, shard_tasks(manifest, index)), start=1):
            yield task.shard.path, result
            on_shard(done, total)
    finally:
        executor.close()


def shard_tasks(manifest: Manifest, index: pa.Table | None) -> Iterator[ShardCheck]:
    """One task per shard, its rows made into dicts only when it starts; rows are None without an index."""
    rows = {} if index is None else rows_of_shards(index)
    for shard in manifest.shards:
        mine = rows.get(shard.path)
        yield ShardCheck(shard, None if index is None else [] if mine is None else _take(index, mine))


def _take(index: pa.Table, rows: np.ndarray) -> list[dict[str, object]]:
    """These rows as dicts; ``rows`` is not empty, and in a sound index it is one run, which needs no copy."""
    if rows[-1] - rows[0] + 1 == len(rows):
        return index.slice(rows[0], len(rows)).to_pylist()
    return index.take(rows).to_pylist()
