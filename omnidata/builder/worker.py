"""Worker: the kinds of task that a build deals out, each a function of the job and the task alone.

    OpenTask, ScanTask, SurveyTask   what must be known before the corpus is cut: survey.py
    ShardTask                        read its records, run the stages, write one shard   -> ShardResult
    any function                     of the job (dedup uses it)

A shard is done when its part is there, which is written last::

    shards/train-00007.tar  shards/train-00007.tar.idx    what the dataset keeps
    .build/parts/train-00007.rejects.parquet              rows for rejects.parquet, if any
    .build/parts/train-00007.parquet                      rows for index.parquet; the counts as metadata
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Protocol

from omnidata.builder.columns import KEPT, kept_json, part_schema
from omnidata.builder.job import Job, read_stretch, stages
from omnidata.builder.last_words import reading
from omnidata.builder.layout import Piece, ShardTask, split_of
from omnidata.builder.records import COUNTS, Built, Positioned, raw_excerpt
from omnidata.builder.survey import OpenTask, ScanTask, SurveyTask, identity, open_files, scan, survey
from omnidata.corpus import SourceFile
from omnidata.durable import PARTS, Store
from omnidata.index import idx_bytes, index_schema, index_table, reject_schema, reject_table, write_tables
from omnidata.schema import Reject, ShardInfo, UserError
from omnidata.shards import HashedFile, content_hash, dialogue_hash, write_shard

REPORT_SECONDS = 0.5
REJECTS_SECONDS, FIRST_REJECTS = 10.0, 1000  # how often a shard's rejects so far are kept, and how many

Report = Callable[[object], None]
Counts = dict[str, dict[str, int]]  # unread_keys, spelled_tokens, content_tokens -> name -> samples


@dataclass(frozen=True, slots=True)
class ShardResult:
    """What a shard came to."""

    num_records: int
    num_samples: int
    rejects: dict[str, int]  # reason -> count
    num_bytes: int
    truncated: list[str]  # keys of samples that lost turns to max_length
    num_supervised: int
    num_images: int
    num_dialogue_bytes: int
    counts: Counts
    info: ShardInfo | None  # None: every record was refused, so there is no shard


@dataclass(frozen=True, slots=True)
class Tally:
    """Progress of a running shard."""

    num_records: int
    num_rejects: int
    num_bytes: int
    first_rejects: tuple[dict[str, object], ...] = ()


def work(job: Job, task: Any, report: Report) -> object:
    """Do one task."""
    if isinstance(task, OpenTask):
        return open_files(task)
    if isinstance(task, ScanTask):
        return scan(task)
    if isinstance(task, SurveyTask):
        return survey(job, task)
    if isinstance(task, ShardTask):
        return build_shard(job, task, report)
    return task(job)


# --- a shard ----------------------------------------------------------------------------------------------


class _NoSampleError(Exception):
    """Every record of the shard was refused: no file may appear."""


def build_shard(job: Job, task: ShardTask, report: Report) -> ShardResult:
    """Read the task's records, write the shard, its ``.idx`` and, last, its part."""
    store = Store(job.out)
    run = _ShardRun(store, task, report)
    for path in (task.path, f"{task.path}.idx", part_path(task), rejects_path(task)):
        store.remove_temps(path)
    with reading(store, task) as note:
        outcomes = stages(job).run(records_of(job, task), note)
        hashed = None
        with contextlib.suppress(_NoSampleError), store.write(task.path) as file:
            hashed = run.file = HashedFile(file)
            spans = write_shard(hashed, run.samples(outcomes))
            run.place(spans)
            if not spans:
                raise _NoSampleError
    if run.num_records != task.num_records:
        raise UserError(
            f"{task} should hold {task.num_records} records but {run.num_records} were read: "
            "a source changed while it was read. Build anew with --overwrite."
        )
    return write_part(
        store,
        task,
        hashed,
        rows=run.rows,
        rejects=run.rejects,
        truncated=run.truncated,
        counts={name: dict(sorted(counter.items())) for name, counter in run.counts.items()},
    )


