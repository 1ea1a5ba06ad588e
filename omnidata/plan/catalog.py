"""Catalog: what the plan knows of one dataset without opening a shard.

The index has one row group per shard, so the lengths of any few shards are one small read, whatever the size
of the dataset. A plan needs the number of samples of every shard, and the lengths of a window of shards at a
time; nothing else is held::

    manifest.json   -> shard_sizes                 samples in each shard
    index.parquet   -> read([4, 17, 2])            n_tokens, n_supervised, n_images of these shards
                    -> locate(rows)                where their bytes are (the loader asks)

``Catalog`` is a protocol: a billion-sample simulation, or a test, brings its own lengths.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import numpy as np

from omnidata.index import check_types, index_schema, numbers, open_parquet, reading_table
from omnidata.plan.oversize import cut_length
from omnidata.plan.places import BASE_PLACES, PLACES, Places, check_places
from omnidata.schema import INDEX, UserError
from omnidata.shards import read_sample

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from omnidata.dataset import Dataset

IMAGE_PIXELS = 3 * 448**2  # values of the picture whose cost is 1
LENGTHS = ("n_tokens", "n_supervised", "n_images")


@dataclass(frozen=True, slots=True, eq=False)
class Lengths:
    """What the plan knows of some samples; parallel int64 ``[N]``."""

    rows: np.ndarray  # positions in the dataset's index (of its split)
    tokens: np.ndarray
    supervised: np.ndarray
    images: np.ndarray
    # Values of the images' pixel tensors; not given: IMAGE_PIXELS for each.
    pixels: np.ndarray = None  # type: ignore[assignment]  # __post_init__ sets it

    def __post_init__(self) -> None:
        if self.pixels is None:
            object.__setattr__(self, "pixels", self.images * IMAGE_PIXELS)

    def take(self, positions: np.ndarray | slice) -> Lengths:
        """The samples at ``positions``, in that order."""
        return Lengths(*(getattr(self, name)[positions] for name in self.__slots__))

    def copy(self) -> Lengths:
        """A copy whose numbers may be changed."""
        return Lengths(*(getattr(self, name).copy() for name in self.__slots__))


class Catalog(Protocol):
    """Everything that EpochPlan asks of a dataset."""

    digest: str  # equal digests mean equal samples in equal order
    name: str  # for messages
    shard_sizes: np.ndarray  # int64: samples of each shard

    def read(self, shards: Sequence[int]) -> Lengths:
        """The samples of these shards, in index order."""
        ...

    def longest(self) -> tuple[int, int]:
        """The most tokens and the most images of any one sample."""
        ...

    def shorten(self, row: int, *, max_tokens: int, max_images: int | None) -> tuple[int, int, int] | None:
        """``oversize.cut_length`` of one sample: the only question that opens a shard."""
        ...

    def values(self, column: str | None) -> tuple[np.ndarray, np.ndarray]:
        """All rows, ascending, and a code from 0 for the value of each; None: 0 for all. Asked by a cap."""
        ...

    def subset(self, rows: np.ndarray) -> Catalog:
        """The catalog of these rows alone. Asked by a cap."""
        ...

    def numbers_of(self, column: str, rows: np.ndarray) -> np.ndarray:
        """float64: a column's values, NaN if there is none. Asked by an order."""
        ...


