"""Inputs: the datasets of a copy, opened, held against each other, and which of their samples are chosen.

    Dataset(path) ─▶ check_agreement ─▶ rows that meet --where, without --exclude ─▶ prefixes of keys ─▶ Input

Everything comes from manifests and indexes; no shard is opened.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from omnidata.copier.agreement import check_agreement
from omnidata.copier.settings import CopySettings
from omnidata.dataset import Dataset
from omnidata.durable import Store
from omnidata.index import codes, kept_fields, numbers, open_parquet, reading_table
from omnidata.plan.sources import read_keys
from omnidata.schema import INDEX, INPUT_IDS, MANIFEST, MAX_MEMBER_NAME, UserError
from omnidata.shards import BLOCK


@dataclass(frozen=True, eq=False)
class Input:
    """One dataset, whole, and the samples of it that are copied."""

    dataset: Dataset
    nbytes: np.ndarray  # int64, of every row of its index: what the sample takes in a shard
    chosen: dict[str, np.ndarray]  # split -> rows of its index, int64, ascending
    excluded: np.ndarray  # rows that --exclude names and --where would have taken
    kept: tuple[pa.Field, ...]  # its kept columns
    key_prefix: str = ""

    @cached_property
    def digest(self) -> str:
        """sha256 of its manifest, which holds that of every shard."""
        return hashlib.sha256(self.dataset.read_file(MANIFEST)).hexdigest()

    @cached_property
    def rows(self) -> np.ndarray:
        """All rows that are copied, ascending."""
        return np.sort(np.concatenate([np.zeros(0, np.int64), *self.chosen.values()]))


def open_inputs(settings: CopySettings, out: str) -> list[Input]:
    """Open the datasets and choose.

    Raises:
        UserError: there is no such dataset, they do not fit together, nothing is chosen, or ``out`` is one
            of them.
    """
    datasets = [Dataset(path) for path in settings.datasets]
    for dataset in datasets:
        _check_kind(dataset, settings.command)
    _check_out(datasets, out)
    check_agreement(datasets)
    excluded = frozenset(read_keys(settings.exclude)) if settings.exclude else frozenset()
    chosen = [_choose(dataset, settings, excluded) for dataset in datasets]
    if not any(len(rows) for each in chosen for rows in each.chosen.values()):
        asked = settings.where or f"what {settings.exclude} leaves"
        raise UserError(f"no sample of {settings.datasets[0]} meets {asked}: there is nothing to copy")
    return _with_prefixes(chosen)


def _check_kind(dataset: Dataset, command: str) -> None:
    """A view is exported, any other dataset copied."""
    if command == "export" and dataset.base is None:
        raise UserError(f"{dataset.path} is no view, it has all that it needs: copy the folder as it is")
    if command != "export" and dataset.base is not None:
        raise UserError(
            f"{dataset.path} is a view: its images are in {dataset.base.path}. Make it a dataset of its own "
            f"first, omnidata export {dataset.path} --out DIR (or {command} the base, and render that)"
        )


def _check_out(datasets: Sequence[Dataset], out: str) -> None:
    """``--overwrite`` must not remove what is copied."""
    target = Store(out)
    for dataset in (*datasets, *(dataset.base for dataset in datasets if dataset.base)):
        source = Store(dataset.path)
        paths = [store.full("") for store in (source, target)]
        if source.is_local and target.is_local:
            paths = [os.path.realpath(path) for path in paths]
        if source.is_local == target.is_local and paths[0] == paths[1]:
            raise UserError(f"--out {out} is a dataset that is copied from: choose another --out")


def _choose(dataset: Dataset, settings: CopySettings, excluded: frozenset[str]) -> Input:
    columns = ["split", "shard", "offset", "nbytes", "base_nbytes"]
    table = dataset.index_columns(columns, dictionary=["split", "shard"])
    _check_places(dataset, table)
    names, split_of = codes(table, "split")
    met = np.ones(table.num_rows, bool)
    if settings.where:
        met[:] = False
        met[Dataset(dataset.path, where=settings.where).rows_of_index] = True
    named = np.zeros(table.num_rows, bool)
    if excluded:
        keys = dataset.index_columns(["key"])["key"]
        named[:] = pc.is_in(keys, pa.array(sorted(excluded))).to_numpy()
        _check_named(dataset, settings.exclude, excluded, keys, named)
    taken = met & ~named
    chosen = {name: np.flatnonzero(taken & (split_of == code)) for code, name in enumerate(names)}
    with dataset.open_table(INDEX) as file, reading_table(f"{dataset.path}/{INDEX}"):
        kept = kept_fields(open_parquet(file)[0].schema_arrow, f"{dataset.path}/{INDEX}")
    nbytes = numbers(table, "nbytes") + numbers(table, "base_nbytes")  # of a view: a little too many
    return Input(dataset, nbytes, chosen, np.flatnonzero(met & named), tuple(kept))


def _check_named(
    dataset: Dataset, file: str, excluded: frozenset[str], keys: pa.ChunkedArray, named: np.ndarray
) -> None:
    if named.sum() < len(excluded):
        missing = sorted(excluded - set(keys.filter(pa.array(named)).to_pylist()))
        raise UserError(
            f"{len(missing)} keys of --exclude {file} are not in {dataset.path}, the first is "
            f"{missing[0]!r}: remove them, or correct the path"
        )


def _check_places(dataset: Dataset, table: pa.Table) -> None:
    """Byte ranges lie inside shards that the manifest lists, and the index has a row for every sample."""
    names, shards = codes(table, "shard")
    listed = {shard.path: shard.num_bytes for shard in dataset.manifest.shards}
    unknown = sorted(set(names) - listed.keys())
    wrong = f"names {unknown[0]!r}, which the manifest does not list" if unknown else ""
    if not wrong and table.num_rows != dataset.manifest.num_samples:
        wrong = f"has {table.num_rows} rows, the manifest says {dataset.manifest.num_samples} samples"
    if not wrong:
        offsets, nbytes = numbers(table, "offset"), numbers(table, "nbytes")
        sizes = np.array([listed[name] for name in names], np.int64)[shards]
        outside = (offsets < 0) | (nbytes < BLOCK) | (nbytes > sizes) | (offsets > sizes - nbytes)
        wrong = "has places outside of its shards" if outside.any() else ""
    if wrong:
        raise UserError(f"{dataset.path}/{INDEX} {wrong}: the dataset is damaged, run `omnidata verify`")


def pick(column: pa.ChunkedArray, rows: np.ndarray) -> Iterator[pa.Array]:
    """The values at these rows (ascending), in pieces: one array holds no more than 2 GiB of text."""
    start = 0
    for chunk in column.chunks:
        first, last = np.searchsorted(rows, (start, start + len(chunk)))
        yield chunk.take(pa.array(rows[first:last] - start))
        start += len(chunk)


# --- keys -------------------------------------------------------------------------------------------------


def _with_prefixes(inputs: list[Input]) -> list[Input]:
    """The inputs with their numbers before their keys, if any two of them share a key.

    Builds number their samples from 0, so mostly they do: ``000000017`` of the second is ``1-000000017``.
    """
    if len(inputs) == 1:
        return inputs
    keys = [
        pa.chunked_array(pick(each.dataset.index_columns(["key"])["key"], each.rows), pa.string())
        for each in inputs
    ]
    for each, mine in zip(inputs, keys, strict=True):
        if len(pc.unique(mine)) != len(mine):
            what = f"{each.dataset.path} has a key twice"
            raise UserError(f"{what}: the dataset is damaged, run `omnidata verify`")
    everything = pa.chunked_array([chunk for mine in keys for chunk in mine.chunks], pa.string())
    if len(pc.unique(everything)) == len(everything):
        return inputs
    digits = len(str(len(inputs) - 1))
    prefixes = [f"{number:0{digits}d}-" for number in range(len(inputs))]
    longest = MAX_MEMBER_NAME - len(f".{INPUT_IDS}") - digits - 1
    for each, mine in zip(inputs, keys, strict=True):
        if len(mine) and pc.max(pc.binary_length(mine)).as_py() > longest:
            raise UserError(
                f"{each.dataset.path} shares keys with another dataset, and some of its keys are longer than "
                f"{longest} bytes: with a number before them they would not fit into the name of a tar member"
            )
    return [replace(each, key_prefix=prefix) for each, prefix in zip(inputs, prefixes, strict=True)]
