"""The rejects of a build that is not finished: what ``inspect --rejects`` shows before there is a dataset.

Every shard that is done has its rejects in ``.build/parts``; one that is being built keeps its first ones
there from time to time. The build itself makes ``rejects.parquet`` of them at its end.
"""

from __future__ import annotations

from omnidata.durable import PARTS, SCRATCH, Store
from omnidata.index import read_table, reject_schema
from omnidata.schema import MANIFEST


def is_unfinished(path: str) -> bool:
    """Whether a build was begun at ``path`` (a folder or URL) and has not come to its end."""
    store = Store(path)
    return not store.exists(MANIFEST) and store.exists(SCRATCH)


def rejects_so_far(path: str, *, source: str | None = None) -> list[dict[str, str]]:
    """The records refused so far, keys as schema.REJECT_COLUMNS, in the order of the shards."""
    store, rejects = Store(path), []
    for name in sorted(name for name in store.names(PARTS) if name.endswith(".rejects.parquet")):
        with store.open(f"{PARTS}/{name}") as file:
            rejects += read_table(file, reject_schema()).to_pylist()
    return [reject for reject in rejects if source in (None, reject["source"])]
