"""``omnidata merge``, ``subset`` and ``export``, once their options are parsed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict, Unpack

from omnidata.builder.settings import RunOptions, parse_size
from omnidata.copier.report import CopyReport
from omnidata.copier.run import copy
from omnidata.copier.settings import CopySettings


class CopyFlags(TypedDict):
    """The options that both commands have."""

    out: str
    samples_per_shard: int | None
    shard_bytes: str | None
    workers: int | None
    dry_run: bool
    overwrite: bool
    quiet: bool


def merge(datasets: Sequence[str], **flags: Unpack[CopyFlags]) -> CopyReport:
    """Copy all samples of these datasets into one."""
    return _copy("merge", datasets, **flags)


def subset(dataset: str, *, where: str, exclude: str, **flags: Unpack[CopyFlags]) -> CopyReport:
    """Copy the samples that meet a condition."""
    return _copy("subset", [dataset], where=where, exclude=exclude, **flags)


def export(view: str, **flags: Unpack[CopyFlags]) -> CopyReport:
    """Copy a view's samples, with the images and conversations of its base, into a dataset of its own."""
    return _copy("export", [view], **flags)


def _copy(
    command: str,
    datasets: Sequence[str],
    *,
    out: str,
    samples_per_shard: int | None,
    shard_bytes: str | None,
    workers: int | None,
    dry_run: bool,
    overwrite: bool,
    quiet: bool,
    where: str = "",
    exclude: str = "",
) -> CopyReport:
    settings = CopySettings(
        command,
        tuple(datasets),
        where=where,
        exclude=exclude,
        samples_per_shard=samples_per_shard,
        shard_bytes=None if shard_bytes is None else parse_size(shard_bytes),
    )
    options = RunOptions(workers=workers, overwrite=overwrite, quiet=quiet)
    return copy(settings, out, options, dry_run=dry_run)
