"""Layout: which record goes to which shard, decided before any shard is written.

A cheap scan cuts the corpus into units (runs of records that can be read on their own) and counts them. Where
more must be known, workers survey the units: how many records each split gets (by hash of the id), and how
many bytes a record takes (from a few that are really built). From those numbers alone ``cut_shards`` makes
the shards, so that a shard is a function of (corpus, settings) and not of who builds it, where, or when::

    unit 0: 1000 records, 990 train + 10 val     train-00000: unit 0 train 0..990, unit 1 train 0..10
    unit 1: 1000 records, 985 train + 15 val     val-00000:   unit 0 val 0..10,    unit 1 val 0..15
"""

from __future__ import annotations

import bisect
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from omnidata.builder.settings import TRAIN, BuildSettings
from omnidata.corpus import SourceFile, Unit
from omnidata.corpus.source import Plain
from omnidata.schema import shard_name

MIN_RECORD_BYTES = 2048  # two arrays with their headers: what the smallest sample takes
MAX_AUTO_BYTES, MIN_AUTO_BYTES, AUTO_SHARDS, MAX_AUTO_SAMPLES = 512_000_000, 16_000_000, 64, 10_000


@dataclass(frozen=True, slots=True)
class Stretch(Plain):
    """A unit of the corpus with what the survey found out about it."""

    file: int  # which of the build's files
    unit: Unit
    start: int  # position of its first record in the whole corpus
    num_records: int
    counts: tuple[int, ...]  # records per split, in the order of BuildSettings.splits
    record_bytes: int  # estimated bytes of one record in a shard


@dataclass(frozen=True, slots=True)
class Piece(Plain):
    """Records ``[first, last)`` of those that a stretch holds for one split."""

    stretch: Stretch
    first: int
    last: int


@dataclass(frozen=True, slots=True, eq=False)
class ShardTask:
    """One shard to build."""

    split: str
    number: int
    pieces: tuple[Piece, ...]
    duplicates: frozenset[int] = frozenset()  # positions of records that an earlier one's id refuses
    files: Mapping[int, SourceFile] = field(default_factory=dict)  # those that the pieces lie in

    @property
    def path(self) -> str:
        """The shard's path in the dataset."""
        return shard_name(self.split, self.number)

    @property
    def num_records(self) -> int:
        """Records that the shard must account for."""
        return sum(piece.last - piece.first for piece in self.pieces)

    def __str__(self) -> str:
        return self.path


def split_of(record_id: str, settings: BuildSettings) -> str:
    """The split of a record: a function of its id and the seed, so it stays when the corpus grows."""
    if not settings.split:
        return TRAIN
    salted = hashlib.blake2b(
        record_id.encode("utf-8", "surrogatepass"), digest_size=8, key=b"%d" % settings.seed
    )
    point = int.from_bytes(salted.digest(), "big") / 2**64
    for name, fraction in settings.split.items():
        if point < fraction:
            return name
        point -= fraction
    return TRAIN


def auto_shard_bytes(stretches: Sequence[Stretch]) -> int:
    """Bytes per shard if nothing is said: 512 MB, less (to 16 MB) if that would give under 64 shards."""
    total = sum(stretch.num_records * stretch.record_bytes for stretch in stretches)
    return min(MAX_AUTO_BYTES, max(MIN_AUTO_BYTES, total // AUTO_SHARDS))


def cut_shards(
    stretches: Sequence[Stretch],
    settings: BuildSettings,
    files: Sequence[SourceFile],
    *,
    duplicates: Sequence[int] = (),
) -> list[ShardTask]:
    """All shards of the build, split by split.

    Example: 2500 records at ``samples_per_shard=1000`` -> shards of 1000, 1000 and 500 records.
    """
    repeated = sorted(duplicates)
    tasks = []
    for position, split in enumerate(settings.splits):
        for number, pieces in enumerate(_cut_split(stretches, settings, position)):
            mine = frozenset(at for piece in pieces if repeated for at in _within(repeated, piece.stretch))
            read = {piece.stretch.file: files[piece.stretch.file] for piece in pieces}
            tasks.append(ShardTask(split, number, tuple(pieces), mine, read))
    return tasks


def _within(positions: Sequence[int], stretch: Stretch) -> Sequence[int]:
    """Those of the sorted positions that lie in the stretch."""
    low = bisect.bisect_left(positions, stretch.start)
    return positions[low : bisect.bisect_left(positions, stretch.start + stretch.num_records)]


def _cut_split(stretches: Sequence[Stretch], settings: BuildSettings, position: int) -> Iterator[list[Piece]]:
    """The pieces of each shard of one split. ``room`` counts records, or bytes by the estimate."""
    most: float
    if settings.samples_per_shard:
        room, most = settings.samples_per_shard, settings.samples_per_shard
    else:
        room = settings.shard_bytes or auto_shard_bytes(stretches)
        most = math.inf if settings.shard_bytes else MAX_AUTO_SAMPLES
    pieces: list[Piece] = []
    used = held = 0
    for stretch in stretches:
        cost = 1 if settings.samples_per_shard else stretch.record_bytes
        first, count = 0, stretch.counts[position]
        while first < count:
            fits = int(min(max((room - used) // cost, 0 if pieces else 1), most - held))
            if fits < 1:
                yield pieces
                pieces, used, held = [], 0, 0
                continue
            last = min(count, first + fits)
            pieces.append(Piece(stretch, first, last))
            used, held, first = used + (last - first) * cost, held + last - first, last
    if pieces:
        yield pieces


# --- as JSON, for the plan file ---------------------------------------------------------------------------


def stretch_to_json(stretch: Stretch) -> list[object]:
    """A row of the plan file."""
    unit = stretch.unit
    fields = {name: getattr(unit, name) for name in Unit.__slots__}
    row = (stretch.file, fields, stretch.start, stretch.num_records)
    return [*row, list(stretch.counts), stretch.record_bytes]


def stretch_from_json(row: list[Any]) -> Stretch:
    """The stretch of a plan file's row."""
    file, unit, start, num_records, counts, record_bytes = row
    return Stretch(file, Unit(**unit), start, num_records, tuple(counts), record_bytes)
