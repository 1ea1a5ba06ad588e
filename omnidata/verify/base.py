"""The base of a view: it is there, it has not changed, and the view's index points at its samples.

A view's sample is checked whole, with the images and the conversation that its base has.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from omnidata.dataset import Dataset
from omnidata.schema import BASE, INDEX, Manifest, Sample, UserError
from omnidata.shards import CorruptSampleError
from omnidata.verify.findings import Finding

if TYPE_CHECKING:
    import pyarrow as pa

_SAME = {"base_shard": "shard", "base_offset": "offset", "base_nbytes": "nbytes", "base_hash": "content_hash"}


@lru_cache(maxsize=2)
def base_of(url: str) -> Dataset | str:
    """The base of the view at ``url``, or why there is none."""
    try:
        base = Dataset(url).base
    except (UserError, OSError) as error:
        return str(error)
    assert base is not None, "it is a view"
    return base


def check_base(url: str, manifest: Manifest, index: pa.Table | None) -> Iterator[Finding]:
    """Whether the base is the one that the view was made of, and each row's place there is its key's."""
    if not manifest.base:
        return
    base_of.cache_clear()  # in a process that verifies again and again
    base = base_of(url)
    if isinstance(base, str):
        yield Finding("base", BASE, base)
    elif index is not None:
        yield from _check_rows(index, base)


def _check_rows(index: pa.Table, base: Dataset) -> Iterator[Finding]:
    import pyarrow.compute as pc

    stored = base.index_columns(["key", *_SAME.values()])
    found = pc.index_in(index["key"], value_set=stored["key"].combine_chunks())
    if missing := index["key"].filter(pc.is_null(found)).to_pylist():
        yield Finding("base", INDEX, f"{len(missing)} keys that the base does not have, first {missing[0]!r}")
        return
    refers = pc.not_equal(index["base_shard"], "")
    mine, theirs = index.filter(refers), stored.take(found.filter(refers))
    for column, name in _SAME.items():
        wrong = np.flatnonzero(pc.not_equal(mine[column], theirs[name]).to_numpy())
        if len(wrong):
            key = mine["key"][int(wrong[0])].as_py()
            yield Finding("base", INDEX, f"{column} of {len(wrong)} rows is not the base's, first of {key!r}")


def with_base(
    sample: Sample, row: dict[str, Any] | None, manifest: Manifest, url: str
) -> Sample | str | None:
    """The whole of a view's sample; why it is not whole; None: its base is not there, as was said."""
    if not manifest.base or row is None or not row["base_shard"]:
        return sample
    base = base_of(url)
    if isinstance(base, str):
        return None
    try:
        return base.completed(sample, row)
    except (CorruptSampleError, UserError, FileNotFoundError) as error:
        return str(error)
