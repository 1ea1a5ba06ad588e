"""A built dataset, opened: its manifest, its index, and any sample by one ranged read.

>>> dataset = Dataset("data/shapes")          # doctest: +SKIP
>>> len(dataset), dataset.manifest.num_tokens  # doctest: +SKIP
>>> dataset[0].input_ids                       # doctest: +SKIP
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, BinaryIO

from omnidata.files import check_regular, open_regular
from omnidata.index import (
    index_schema,
    kept_fields,
    open_native,
    open_parquet,
    read_rows,
    read_table,
    reading_table,
    reject_schema,
)
from omnidata.manifest import check_agreement, manifest_from_json
from omnidata.schema import BASE, INDEX, MANIFEST, REJECTS, TOKENIZER_DIR, Manifest, Sample, UserError
from omnidata.shards import CorruptSampleError, content_hash, read_sample, with_images
from omnidata.view_base import base_path
from omnidata.where import Where

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

_CACHED = ("index", "rejects", "rows_of_index")  # left out where a dataset is pickled


class Dataset:
    """A complete dataset directory or fsspec URL.

    Args:
        path: a local directory or a URL such as ``s3://bucket/data``.
        split: keep the rows of this split only; None keeps all.
        where: keep the rows that meet this condition only (``omnidata.where``); nothing on disk changes.
        base: of a view, where the dataset that has its images is now; None: where its base.json says.

    Raises:
        UserError: there is no complete dataset at ``path``, it has no such split, ``where`` is no condition,
            or it is a view and its base is not there or has changed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        split: str | None = None,
        where: str | Where | None = None,
        *,
        base: str | os.PathLike[str] | None = None,
    ) -> None:
        import fsspec
        import fsspec.implementations.local

        self.path = os.fspath(path).rstrip("/")
        self.split = split
        self.where = where if where is None or isinstance(where, Where) else Where(where)
        self._fs, self._root = fsspec.core.url_to_fs(self.path)
        self._is_local = isinstance(self._fs, fsspec.implementations.local.LocalFileSystem)
        self._manifest_bytes = self._read_manifest()
        self.manifest: Manifest = manifest_from_json(self._manifest_bytes, where=f"{self.path}/{MANIFEST}")
        check_agreement(self.manifest, where=f"{self.path}/{MANIFEST}")
        if split is not None and split not in self.manifest.splits:
            raise UserError(f"{self.path} has no split {split!r}; it has {sorted(self.manifest.splits)}")
        self.base: Dataset | None = self._open_base(base) if self.manifest.base else None

    def _open_base(self, path: str | os.PathLike[str] | None) -> Dataset:
        """The dataset that a view's images are in, if it is there and has not changed.

        Raises:
            UserError: says what to do.
        """
        name = self.manifest.base["name"]
        remedy = f"if {name} is somewhere else now, write that into {self.path}/{BASE}"
        where = os.fspath(path) if path is not None else base_path(self.path, self.read_file(BASE))
        try:
            base = Dataset(where)
        except (UserError, OSError) as error:
            raise UserError(f"{self.path} is a view of {name}: {error} ({remedy})") from error
        if base.content_digest != self.manifest.base["digest"]:
            raise UserError(
                f"{self.path} is a view of {name}, but what is at {where} has changed since, or is another "
                f"dataset: render the view again (omnidata render {where}), or, {remedy}"
            )
        return base

    def _read_manifest(self) -> bytes:
        try:
            return self.read_file(MANIFEST)
        except FileNotFoundError:
            raise UserError(
                f"{self.path} is not a complete dataset: it has no {MANIFEST}. "
                "If a build was interrupted, run the same `omnidata build-shards` command again; "
                f"`omnidata inspect {self.path} --rejects` shows what it refused."
            ) from None

    def __repr__(self) -> str:
        where = f", where={str(self.where)!r}" if self.where else ""
        return f"Dataset({self.path!r}, split={self.split!r}{where}, samples={len(self)})"

    # --- identity -----------------------------------------------------------------------------------------

    @cached_property
    def digest(self) -> str:
        """Hex digest of the data and the split: equal digests mean equal samples in equal order.

        The manifest holds the sha256 of every shard, so its bytes stand for the whole dataset.
        """
        digest = hashlib.blake2b(self._manifest_bytes, digest_size=16)
        digest.update(f"split={self.split}".encode())
        if self.where:
            digest.update(f" where={self.where}".encode())
        return digest.hexdigest()

    @property
    def content_digest(self) -> str:
        """sha256 of the manifest, in hex: by it a view names its base."""
        return hashlib.sha256(self._manifest_bytes).hexdigest()

    @property
    def local_root(self) -> str | None:
        """The folder on a local disk, or None for a remote dataset."""
        return self._root if self._is_local else None

    @property
    def tokenizer_dir(self) -> str:
        """Where the tokenizer of the build is (``save_pretrained`` layout)."""
        return f"{self.path}/{TOKENIZER_DIR}"

    # --- tables -------------------------------------------------------------------------------------------

    @cached_property
    def index(self) -> pa.Table:
        """The index rows of this split, in shard and offset order: schema.INDEX_COLUMNS, then those kept."""
        return self.index_columns(None)

    table = property(lambda self: self.index, doc="The index, under the name that notebooks expect.")

    def index_columns(self, columns: list[str] | None, *, dictionary: Sequence[str] = ()) -> pa.Table:
        """The index with only these columns (None: all): a million rows in a fraction of a second.

        ``dictionary`` names string columns to leave dictionary-encoded.
        """
        by_split = self.split is not None and not self.where
        with self.open_table(INDEX) as file:
            wanted = columns if columns is None or not by_split else list(dict.fromkeys([*columns, "split"]))
            table = read_table(file, index_schema(), columns=wanted, dictionary=dictionary, kept=True)
        if self.where:
            table = table.take(self.rows_of_index)
        elif by_split:
            import pyarrow.compute as pc

            table = table.filter(pc.equal(table["split"], self.split))
        return table if columns is None else table.select(columns)

    @cached_property
    def rows_of_index(self) -> np.ndarray | None:
        """Where in the whole index the rows of ``where`` (and of the split) are, int64; None without one."""
        if self.where is None:
            return None
        with self.open_table(INDEX) as file:
            return self.where.find(file, name=self.path, split=self.split)

    @property
    def kept_columns(self) -> list[str]:
        """The columns that ``build-shards --keep-column`` kept."""
        with self.open_table(INDEX) as file, reading_table(f"{self.path}/{INDEX}"):
            return [field.name for field in kept_fields(open_parquet(file)[0].schema_arrow)]

    @cached_property
    def rejects(self) -> pa.Table:
        """The refused records, columns as schema.REJECT_COLUMNS."""
        with self.open_table(REJECTS) as file:
            return read_table(file, reject_schema())

    def reject_columns(self, columns: list[str], *, dictionary: Sequence[str] = ()) -> pa.Table:
        """The rejects with only these columns: the raw records may be large."""
        with self.open_table(REJECTS) as file:
            return read_table(file, reject_schema(), columns=columns, dictionary=dictionary)

    # --- samples ------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        if (rows := self.rows_of_index) is not None:
            return len(rows)
        return self.manifest.num_samples if self.split is None else self.manifest.splits[self.split]

    def row(self, position: int) -> dict[str, Any]:
        """Index row ``position`` (negative counts from the end) as a dict."""
        if not -len(self) <= position < len(self):
            raise IndexError(f"sample {position} of {len(self)}")
        return self.index.slice(position % len(self), 1).to_pylist()[0]

    def rows(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        """Index rows at these positions (>= 0), without reading the whole index."""
        if (rows := self.rows_of_index) is not None:
            positions = rows[list(positions)].tolist()
        elif self.split is not None:
            splits = Dataset(self.path).index_columns(["split"])["split"].to_numpy()
            positions = (splits == self.split).nonzero()[0][list(positions)].tolist()
        with self.open_table(INDEX) as file:
            return read_rows(file, positions)

    def __getitem__(self, position: int) -> Sample:
        """Sample ``position`` by one ranged read; of a view, by another in its base."""
        return self.read_row(self.row(position))

    def read_row(self, row: Mapping[str, Any]) -> Sample:
        """The whole sample of an index row: a view's with the images and the conversation of its base.

        Raises:
            CorruptSampleError: its bytes are damaged.
        """
        raw = self.read_range(row["shard"], row["offset"], row["nbytes"])
        try:
            sample = read_sample(raw)
        except CorruptSampleError as error:
            raise CorruptSampleError(f"{self.path}/{row['shard']}, sample {row['key']}: {error}") from error
        return sample if self.base is None else self.base.completed(sample, row)

    def completed(self, sample: Sample, row: Mapping[str, Any]) -> Sample:
        """A view's sample with the images and the conversation that this dataset, its base, has.

        Raises:
            CorruptSampleError: what is there is not the sample that the view was made of.
        """
        if not row["base_shard"]:  # the images were fetched anew, and are its own
            return sample
        raw = self.read_range(row["base_shard"], row["base_offset"], row["base_nbytes"])
        where = f"{self.path}/{row['base_shard']}, sample {row['key']}"
        try:
            stored = read_sample(raw)
        except CorruptSampleError as error:
            raise CorruptSampleError(f"{where}: {error}") from error
        if stored.key != sample.key or content_hash(stored) != row["base_hash"]:
            raise CorruptSampleError(f"{where}: is not what it was when the view was made")
        if len(stored.images) < row["n_images"]:
            raise CorruptSampleError(f"{where}: {len(stored.images)} images, the view says {row['n_images']}")
        return with_images(sample, stored, row["n_images"])

    def read_range(self, shard: str, offset: int, nbytes: int) -> bytes:
        """Bytes ``[offset, offset + nbytes)`` of a shard.

        Raises:
            CorruptSampleError: the shard ends earlier.
        """
        if self._is_local:  # opened for each read: nothing to share between threads, forks or epochs
            with open(open_regular(f"{self._root}/{shard}"), "rb", buffering=0) as file:
                raw = os.pread(file.fileno(), nbytes, offset)
        else:
            raw = self._fs.cat_file(f"{self._root}/{shard}", start=offset, end=offset + nbytes)
        if len(raw) != nbytes:
            raise CorruptSampleError(
                f"{self.path}/{shard} ends at {offset + len(raw)}, the index expects {offset + nbytes}"
            )
        return raw

    def read_file(self, relative: str) -> bytes:
        """A whole small file of the dataset."""
        if self._is_local:
            check_regular(f"{self._root}/{relative}")
        return self._fs.cat_file(f"{self._root}/{relative}")

    def open_table(self, relative: str) -> BinaryIO | pa.NativeFile:
        """A Parquet file of the dataset, open for reading parts of it.

        Raises:
            UserError: it is missing.
        """
        full = f"{self._root}/{relative}"
        try:
            return open_native(full) if self._is_local else self._fs.open(full, "rb")
        except FileNotFoundError:
            what = f"{self.path} has no {relative}: the dataset is damaged"
            raise UserError(f"{what}. Run `omnidata verify` (--repair rebuilds an index)") from None

    def __getstate__(self) -> dict[str, object]:
        """Pickle without the cached tables: a worker reads the columns that it needs."""
        return {name: value for name, value in self.__dict__.items() if name not in _CACHED}
