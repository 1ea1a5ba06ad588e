"""Views: their samples made whole again, the view's ids and labels beside what its base has of them.

    own byte range   KEY.input_ids.npy, KEY.labels.npy   ─┐
    base's           KEY.json, the first n_images images ─┴▶ one sample, as a build of the corpus has it

What is read from the base is held against the hashes that view and base have of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from omnidata.copier.rows import Place, check_sample, places_of, read_places, read_rows, replaced
from omnidata.dataset import Dataset
from omnidata.schema import INDEX_COLUMNS, Sample
from omnidata.shards import content_hash, dialogue_hash, read_sample, with_images

BASE_COLUMNS = ("base_shard", "base_offset", "base_nbytes", "base_hash")


class WholeSamples:
    """Iterate once: the samples of these rows of a view; then ``table`` has their rows, with old places."""

    def __init__(self, view: Dataset, table: pa.Table, tell: Callable[[int], None]) -> None:
        assert view.base is not None, view.path
        self._view, self._base, self._rows, self._tell = view, view.base, table, tell
        self._facts: dict[str, list[Any]] = {"content_hash": [], "dialogue_bytes": [], "dialogue_hash": []}

    def __iter__(self) -> Iterator[Sample]:
        stored = self._stored()
        own = read_places(self._view, places_of(self._rows))
        rows = zip(own, self._rows["base_shard"].to_pylist(), self._rows["n_images"].to_pylist(), strict=True)
        for (place, raw), base_shard, num_images in rows:
            check_sample(raw, place, where=f"{self._view.path}/{place.shard}")
            sample = read_sample(raw)
            if base_shard:  # else its images were fetched anew, and are its own
                sample = with_images(sample, next(stored), num_images)
            self._facts["content_hash"].append(content_hash(sample))
            self._facts["dialogue_bytes"].append(len(sample.dialogue))
            self._facts["dialogue_hash"].append(dialogue_hash(sample.dialogue))
            self._tell(1)
            yield sample

    def _stored(self) -> Iterator[Sample]:
        """What the base has, in the order of the rows."""
        columns = (self._rows[name].to_pylist() for name in ("key", *BASE_COLUMNS))
        places = [each for each in zip(*columns, strict=True) if each[1]]
        dialogues = self._dialogue_hashes({shard for _, shard, *_ in places})
        wanted = [
            Place(shard, offset, nbytes, key, found, dialogues.get(shard, {}).get(offset, ""))
            for key, shard, offset, nbytes, found in places
        ]
        for place, raw in read_places(self._base, wanted):
            check_sample(raw, place, where=f"{self._base.path}/{place.shard}")
            yield read_sample(raw)

    def _dialogue_hashes(self, shards: set[str]) -> dict[str, dict[int, str]]:
        """Shard of the base -> offset -> dialogue_hash, from the base's own index."""
        found, first = {}, 0
        for shard in self._base.manifest.shards:
            if shard.path in shards:
                table = read_rows(self._base, np.arange(first, first + shard.num_samples))
                columns = (table[name].to_pylist() for name in ("offset", "dialogue_hash"))
                found[shard.path] = dict(zip(*columns, strict=True))
            first += shard.num_samples
        return found

    @property
    def table(self) -> pa.Table:
        """The rows as the new dataset has them."""
        blank = {column.name: column.default for column in INDEX_COLUMNS if column.name in BASE_COLUMNS}
        rows = self._rows.num_rows
        return replaced(self._rows, self._facts | {name: [value] * rows for name, value in blank.items()})
