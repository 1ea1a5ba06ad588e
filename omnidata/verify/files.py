"""The quick check of the files: all there, of the right size, the small ones with the right content."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from omnidata.durable import Store
from omnidata.index import idx_bytes, rows_of_shards
from omnidata.interop import energon_files
from omnidata.schema import CARD, PROCESSOR_DIR, SHARDS_DIR, TOKENIZER_DIR, Manifest, UserError
from omnidata.text.prepared import load_prepared
from omnidata.text.tokenizer import fingerprint, load_tokenizer, special_token_ids, template_fingerprint
from omnidata.verify.findings import Finding

if TYPE_CHECKING:
    import pyarrow as pa


def check_files(store: Store, manifest: Manifest) -> Iterator[Finding]:
    """Shards and card: there, complete, and no others."""
    listed = {shard.path for shard in manifest.shards}
    present = {f"{SHARDS_DIR}/{name}" for name in store.names(SHARDS_DIR)}
    for shard in manifest.shards:
        size = store.size(shard.path)
        if size is None:
            yield Finding("file_missing", shard.path, f"{shard.num_samples} samples are in it")
        elif size != shard.num_bytes:
            yield Finding("file_size", shard.path, f"{size} bytes, the manifest says {shard.num_bytes}")
    for extra in sorted(name for name in present - listed if name.endswith(".tar")):
        yield Finding("file_extra", extra, "the manifest does not list it, but a glob of *.tar would read it")
    if store.size(CARD) is None:
        yield Finding("file_missing", CARD, "the dataset card")


def check_idx(store: Store, manifest: Manifest, index: pa.Table) -> Iterator[Finding]:
    """Each ``.tar.idx`` holds the offsets that the index has for its shard."""
    if len(index) and min(index[name].to_numpy().min() for name in ("offset", "nbytes")) < 0:
        return  # check_index has said so: there is nothing to compare with
    for path, expected in idx_files(manifest, index).items():
        if store.size(path) is None:
            yield Finding("file_missing", path, "Energon's index of the shard")
        elif store.read_bytes(path) != expected:
            yield Finding("idx", path, "differs from the offsets in the index")


def idx_files(manifest: Manifest, index: pa.Table) -> dict[str, bytes]:
    """Path and content of every ``.tar.idx``, from the index."""
    offsets, sizes = index["offset"].to_numpy(), index["nbytes"].to_numpy()
    rows = rows_of_shards(index)
    files = {}
    for shard in manifest.shards:
        mine = rows.get(shard.path, np.zeros(0, np.int64))
        files[f"{shard.path}.idx"] = idx_bytes(
            list(zip(offsets[mine].tolist(), sizes[mine].tolist(), strict=True))
        )
    return files


def check_energon(store: Store, manifest: Manifest) -> Iterator[Finding]:
    """``.nv-meta`` is what the manifest gives."""
    for path, expected in energon_files(manifest).items():
        if store.size(path) is None:
            yield Finding("nv_meta", path, "missing: Energon cannot open the dataset")
        elif store.read_bytes(path) != expected:
            yield Finding(
                "nv_meta", path, "differs from what the manifest gives (damaged, or edited by hand)"
            )


def check_processor(store: Store, manifest: Manifest) -> Iterator[Finding]:
    """The processor of the dataset still does what it did when the dataset was built."""
    if manifest.is_omnilmm:
        return
    from omnidata.profiles.fingerprint import check_fingerprint
    from omnidata.profiles.opening import open_profile

    try:
        profile = open_profile(store.url, manifest)
        check_fingerprint(profile, manifest.profile["fingerprint"], where=store.url)
    except UserError as error:
        yield Finding("processor", PROCESSOR_DIR, str(error))


def check_tokenizer(store: Store, manifest: Manifest) -> Iterator[Finding]:
    """The tokenizer of the dataset still computes what it did when the dataset was built."""
    try:
        folder = store.local_copy(TOKENIZER_DIR)
        tokenizer = load_prepared(folder) or load_tokenizer(folder)
    except UserError as error:
        yield Finding("tokenizer", TOKENIZER_DIR, str(error))
        return
    found = {
        "tokenizer_fingerprint": fingerprint(tokenizer),
        "chat_template_fingerprint": template_fingerprint(tokenizer),
        "special_tokens": special_token_ids(tokenizer, manifest.special_tokens),
        "vocab_size": len(tokenizer),
    }
    for name, value in found.items():
        if value != getattr(manifest, name):
            what = f"{name} is {value} now, it was {getattr(manifest, name)} at the build"
            yield Finding("tokenizer", TOKENIZER_DIR, what)
