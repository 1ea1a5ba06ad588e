"""Places: where the bytes of samples are, by the rows of a dataset's index.

A view's samples have two: their ids and labels in the view's own shards, their images in the base's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from omnidata.index import codes, numbers
from omnidata.schema import INDEX, Manifest, UserError
from omnidata.shards import BLOCK

if TYPE_CHECKING:
    import pyarrow as pa

PLACES = ("shard", "offset", "nbytes", "key", "content_hash")
BASE_PLACES = ("base_shard", "base_offset", "base_nbytes", "base_hash")


class Place(NamedTuple):  # one a sample goes to a worker: tuples are pickled ten times faster than classes
    """Where one sample is."""

    shard: str
    offset: int
    nbytes: int
    key: str
    content_hash: str


class Places:
    """Rows of the index and where their bytes are."""

    def __init__(self, rows: np.ndarray, table: pa.Table) -> None:
        self._rows = rows  # sorted
        self._shard_names, self._shards = codes(table, "shard")
        self._offsets, self._nbytes = (numbers(table, name) for name in ("offset", "nbytes"))
        self._keys, self._hashes = (_Strings(table[name]) for name in ("key", "content_hash"))
        self._of_base = _base_columns(table) if "base_shard" in table.column_names else None
        self._pixels = table["image_pixels"] if "image_pixels" in table.column_names else None

    def pixels(self, rows: np.ndarray) -> list[tuple[int, ...]]:
        """Values of each image's pixel tensors, of a processor's dataset; else nothing."""
        if self._pixels is None:
            return [()] * len(rows)
        at = np.searchsorted(self._rows, rows)
        return [tuple(values) for values in self._pixels.take(at).to_pylist()]

    def bases(self, rows: np.ndarray) -> list[Place | None]:
        """Where the base's sample of each row is, of a view; None: the row's images are its own."""
        if self._of_base is None:
            return [None] * len(rows)
        at = np.searchsorted(self._rows, rows)
        names, codes_, offsets, nbytes, hashes = self._of_base
        shards = [names[code] for code in codes_[at].tolist()]
        columns = (offsets[at].tolist(), nbytes[at].tolist(), self._keys.take(at), hashes.take(at))
        return [Place(*each) if each[0] else None for each in zip(shards, *columns, strict=True)]

    def find(self, rows: np.ndarray) -> list[Place]:
        """The place of each row."""
        at = np.searchsorted(self._rows, rows)
        shards = [self._shard_names[shard] for shard in self._shards[at].tolist()]
        columns = [column[at].tolist() for column in (self._offsets, self._nbytes)]
        strings = [column.take(at) for column in (self._keys, self._hashes)]
        return list(map(Place, shards, *columns, *strings))


def _base_columns(table: pa.Table) -> tuple[Any, ...]:
    """Names and codes of the shards, offsets, sizes and hashes of a view's base places."""
    offsets, nbytes = (numbers(table, name) for name in ("base_offset", "base_nbytes"))
    return *codes(table, "base_shard"), offsets, nbytes, _Strings(table["base_hash"])


def check_places(table: pa.Table, manifest: Manifest, name: str, *, base: bool = False) -> None:
    """Byte ranges lie inside shards that the manifest lists: the dataset's own, or those of its ``base``.

    Raises:
        UserError: one does not.
    """
    prefix = "base_" if base else ""
    names, shards = codes(table, f"{prefix}shard")
    listed = {shard.path: shard.num_bytes for shard in manifest.shards}
    whose = "its base's manifest" if base else "the manifest"
    if unknown := sorted(set(names) - listed.keys() - ({""} if base else set())):
        raise UserError(f"{name}/{INDEX} names {unknown[0]!r}, which {whose} does not list")
    offsets, nbytes = numbers(table, f"{prefix}offset"), numbers(table, f"{prefix}nbytes")
    sizes = np.array([listed.get(shard, 0) for shard in names], np.int64)[shards]
    wrong = (offsets < 0) | (nbytes < BLOCK) | (nbytes > sizes) | (offsets > sizes - nbytes)
    if base:
        wrong &= np.array([shard != "" for shard in names], bool)[shards]
    if wrong.any() or any(
        table[column].null_count for column in table.column_names if "hash" in column or column == "key"
    ):
        raise UserError(
            f"{name}/{INDEX} has places outside of {'its base' if base else 'its'} shards: the dataset is "
            "damaged, run `omnidata verify`"
        )


class _Strings:
    """A column of strings, of which a few are wanted at a time: pyarrow's ``take`` costs 100 us per call."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        array = column.combine_chunks()
        _, offsets, text = array.buffers()
        self._offsets = np.frombuffer(offsets, np.int32)[
            array.offset :
        ]  # index_schema: strings, no large ones
        self._text = memoryview(text or b"")

    def take(self, positions: np.ndarray) -> list[str]:
        """The strings at ``positions``."""
        spans = zip(self._offsets[positions].tolist(), self._offsets[positions + 1].tolist(), strict=True)
        return [str(self._text[start:stop], "utf-8") for start, stop in spans]
