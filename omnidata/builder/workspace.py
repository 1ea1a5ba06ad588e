"""Workspace: the output folder as a builder sees it. Whose is it, and is anybody else at work there?"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from omnidata.builder.build_plan import PLAN, read_plan
from omnidata.builder.settings import RunOptions
from omnidata.durable import SCRATCH, Store
from omnidata.locks import locked
from omnidata.schema import (
    BASE,
    CARD,
    INDEX,
    MANIFEST,
    NEAR,
    NV_META,
    PROCESSOR_DIR,
    REJECTS,
    SHARDS_DIR,
    TOKENIZER_DIR,
    UserError,
)

# The manifest goes first when a dataset is removed: without it, what is left is no dataset.
OURS = (
    MANIFEST,
    SCRATCH,
    BASE,
    INDEX,
    REJECTS,
    NEAR,
    CARD,
    NV_META,
    TOKENIZER_DIR,
    PROCESSOR_DIR,
    SHARDS_DIR,
)


def check_folder(store: Store, options: RunOptions) -> None:
    """Refuse a folder that is not ours to write to, before anything is created in it."""
    if options.overwrite and (options.task or options.finalize):
        raise UserError("--overwrite does not go with --task or --finalize: remove the old folder first")
    if store.is_local:
        _check_path(store)
    names = set(store.names())
    foreign = sorted(names - set(OURS))
    if foreign and (options.overwrite or read_plan(store) is None):
        remedy = "Choose another --out" + (", or remove them yourself" if options.overwrite else "")
        raise UserError(f"{store.url} holds files that are no part of a dataset ({foreign[0]}, …). {remedy}.")
    if options.overwrite or not names or read_plan(store) is not None:
        return
    if SCRATCH in names and MANIFEST not in names:
        return  # stopped before it had a plan, or while it removed what --overwrite said
    if MANIFEST in names and (options.task or options.finalize):
        return  # a task that comes late; build() compares the settings
    if MANIFEST in names:
        raise UserError(
            f"{store.url} already holds a complete dataset. Choose another --out, or --overwrite."
        )
    raise UserError(
        f"{store.url} is not empty, and holds no unfinished build. Choose another --out, or --overwrite."
    )


def _check_path(store: Store) -> None:
    """Refuse a path where no folder can be, or none that may be written to."""
    path = Path(store.full(""))
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not there.is_dir():
        raise UserError(f"cannot write to {store.url}: {there} is a file. Choose another --out.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {store.url}: {there} may not be written to. Choose another --out.")


def clear(store: Store) -> None:
    """Remove the dataset or unfinished build that is there; the locks stay, they are ours."""
    for name in OURS:
        if name != SCRATCH:
            store.remove(name)
    for name in store.names(SCRATCH):
        if not name.endswith(".lock"):
            store.remove(f"{SCRATCH}/{name}")


def leave(store: Store) -> None:
    """Remove .build/ of a complete dataset; the plan last, so that a run after a crash knows what to do."""
    for name in store.names(SCRATCH):
        if name != PLAN.rpartition("/")[2] and not name.endswith(".lock"):
            store.remove(f"{SCRATCH}/{name}")
    store.remove(PLAN)
    store.remove(SCRATCH)


@contextlib.contextmanager
def hold_locks(store: Store, options: RunOptions) -> Iterator[None]:
    """One build at a time, or any number of different tasks of one."""
    if options.task is None and not options.finalize:
        with locked(store, "build"):
            for name in store.names(SCRATCH):
                if name.startswith("task-") and not store.is_local:  # leases know nothing of sharing
                    with locked(store, name.removesuffix(".lock")):
                        pass
            yield
        return
    name = "finalize" if options.finalize else "task-{}-of-{}".format(*options.task or (0, 1))
    with locked(store, "build", shared=True), locked(store, name):
        yield