def write_part(
    store: Store,
    task: ShardTask,
    file: HashedFile | None,
    *,
    rows: list[dict[str, Any]],
    rejects: list[Reject],
    truncated: list[str],
    counts: Counts,
) -> ShardResult:
    """Write what belongs to a shard's tar; the part comes last and makes the shard done."""
    result = shard_result(task, file if rows else None, rows, rejects, truncated, counts)
    if rows:
        store.write_bytes(f"{task.path}.idx", idx_bytes([(row["offset"], row["nbytes"]) for row in rows]))
    if rejects:
        write_rejects(store, task, rejects)
    else:
        store.remove(rejects_path(task))  # of a run that was stopped before it wrote its part
    metadata = {"omnidata": json.dumps(asdict(result))}
    with store.write(part_path(task)) as out:
        schema = part_schema(index_schema(), rows)
        write_tables(out, schema.with_metadata(metadata), [index_table(rows, schema)])
    return result


def write_rejects(store: Store, task: ShardTask, rejects: list[Reject]) -> None:
    """Rows for rejects.parquet; of a shard that is not done, those so far."""
    with store.write(rejects_path(task)) as out:
        write_tables(out, reject_schema(), [reject_table(map(asdict, rejects))])


def shard_result(
    task: ShardTask,
    file: HashedFile | None,
    rows: list[dict[str, Any]],
    rejects: list[Reject],
    truncated: list[str],
    counts: Counts,
) -> ShardResult:
    """A finished shard in numbers."""
    num_tokens = sum(row["n_tokens"] for row in rows)
    info = None
    if file:
        digest = file.sha256.hexdigest()
        info = ShardInfo(task.path, task.split, len(rows), num_tokens, file.num_bytes, digest)
    return ShardResult(
        num_records=len(rows) + len(rejects),
        num_samples=len(rows),
        rejects=dict(sorted(Counter(reject.reason for reject in rejects).items())),
        num_bytes=file.num_bytes if file else 0,
        truncated=truncated,
        num_supervised=sum(row["n_supervised"] for row in rows),
        num_images=sum(row["n_images"] for row in rows),
        num_dialogue_bytes=sum(row["dialogue_bytes"] for row in rows),
        counts=counts,
        info=info,
    )


def total_counts(results: Iterable[ShardResult]) -> dict[str, dict[str, int]]:
    """What is counted by name, over all shards."""
    totals = {name: Counter[str]() for name in COUNTS}
    for result in results:
        for name, counts in result.counts.items():
            totals[name].update(counts)
    return {name: dict(sorted(counter.items())) for name, counter in totals.items()}


class NumberedShard(Protocol):
    """A shard by its place in the dataset: the task of a build or of a copy."""

    @property
    def split(self) -> str:
        """Which split it is of."""
        ...

    @property
    def number(self) -> int:
        """Its number in the split."""
        ...


def part_path(task: NumberedShard) -> str:
    """The file that says that a shard is done."""
    return f"{PARTS}/{task.split}-{task.number:05d}.parquet"


def rejects_path(task: ShardTask) -> str:
    """The shard's rejects."""
    return f"{PARTS}/{task.split}-{task.number:05d}.rejects.parquet"


def read_part(store: Store, task: NumberedShard) -> ShardResult | None:
    """The result of a shard that is done, or None.

    A shard whose file is gone or has another size is not done.
    """
    import pyarrow.parquet as pq

    if not store.exists(part_path(task)):
        return None
    with store.open(part_path(task)) as file:
        content = json.loads(pq.read_schema(file).metadata[b"omnidata"])
    info = ShardInfo(**content["info"]) if content["info"] else None
    if info and store.size(info.path) != info.num_bytes:
        return None
    return ShardResult(**(content | {"info": info}))