class IndexCatalog:
    """The catalog of a built dataset: its ``where``, if it has one, less the samples that ``exclude`` names.

    Args:
        dataset: one split of a dataset.
        exclude: keys of samples to leave out.

    Raises:
        UserError: index and manifest disagree, or a key of ``exclude`` is not in the dataset.
    """

    def __init__(self, dataset: Dataset, *, exclude: Iterable[str] = ()) -> None:
        self.dataset = dataset
        self.name = dataset.path
        self.digest = dataset.digest
        shards = [shard for shard in dataset.manifest.shards if shard.num_samples]
        wanted = [i for i, shard in enumerate(shards) if dataset.split in (None, shard.split)]
        self._groups = np.array(wanted, np.int64)  # row group of each shard
        sizes = np.array([shards[i].num_samples for i in wanted], np.int64)
        self._first_rows = np.concatenate(([0], np.cumsum(sizes)))
        self._kept: np.ndarray | None = None  # bool, one per row; None: all of them
        self._columns: dict[str, pa.Array] = {}
        self._check_row_groups([shard.num_samples for shard in shards])
        if dataset.where:
            self._kept = self._meets_where([shard.num_samples for shard in shards])
        if exclude := sorted(set(exclude)):
            self._leave_out(exclude)
        self.shard_sizes = sizes if self._kept is None else self._count(self._kept)

    # --- the index ----------------------------------------------------------------------------------------

    @cached_property
    def _parquet(self) -> tuple[pq.ParquetFile, bool]:
        """The index, and whether Arrow may read it in threads."""
        shards = ["shard", "base_shard"] if self.dataset.manifest.base else ["shard"]
        with reading_table(f"{self.name}/{INDEX}"):
            parquet, threads = open_parquet(self.dataset.open_table(INDEX), read_dictionary=shards)
        check_types(parquet, index_schema(), f"{self.name}/{INDEX}")
        return parquet, threads

    def _check_row_groups(self, sizes: list[int]) -> None:
        metadata = self._parquet[0].metadata
        found = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        if found != sizes:
            raise UserError(
                f"{self.name}: {INDEX} has {len(found)} row groups of {sum(found)} rows, the manifest lists "
                f"{len(sizes)} shards of {sum(sizes)} samples: the dataset is damaged, build it again"
            )

    def _table(self, shards: Sequence[int], columns: Sequence[str]) -> pa.Table:
        parquet, threads = self._parquet
        groups = self._groups[list(shards)].tolist()
        with reading_table(f"{self.name}/{INDEX}"):
            return parquet.read_row_groups(groups, columns=list(columns), use_threads=threads)

    def _rows(self, shards: Sequence[int]) -> np.ndarray:
        spans = [np.arange(self._first_rows[shard], self._first_rows[shard + 1]) for shard in shards]
        return np.concatenate(spans) if spans else np.zeros(0, np.int64)

    def _count(self, kept: np.ndarray) -> np.ndarray:
        """How many rows of each shard are kept."""
        counts = np.concatenate(([0], np.cumsum(kept)))
        return np.diff(counts[self._first_rows])

    def _meets_where(self, sizes: list[int]) -> np.ndarray:
        """bool, one per row of the split: does it meet the dataset's ``where``?"""
        firsts = np.concatenate(([0], np.cumsum(sizes)))
        kept = np.zeros(firsts[-1], bool)
        kept[self.dataset.rows_of_index] = True
        return np.concatenate([kept[:0], *(kept[firsts[i] : firsts[i + 1]] for i in self._groups.tolist())])

    def _leave_out(self, keys: list[str]) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        wanted, rows, found = pa.array(keys, pa.string()), [], set()
        for shard, first in enumerate(self._first_rows[:-1]):
            names = self._table([shard], ["key"])["key"]
            hits = pc.indices_nonzero(pc.is_in(names, value_set=wanted))
            rows.append(first + np.from_dlpack(hits).astype(np.int64))
            found.update(names.take(hits).to_pylist())
        if missing := sorted(set(keys) - found):
            raise UserError(
                f"{len(missing)} keys of the exclusions are not in {self.name} (split "
                f"{self.dataset.split}), the first is {missing[0]!r}: remove them, or correct the path"
            )
        if self._kept is None:
            self._kept = np.ones(self._first_rows[-1], bool)
        self._kept[np.concatenate(rows)] = False
        self.digest = f"{self.digest}-{_digest(keys)}"

    # --- Catalog ------------------------------------------------------------------------------------------

    def read(self, shards: Sequence[int]) -> Lengths:
        """The lengths of the samples of these shards, in index order."""
        shards = np.sort(np.asarray(shards, np.int64)).tolist()
        # OmniLMM's pictures are all alike, so what one costs is the image_cost itself.
        has_sizes = not self.dataset.manifest.is_omnilmm
        table = self._table(shards, (*LENGTHS, "image_pixels") if has_sizes else LENGTHS)
        tokens, supervised, images = (numbers(table, name).astype(np.int64) for name in LENGTHS)
        pixels = _row_sums(table["image_pixels"]) if has_sizes else None
        if pixels is None:
            lengths = Lengths(self._rows(shards), tokens, supervised, images)
        else:
            lengths = Lengths(self._rows(shards), tokens, supervised, images, pixels)
        _check_lengths(lengths, self.name)
        if self._kept is None:
            return lengths
        return lengths.take(np.flatnonzero(self._kept[lengths.rows]))

    def longest(self) -> tuple[int, int]:
        """The most tokens and images of a sample, from the index's statistics if it has them."""
        metadata = self._parquet[0].metadata
        positions = [metadata.schema.names.index(name) for name in ("n_tokens", "n_images")]
        groups = [metadata.row_group(group) for group in self._groups.tolist()]
        statistics = [[group.column(position).statistics for position in positions] for group in groups]
        if self._kept is not None or any(
            item is None or not item.has_min_max for pair in statistics for item in pair
        ):
            lengths = self.read(range(len(groups)))
            return int(lengths.tokens.max(initial=0)), int(lengths.images.max(initial=0))
        return max(tokens.max for tokens, _ in statistics), max(images.max for _, images in statistics)

    def shorten(self, row: int, *, max_tokens: int, max_images: int | None) -> tuple[int, int, int] | None:
        """Tokens, supervised tokens and images to keep of an oversize sample; None: nothing."""
        [place] = self.locate(np.array([row])).find(np.array([row]))
        sample = read_sample(self.dataset.read_range(place.shard, place.offset, place.nbytes))
        starts = self._image_starts(row)
        kept = cut_length(sample.labels, starts, max_tokens=max_tokens, max_images=max_images)
        if kept is not None and kept[2] < len(starts) and not self._runs_stand_alone:
            return None  # with fewer pictures the processor would write other runs
        return kept

    # --- what caps and orders ask -------------------------------------------------------------------------

    def values(self, column: str | None) -> tuple[np.ndarray, np.ndarray]:
        """The rows, ascending, and a code for each value of ``column``; one of its own for no value."""
        rows = np.arange(self._first_rows[-1]) if self._kept is None else np.flatnonzero(self._kept)
        if column is None:
            return rows, np.zeros(len(rows), np.int64)
        encoded = self._column(column).dictionary_encode(null_encoding="encode")
        return rows, encoded.indices.to_numpy().astype(np.int64)[rows]

    def subset(self, rows: np.ndarray) -> IndexCatalog:
        """The same dataset with these rows only."""
        other = copy.copy(self)
        other._kept = np.zeros(self._first_rows[-1], bool)
        other._kept[rows] = True
        other.shard_sizes = self._count(other._kept)
        return other

    def numbers_of(self, column: str, rows: np.ndarray) -> np.ndarray:
        """A numeric column's values as float64, NaN if there is none.

        Raises:
            UserError: the column holds something else.
        """
        import pyarrow as pa

        found = self._column(column)
        if not (pa.types.is_integer(found.type) or pa.types.is_floating(found.type)):
            raise UserError(
                f"{self.name}: order {column!r} is a column of {found.type}; it must be of numbers"
            )
        return found.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)[rows]

    def texts_of(self, column: str) -> tuple[list[str | None], np.ndarray]:
        """A column's distinct values as text, and the code of every row of the split among them."""
        encoded = self._column(column).dictionary_encode(null_encoding="encode")
        values = [None if value is None else str(value) for value in encoded.dictionary.to_pylist()]
        return values, encoded.indices.to_numpy().astype(np.int64)

    def _column(self, column: str) -> pa.Array:
        """A column of the whole split.

        Raises:
            UserError: there is none, or it is one of lists.
        """
        import pyarrow as pa

        names = self._parquet[0].schema_arrow.names
        if column not in names:
            near = difflib.get_close_matches(column, names, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UserError(f"{self.name} has no column {column!r}{hint}; it has {', '.join(sorted(names))}")
        if column not in self._columns:
            found = self._table(range(len(self._groups)), [column])[column].combine_chunks()
            if pa.types.is_list(found.type):
                raise UserError(
                    f"{self.name}: {column} is a column of lists, which have no order and no groups"
                )
            self._columns[column] = found
        return self._columns[column]

    @property
    def _runs_stand_alone(self) -> bool:
        return self.dataset.manifest.profile.get("runs_stand_alone", True)

    def _image_starts(self, row: int) -> np.ndarray:
        """Where in the ids of a sample its images begin."""
        shard = int(np.searchsorted(self._first_rows, row, side="right") - 1)
        starts = self._table([shard], ["image_starts"])["image_starts"]
        return np.array(starts[row - int(self._first_rows[shard])].as_py(), np.int64)

    def locate(self, rows: np.ndarray) -> Places:
        """Where the bytes of these rows are (and of the others of their shards)."""
        shards = np.unique(np.searchsorted(self._first_rows, rows, side="right") - 1).tolist()
        extra = () if self.dataset.manifest.is_omnilmm else ("image_pixels",)
        base = self.dataset.base
        table = self._table(shards, (*PLACES, *extra, *(BASE_PLACES if base else ())))
        check_places(table, self.dataset.manifest, self.name)
        if base:
            check_places(table, base.manifest, self.name, base=True)
        return Places(self._rows(shards), table)


def _check_lengths(lengths: Lengths, name: str) -> None:
    """Refuse numbers that no sample can have: they would become a plan without a word."""
    tokens, supervised, images = lengths.tokens, lengths.supervised, lengths.images
    wrong = np.flatnonzero((supervised < 1) | (supervised > tokens) | (images < 0) | (images > tokens))
    if len(wrong):
        at = wrong[0]
        raise UserError(
            f"{name}/{INDEX}, row {lengths.rows[at]}: {tokens[at]} tokens, {supervised[at]} supervised, "
            f"{images[at]} images is no sample: the dataset is damaged, run `omnidata verify`"
        )


def _row_sums(column: pa.ChunkedArray) -> np.ndarray:
    """int64: the sum of each row's list."""
    lists = column.combine_chunks()
    values = np.concatenate(([0], np.cumsum(lists.values.to_numpy(zero_copy_only=False))))
    return np.diff(values[lists.offsets.to_numpy()]).astype(np.int64)


def _digest(values: Iterable[object]) -> str:
    import hashlib

    return hashlib.blake2b("\n".join(map(str, values)).encode(), digest_size=8).hexdigest()
