"""The numbers of a dataset, from its manifest and a few columns of its index; no shard is opened.

``summarize(dataset)`` is what ``inspect`` prints, draws and writes as JSON. The JSON schema is the
dataclasses below: ``omnidata inspect DATASET --json`` writes one object whose keys are Summary's fields,
nested objects have the keys of Distribution, Bin, SourceTotals, ColumnSummary, SampleRef and cost.Cost, and
every field is documented beside its name. A million samples take a fraction of a second: it is numpy over
columns.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from omnidata.index import codes, numbers
from omnidata.inspect.columns import ColumnSummary, summarize_columns
from omnidata.inspect.distributions import Distribution, count_distribution, share_distribution
from omnidata.origin import describe
from omnidata.plan.cost import Assumptions, Cost, epoch_cost

if TYPE_CHECKING:
    import pyarrow as pa

    from omnidata.dataset import Dataset

COLUMNS = [
    *("n_tokens", "n_supervised", "n_images", "source", "image_sizes", "image_tokens", "image_pixels"),
    "dialogue_bytes",
]
NUM_EXTREMES = 8  # samples in each list of extremes


@dataclass(frozen=True, slots=True)
class SourceTotals:
    """What one input file gave."""

    source: str  # as given to build-shards
    num_samples: int
    num_tokens: int
    num_supervised: int
    num_images: int
    num_rejects: int


@dataclass(frozen=True, slots=True)
class SampleRef:
    """A sample at the edge of the dataset; ``omnidata inspect DATASET --sample POSITION`` shows it."""

    position: int  # row of the index (of the split, when one is given)
    num_tokens: int
    num_supervised: int
    num_images: int
    largest_image: tuple[int, int] | None  # width, height in pixels


@dataclass(frozen=True, slots=True)
class Summary:
    """Everything that ``inspect`` knows without opening a shard."""

    dataset: str  # path or URL
    split: str | None  # null: the whole dataset
    where: str | None  # the condition that the samples meet; null: all of them
    schema_version: int
    origin: str  # what it was copied from (omnidata merge, subset), in words; "": it was built
    num_records: int  # of the whole build: samples + rejects
    num_rejects: int  # of the whole build
    num_truncated: int  # of the whole build: samples that lost turns to max_length (of a copy: in its inputs)
    num_samples: int
    num_tokens: int
    num_supervised: int
    supervised_share: float  # num_supervised / num_tokens
    num_images: int
    num_shards: int
    num_bytes: int  # of the shards
    num_dialogue_bytes: int  # of num_bytes: the conversations (KEY.json), for `omnidata render`
    splits: dict[str, int]  # split -> samples
    model: str  # whose pictures: OmniLMM, or the processor's class
    image_policy: str
    vocab_size: int
    tokenizer_fingerprint: str
    tokens_per_sample: Distribution
    supervised_per_sample: Distribution  # share of the sample's tokens, 0 to 1
    images_per_sample: Distribution
    tokens_per_image: Distribution  # of each image's run
    longer_side: Distribution  # of each image, pixels
    sources: tuple[SourceTotals, ...]  # most samples first
    columns: tuple[ColumnSummary, ...]  # kept by build-shards --keep-column
    rejects: dict[str, int]  # reason -> count, most first
    extremes: dict[str, tuple[SampleRef, ...]]  # longest, shortest, least_supervised, largest_image
    cost: Cost  # of one epoch

    def as_dict(self) -> dict[str, object]:
        """Plain dicts and lists, ready for JSON."""
        return asdict(self)


def summarize(dataset: Dataset, *, assume: Assumptions | None = None) -> Summary:
    """Read the numeric columns of the index and add everything up."""
    manifest = dataset.manifest
    table = dataset.index_columns(COLUMNS, dictionary=["source"])
    tokens, supervised, images = (numbers(table, name) for name in COLUMNS[:3])
    sides, owners = image_sides(table)
    shards = [shard for shard in manifest.shards if dataset.split in (None, shard.split)]
    return Summary(
        dataset=dataset.path,
        split=dataset.split,
        where=str(dataset.where) if dataset.where else None,
        schema_version=manifest.schema_version,
        origin=describe(manifest.origin),
        num_records=manifest.num_records,
        num_rejects=manifest.num_rejects,
        num_truncated=manifest.num_truncated,
        num_samples=len(tokens),
        num_tokens=int(tokens.sum(dtype=np.int64)),
        num_supervised=int(supervised.sum(dtype=np.int64)),
        supervised_share=float(supervised.sum(dtype=np.int64) / max(1, tokens.sum(dtype=np.int64))),
        num_images=int(images.sum(dtype=np.int64)),
        num_shards=len(shards),
        num_bytes=sum(shard.num_bytes for shard in shards),
        num_dialogue_bytes=int(numbers(table, "dialogue_bytes").sum(dtype=np.int64)),
        splits=manifest.splits,
        model="OmniLMM" if manifest.is_omnilmm else manifest.profile["processor"],
        image_policy=manifest.image_policy,
        vocab_size=manifest.vocab_size,
        tokenizer_fingerprint=manifest.tokenizer_fingerprint,
        tokens_per_sample=count_distribution(tokens),
        supervised_per_sample=share_distribution(supervised / np.maximum(tokens, 1)),
        images_per_sample=count_distribution(images),
        tokens_per_image=count_distribution(list_values(table, "image_tokens")),
        longer_side=count_distribution(sides.max(axis=1)),
        sources=source_totals(
            codes(table, "source"), tokens, supervised, images, _rejects_by_source(dataset)
        ),
        columns=summarize_columns(dataset),
        rejects=dict(sorted(manifest.rejects.items(), key=lambda item: -item[1])),
        extremes=find_extremes(tokens, supervised, images, sides, owners),
        cost=epoch_cost(tokens, pixels=list_values(table, "image_pixels"), assume=assume),
    )


# --- columns ----------------------------------------------------------------------------------------------


def image_sides(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """All images in order: sides int32 ``[N, 2]`` (width, height) and the row int64 ``[N]`` of each."""
    sizes = table["image_sizes"].combine_chunks()
    if not len(sizes):
        return np.zeros((0, 2), np.int32), np.zeros(0, np.int64)
    # By the offsets, since ListArray.flatten() would import pyarrow.compute: 0.1 s.
    firsts, ends = np.from_dlpack(sizes.offsets), np.from_dlpack(sizes.values.offsets)
    sides = np.from_dlpack(sizes.values.values)[ends[firsts[0]] : ends[firsts[-1]]]
    return sides.reshape(-1, 2), np.repeat(np.arange(len(sizes)), np.diff(firsts))


def list_values(table: pa.Table, name: str) -> np.ndarray:
    """The values of a list column, row after row."""
    lists = table[name].combine_chunks()
    if not len(lists):
        return np.zeros(0, np.int64)
    offsets = np.from_dlpack(lists.offsets)
    return np.from_dlpack(lists.values)[offsets[0] : offsets[-1]]


def _rejects_by_source(dataset: Dataset) -> dict[str, int]:
    names, rows = codes(dataset.reject_columns(["source"], dictionary=["source"]), "source")
    return dict(zip(names, np.bincount(rows, minlength=len(names)).tolist(), strict=True))


def source_totals(
    source: tuple[list[str], np.ndarray],
    tokens: np.ndarray,
    supervised: np.ndarray,
    images: np.ndarray,
    rejects: dict[str, int],
) -> tuple[SourceTotals, ...]:
    """Totals of each source, most samples first; a source that gave only rejects is listed too."""
    names, rows = source
    sums = [np.bincount(rows, weights=w, minlength=len(names)) for w in (None, tokens, supervised, images)]
    found = [
        SourceTotals(name, int(samples), int(of_tokens), int(learned), int(pictures), rejects.get(name, 0))
        for name, samples, of_tokens, learned, pictures in zip(names, *sums, strict=True)
    ]
    empty = [SourceTotals(name, 0, 0, 0, 0, rejects[name]) for name in rejects if name not in names]
    return tuple(sorted(found + empty, key=lambda totals: (-totals.num_samples, totals.source)))


# --- extremes ---------------------------------------------------------------------------------------------


def find_extremes(
    tokens: np.ndarray, supervised: np.ndarray, images: np.ndarray, sides: np.ndarray, owners: np.ndarray
) -> dict[str, tuple[SampleRef, ...]]:
    """The NUM_EXTREMES samples at each edge; ties go to the earlier sample."""
    areas = sides[:, 0].astype(np.int64) * sides[:, 1]
    # The largest images may all be of one sample: look at enough of them to have NUM_EXTREMES samples.
    enough = NUM_EXTREMES * int(images.max(initial=0))
    rows = {
        "longest": lowest(-tokens, NUM_EXTREMES),
        "shortest": lowest(tokens, NUM_EXTREMES),
        "least_supervised": lowest(supervised / np.maximum(tokens, 1), NUM_EXTREMES),
        "largest_image": list(dict.fromkeys(owners[lowest(-areas, enough)].tolist()))[:NUM_EXTREMES],
    }

    def ref(row: int) -> SampleRef:
        own = slice(*np.searchsorted(owners, [row, row + 1]))
        size = tuple(sides[own][areas[own].argmax()].tolist()) if images[row] else None
        return SampleRef(row, int(tokens[row]), int(supervised[row]), int(images[row]), size)

    return {name: tuple(ref(row) for row in positions) for name, positions in rows.items()}


def lowest(scores: np.ndarray, count: int) -> list[int]:
    """Positions of the ``count`` lowest scores, lowest first, ties by position, without a full sort."""
    count = min(count, len(scores))
    if count == 0:
        return []
    cut = np.partition(scores, count - 1)[count - 1]
    candidates = np.flatnonzero(scores <= cut)  # may be many on ties: a stable sort keeps the earliest
    order = np.argsort(scores[candidates], kind="stable")[:count]
    return candidates[order].tolist()
