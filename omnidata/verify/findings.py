"""What ``verify`` reports: one Finding for each thing that is wrong, and what may be done about it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong with a dataset."""

    code: str  # a key of CODES
    where: str  # file, and the byte, row or sample in it
    what: str  # what is there and what should be

    def __post_init__(self) -> None:
        assert self.code in CODES, self.code


CODES: dict[str, str] = {
    # quick
    "manifest": "manifest.json contradicts itself",
    "file_missing": "a file of the dataset is not there",
    "file_extra": "a shard that the manifest does not list",
    "file_size": "a file is longer or shorter than it should be",
    "totals": "a total of the manifest differs from the sum of the index or of the rejects",
    "index": "a row of the index contradicts the manifest, its neighbour, or the shard",
    "index_unreadable": "index.parquet is no table of this schema",
    "duplicate_key": "two samples share a key",
    "rejects": "rejects.parquet is unreadable or contradicts the manifest",
    "idx": "a .tar.idx does not hold the offsets of the index",
    "origin": "what a copy says it took from other datasets is not what it holds",
    "nv_meta": ".nv-meta is missing or contradicts the manifest",
    "tokenizer": "the tokenizer does not load, or does not behave as the one of the build",
    "processor": "the model's processor does not load, or does not do what it did at the build",
    "base": "the base of a view is not there, has changed, or is not what the view's index says",
    # deep
    "sha256": "a shard's bytes are not those that were written",
    "damaged": "bytes that are no sample of this schema",
    "not_in_index": "a stored sample without an index row",
    "sample_missing": "an index row without a stored sample",
    "vocabulary": "token ids outside the vocabulary",
    "labels": "labels that are neither the id nor IGNORE_INDEX, or none at all",
    "image_block": "image tokens that are not whole, unsupervised blocks, one per image",
    "image": "a stored image that does not decode",
    "dialogue": "a KEY.json that is none, or that renders to other ids or labels than are stored",
}
REPAIRABLE = {
    "index",
    "index_unreadable",
    "duplicate_key",
    "idx",
    "nv_meta",
    "not_in_index",
    "sample_missing",
}
