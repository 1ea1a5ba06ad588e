"""The deep check of one shard: every byte is read, every sample is parsed and held against its index row.

bytes      sha256 and size as in the manifest; nothing between or after the samples
sample     parses; its key is in the index, at that offset, with that length and content hash
ids        int32 in the vocabulary; labels are the ids or IGNORE_INDEX; some are supervised
images     the run of each image is what the profile says, unsupervised (OmniLMM: <im_start>
           num_query × <im_patch> <im_end>); each image decodes, and has the size that the index says
slices     the tiles of a cut picture form the grid that the index says
KEY.json   is one of the schema, and rendered again it gives the same ids and labels
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from omnidata.durable import Store
from omnidata.images.pixels import decode_rgb
from omnidata.schema import (
    IGNORE_INDEX,
    IM_END,
    IM_PATCH,
    IM_START,
    Manifest,
    RejectError,
    Sample,
    ShardInfo,
    UserError,
)
from omnidata.shards import CorruptSampleError, content_hash, dialogue_hash, read_sample
from omnidata.verify.base import with_base
from omnidata.verify.dialogues import check_dialogue
from omnidata.verify.findings import Finding
from omnidata.verify.runs import check_unsupervised, omnilmm_columns, run_columns
from omnidata.verify.shard_walk import Damage, ShardWalk, Span
from omnidata.verify.slices import LayoutError, check_slices, slice_layout

Row = dict[str, Any]


@dataclass(frozen=True)
class ShardChecker:
    """Picklable work for the executors: (shard, its index rows or None if the index is lost) -> findings."""

    url: str
    manifest: Manifest

    def __call__(self, task: ShardCheck, report: object) -> list[Finding]:
        """Check one shard."""
        return list(self.check(task.shard, task.rows))

    def check(self, shard: ShardInfo, rows: list[Row] | None) -> Iterator[Finding]:
        """Every finding of the shard, in file order."""
        left = {row["key"]: row for row in rows or ()}
        try:
            file = Store(self.url).open(shard.path)
        except FileNotFoundError:
            return  # the quick check has said so
        except UserError as error:
            yield Finding("damaged", shard.path, str(error))
            return
        with file:
            walk = ShardWalk(file, known_starts=[row["offset"] for row in rows or ()])
            for found in walk:
                if isinstance(found, Damage):
                    yield Finding("damaged", f"{shard.path}, byte {found.offset}", found.what)
                else:
                    row = left.pop(found.key, None)
                    if row is None and rows is not None:
                        yield Finding("not_in_index", _place(shard, found), "the index has no row for it")
                    yield from self.check_sample(_place(shard, found), found, row)
        for key, row in left.items():
            yield Finding(
                "sample_missing", f"{shard.path}, sample {key}", f"the index expects it at {row['offset']}"
            )
        if walk.sha256 != shard.sha256:
            yield Finding("sha256", shard.path, f"is {walk.sha256}, the manifest says {shard.sha256}")

    def check_sample(self, where: str, span: Span, row: Row | None) -> Iterator[Finding]:
        """Findings of one sample; ``row`` is its index row, if there is one."""
        try:
            own = read_sample(span.raw)
        except CorruptSampleError as error:
            yield Finding("damaged", where, str(error))
            return
        sample = with_base(own, row, self.manifest, self.url)
        if not isinstance(sample, Sample):
            if sample is not None:
                yield Finding("base", where, sample)
            return
        found = (*check_ids(sample, self.manifest), *check_images(sample))
        for code, what in (*found, *check_dialogue(sample, self.manifest, self.url)):
            yield Finding(code, where, what)
        expected = stored_columns(span, sample, self.manifest, url=self.url, row=row) | own_hashes(own)
        if (what := expected.pop("image_block", None)) is not None:
            yield Finding("image_block", where, what)
        if row is not None:
            yield from (Finding("index", where, what) for what in compare_row(expected, row))


@dataclass(frozen=True, eq=False)
class ShardCheck:
    """One shard to check."""

    shard: ShardInfo
    rows: list[Row] | None

    def __str__(self) -> str:
        return self.shard.path


def _place(shard: ShardInfo, span: Span) -> str:
    return f"{shard.path}, sample {span.key}"


# --- one sample -------------------------------------------------------------------------------------------


def check_ids(sample: Sample, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """(code, what) of everything wrong with the ids and labels."""
    ids, labels = sample.input_ids, sample.labels
    if len(ids) != len(labels):
        yield "labels", f"{len(ids)} input_ids but {len(labels)} labels"
        return
    outside = np.flatnonzero((ids < 0) | (ids >= manifest.vocab_size))
    if len(outside):
        at = outside[0]
        yield "vocabulary", f"{len(outside)} ids outside 0…{manifest.vocab_size - 1}, first {ids[at]} at {at}"
    supervised = labels != IGNORE_INDEX
    wrong = np.flatnonzero(supervised & (labels != ids))
    if len(wrong):
        at = wrong[0]
        yield (
            "labels",
            f"{len(wrong)} labels are neither the id nor {IGNORE_INDEX}, first {labels[at]} at {at}",
        )
    if not supervised.any():
        yield "labels", "no supervised token"
    if manifest.is_omnilmm:
        yield from _check_blocks(sample, supervised, manifest)


def _check_blocks(sample: Sample, supervised: np.ndarray, manifest: Manifest) -> Iterator[tuple[str, str]]:
    ids, num_query = sample.input_ids, manifest.num_query
    start, patch, end = (manifest.special_tokens.get(name, -1) for name in (IM_START, IM_PATCH, IM_END))
    starts = np.flatnonzero(ids == start)
    expected = np.full(len(ids), -1)
    for at in starts:
        expected[at : at + num_query + 2] = [start, *[patch] * num_query, end][: len(ids) - at]
    is_image = np.isin(ids, (start, patch, end))
    bad = np.flatnonzero((is_image | (expected >= 0)) & (ids != expected))
    cut = len(starts) and starts[-1] + num_query + 2 > len(ids)
    if len(bad) or cut:
        at = bad[0] if len(bad) else len(ids)
        yield (
            "image_block",
            f"broken at token {at}: a block is <im_start>, {num_query} × <im_patch>, <im_end>",
        )
    if (is_image & supervised).any():
        yield "image_block", f"image token supervised at {np.flatnonzero(is_image & supervised)[0]}"
    if len(starts) != len(sample.images):
        yield "image_block", f"{len(starts)} image blocks but {len(sample.images)} images"
    if what := check_slices(sample, manifest):
        yield "image_block", what


def check_images(sample: Sample) -> Iterator[tuple[str, str]]:
    """(code, what) of every image that does not decode."""
    for position, image in enumerate(sample.images):
        try:
            decode_rgb(image)
        except RejectError as error:
            yield "image", f"image {position} does not decode: {error.detail}"


def compare_row(expected: Row, row: Row) -> Iterator[str]:
    """Everything in which the stored sample differs from its index row."""
    for name, stored in expected.items():
        if row[name] != stored:
            yield f"{name} is {row[name]!r} in the index, {stored!r} in the shard"


def stored_columns(
    span: Span, sample: Sample, manifest: Manifest, *, url: str, row: Row | None = None
) -> Row:
    """The index columns that the shard itself proves; none of those that damaged ids do not show.

    ``image_block`` says what is wrong with a processor's runs, if anything.
    """
    sizes = [image_size(image) for image in sample.images]
    if manifest.is_omnilmm:
        slices = {} if check_slices(sample, manifest) else {"slices": slice_layout(sample, manifest)}
        runs = slices | omnilmm_columns(sample, manifest)
    else:
        no_slices: Row = {"slices": []}
        runs = no_slices | _processor_columns(sample, sizes, manifest, url, row)
    columns: Row = {
        "key": span.key,
        "offset": span.offset,
        "nbytes": len(span.raw),
        "n_tokens": len(sample.input_ids),
        "n_supervised": int((sample.labels != IGNORE_INDEX).sum()),
        "n_images": len(sample.images),
        "image_sizes": sizes,
    }
    return runs | columns | own_hashes(sample)


def own_hashes(sample: Sample) -> Row:
    """The columns that tell damage in the sample's own byte range."""
    dialogue = sample.dialogue
    return {
        "content_hash": content_hash(sample),
        "dialogue_bytes": len(dialogue),
        "dialogue_hash": dialogue_hash(dialogue),
    }


def _processor_columns(
    sample: Sample, sizes: list[list[int]], manifest: Manifest, url: str, row: Row | None
) -> Row:
    from omnidata.profiles.opening import open_profile

    try:
        columns = run_columns(sample, open_profile(url, manifest), sizes, row)
    except LayoutError as error:
        return {"image_block": str(error)}
    what = check_unsupervised(sample, columns)
    return columns | ({"image_block": what} if what else {})


def image_size(image: bytes) -> list[int]:
    """[width, height] from the header; [0, 0] if that is damaged (check_images says how)."""
    from omnidata.images.header import read_header

    try:
        return list(read_header(image).upright_size)
    except RejectError:
        return [0, 0]
