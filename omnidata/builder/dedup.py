"""``--dedup``: of samples with the same, or nearly the same, images and text, only the first stays.

Which samples repeat is known when all shards are built, from their content hashes (near.py). A shard
that holds repeats is written anew without them, by copying byte ranges; its part is removed first and written
last, so a crash in between leaves a shard that is simply built again. Removed samples become rejects.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from omnidata.builder.build_plan import repeats
from omnidata.builder.layout import ShardTask
from omnidata.builder.near import find_near, why
from omnidata.builder.worker import Counts, Job, ShardResult, part_path, rejects_path, write_part
from omnidata.durable import BUFFER, Store
from omnidata.index import index_schema, read_table, reject_schema
from omnidata.schema import Reject
from omnidata.shards import HashedFile, end_archive

Results = Sequence[tuple[ShardTask, ShardResult]]
RunTasks = Callable[[Sequence[object]], Iterator[tuple[Any, Any]]]


def drop_repeats(
    store: Store, results: Results, run: RunTasks, *, near: bool = False
) -> Iterator[tuple[ShardTask, ShardResult]]:
    """Write shards anew where samples repeat earlier ones; yield the new results."""
    before, rewrites = dict(results), {}
    for task, details in find_near_repeats(store, results) if near else find_repeats(store, results):
        truncated = [key for key in before[task].truncated if int(key) not in details]
        rewrite = functools.partial(
            rewrite_shard,
            task=task,
            details=details,
            reason="near_duplicate" if near else "duplicate_sample",
            truncated=truncated,
            counts=before[task].counts,
        )
        rewrites[rewrite] = task
    for done, result in run(list(rewrites)):
        yield rewrites[done], result


def find_near_repeats(store: Store, results: Results) -> Iterator[tuple[ShardTask, dict[int, str]]]:
    """As ``find_repeats``, of samples that nearly repeat one."""
    details = {row["key"]: why(row) for row in find_near(store, results)}
    for task, result in results:
        if details and result.num_samples:
            with store.open(part_path(task)) as file:
                keys = read_table(file, index_schema(), columns=["key"])["key"].to_pylist()
            if mine := {int(key): details[key] for key in keys if key in details}:
                yield task, mine


def find_repeats(store: Store, results: Results) -> Iterator[tuple[ShardTask, dict[int, str]]]:
    """(shard, position -> why) of samples that repeat one further in front, of the shards that have any."""
    digests, positions, owners = [], [], []
    for number, (task, result) in enumerate(results):
        if result.num_samples:
            with store.open(part_path(task)) as file:
                table = read_table(file, index_schema(), columns=["key", "content_hash"])
            digests += [bytes.fromhex(text) for text in table["content_hash"].to_pylist()]
            positions.append(np.array([int(key) for key in table["key"].to_pylist()]))
            owners.append(np.full(table.num_rows, number))
    if not digests:
        return
    position, owner = np.concatenate(positions), np.concatenate(owners)
    order = np.argsort(position)  # corpus order: splits and shards mix
    repeated = order[repeats(b"".join(digests[at] for at in order))]
    for number in np.unique(owner[repeated]):
        mine = repeated[owner[repeated] == number]
        yield (
            results[number][0],
            {
                int(
                    position[at]
                ): f"same images and text as an earlier sample (content hash {digests[at].hex()})"
                for at in mine.tolist()
            },
        )


def rewrite_shard(
    job: Job, *, task: ShardTask, details: dict[int, str], reason: str, truncated: list[str], counts: Counts
) -> ShardResult:
    """Copy a shard without the samples at these positions."""
    store = Store(job.out)
    with store.open(part_path(task)) as file:
        rows = read_table(file, index_schema(), kept=True).to_pylist()
    rejects = []
    if store.exists(rejects_path(task)):
        with store.open(rejects_path(task)) as file:
            rejects = [Reject(**row) for row in read_table(file, reject_schema()).to_pylist()]
    kept = [row for row in rows if int(row["key"]) not in details]
    rejects += [
        Reject(row["source"], row["locator"], row["id"], reason, details[int(row["key"])])
        for row in rows
        if int(row["key"]) in details
    ]
    store.remove(part_path(task))
    copy = _copy(store, task, kept) if kept else None
    if not kept:
        store.remove(f"{task.path}.idx")
        store.remove(task.path)
    return write_part(store, task, copy, rows=kept, rejects=rejects, truncated=truncated, counts=counts)


def _copy(store: Store, task: ShardTask, rows: list[dict[str, Any]]) -> HashedFile:
    """Write the shard with these rows only; their offsets are brought up to date."""
    with store.open(task.path) as old, store.write(task.path) as new:
        hashed = HashedFile(new)
        for row in rows:
            old.seek(row["offset"])
            row["offset"] = hashed.num_bytes
            for start in range(0, row["nbytes"], BUFFER):
                hashed.write(old.read(min(BUFFER, row["nbytes"] - start)))
        end_archive(hashed, hashed.num_bytes)
    return hashed