def records_of(job: Job, task: ShardTask) -> Iterator[Positioned]:
    """The task's records, in corpus order; those that --duplicate-ids refuses as rejects."""
    for piece in task.pieces:
        for position, record in _records_of_piece(job, task.split, piece, task.files[piece.stretch.file]):
            if position in task.duplicates and not isinstance(record, Reject):
                detail = f"an earlier record has the id {record.id!r}; --duplicate-ids keep builds both"
                place = (record.source, record.locator, record.id)
                record = Reject(*place, "duplicate_id", detail, raw_excerpt(record.payload))
            yield position, record


def _records_of_piece(job: Job, split: str, piece: Piece, file: SourceFile) -> Iterator[Positioned]:
    mine = (
        (position, record)
        for position, record in read_stretch(file, piece.stretch)
        if job.base or not job.settings.split or split_of(identity(record), job.settings) == split
    )
    yield from islice(mine, piece.first, piece.last)


class _ShardRun:
    """What is counted and kept while one shard is written."""

    def __init__(self, store: Store, task: ShardTask, report: Report) -> None:
        self._store, self._task, self._report = store, task, report
        self._next_report = time.monotonic() + REPORT_SECONDS
        self._next_rejects = 0.0
        self.rows: list[dict[str, object]] = []
        self.rejects: list[Reject] = []
        self.truncated: list[str] = []
        self.counts = {name: Counter[str]() for name in COUNTS}
        self.file: HashedFile | None = None

    @property
    def num_bytes(self) -> int:
        return self.file.num_bytes if self.file else 0

    @property
    def num_records(self) -> int:
        return len(self.rows) + len(self.rejects)

    def samples(self, outcomes: Iterator[Built | Reject]) -> Iterator[Any]:
        """The samples among the outcomes; each also becomes an index row, each reject is kept."""
        for outcome in outcomes:
            if isinstance(outcome, Reject):
                self.rejects.append(outcome)
            else:
                self.rows.append(self._row(outcome))
                for name, counter in self.counts.items():
                    counter.update(getattr(outcome, name))
                if outcome.rendered.num_truncated_messages:
                    self.truncated.append(outcome.sample.key)
                yield outcome.sample
            if time.monotonic() >= self._next_report:
                self._next_report = time.monotonic() + REPORT_SECONDS
                self._tell()

    def _tell(self) -> None:
        """Report; a build that is stopped over its rejects has some to look at."""
        if self.rejects and time.monotonic() >= self._next_rejects:
            self._next_rejects = time.monotonic() + REJECTS_SECONDS
            write_rejects(self._store, self._task, self.rejects[:FIRST_REJECTS])
        first = tuple(asdict(reject) for reject in self.rejects[:3])
        self._report(Tally(self.num_records, len(self.rejects), self.num_bytes, first))

    def _row(self, built: Built) -> dict[str, object]:
        sample, record = built.sample, built.record
        return (
            {
                "key": sample.key,
                "split": self._task.split,
                "shard": self._task.path,
                "n_tokens": len(sample.input_ids),
                "n_supervised": built.rendered.num_supervised,
                "n_images": len(built.images),
                "image_sizes": [[image.width, image.height] for image in built.images],
                "image_starts": built.rendered.image_starts,
                "image_tokens": built.rendered.image_tokens,
                "image_pixels": built.image_pixels,
                "slices": [list(grid or (0, 0)) for grid in built.grids],
                "id": record.id,
                "source": record.source,
                "locator": record.locator,
                "content_hash": content_hash(sample),
                "dialogue_bytes": len(sample.dialogue),
                "dialogue_hash": dialogue_hash(sample.dialogue),
            }
            | built.base
            | ({} if built.kept is None else {KEPT: kept_json(built.kept)})
        )

    def place(self, spans: list[tuple[int, int]]) -> None:
        """Put the byte ranges into the rows."""
        for row, (offset, nbytes) in zip(self.rows, spans, strict=True):
            row["offset"], row["nbytes"] = offset, nbytes
