"""Damaged files: a shard, the index and the manifest truncated, flipped, missing, and exchanged.

Whatever comes out must be one clear line of verify, of the plan or of the loader, or the very microbatches of
the whole dataset: a bit of padding may change nothing. Nothing else is trained on, and nobody ends in a
traceback.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tiny_dataset import build_tiny_dataset

from faults.table import Row
from omnidata.loader import PackLoader
from omnidata.plan import EpochPlan
from omnidata.schema import INDEX, MANIFEST, UserError
from omnidata.verify.run import verify

SHARD = "shards/train-00000.tar"
FILES = (SHARD, INDEX, MANIFEST)
FLIPS, EVERY = 500, 256


def rows(folder: Path, short: bool) -> Iterator[Row]:
    """A row for each file and way of damage."""
    data = build_tiny_dataset(folder / "data", num_samples=8, samples_per_shard=3, num_val=2)
    other = build_tiny_dataset(folder / "other", num_samples=10, samples_per_shard=4, num_val=2)
    whole = microbatches(data)
    for name in FILES:
        raw, dice = (data / name).read_bytes(), random.Random(name)
        cuts = [raw[:size] for size in range(0, len(raw), EVERY)]
        flips = [flipped(raw, dice.randrange(8 * len(raw))) for _ in range(FLIPS)]
        yield tried(data, name, "cut every 256 bytes", cuts[:: len(cuts) // 3 or 1] if short else cuts, whole)
        yield tried(data, name, "bits flipped", flips[:8] if short else flips, whole)
        exchanged = [None, (other / name).read_bytes()]
        if name == SHARD:
            exchanged.append((data / "shards/train-00001.tar").read_bytes())
        yield tried(data, name, "missing, another's", exchanged, whole)


def flipped(raw: bytes, bit: int) -> bytes:
    """``raw`` with one bit changed."""
    changed = bytearray(raw)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def microbatches(data: Path) -> list[Any]:
    """All that training would see."""
    loader = PackLoader(str(data), global_batch=2, max_tokens=400, num_epochs=1, image_size=24)
    return [(each.keys, each.input_ids.tolist(), each.images.numpy().tobytes()) for each in loader]


def tried(data: Path, name: str, how: str, contents: list[bytes | None], whole: list[Any]) -> Row:
    """Put each in the file's place and go through every door."""
    path, kept = data / name, data.parent / "kept"
    shutil.copy(path, kept)
    with Row(f"damaged {name}", how).timed() as row:
        for number, content in enumerate(contents):
            row.tried += 1
            path.unlink(missing_ok=True)
            if content is not None:
                path.write_bytes(content)
            _try(row, data, whole, f"number {number}", must_be_found=name == SHARD)
    shutil.copy(kept, path)
    return row


def _try(row: Row, data: Path, whole: list[Any], what: str, *, must_be_found: bool) -> None:
    trained = _door(row, lambda: microbatches(data), f"{what}: loading")
    if trained is not None and trained != whole:
        row.fail("lost", f"{what}: trained on damage")
    _door(row, lambda: EpochPlan(str(data)), f"{what}: planning")
    report = _door(row, lambda: verify(data, deep=True, num_workers=1), f"{what}: verifying")
    if must_be_found and report is not None and report.ok:
        row.fail("not_found", f"{what}: verify found nothing")


def _door(row: Row, enter: Callable[[], Any], what: str) -> Any:
    """What comes of it; None after one clear line."""
    try:
        return enter()
    except UserError as error:
        if "\n" in str(error):
            row.fail("not_found", f"{what}: more than a line")
    except Exception as error:  # no clear line: it ends the part, and so the table, with its place
        error.add_note(f"{row.fault}, {row.how}: {what}")
        raise
    return None
