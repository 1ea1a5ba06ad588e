"""Survey: what must be known of the corpus before it is cut into shards, found out by the workers.

    OpenTask(names)       detect each file's format, hash its content       -> [Opened, or what is wrong]
    ScanTask(files)       cut each file into units                          -> [[unit, …], …]
    SurveyTask(stretches) count records per split, weigh a few, collect ids   -> [Survey, …]

Each task is a run of files or units in their order, so that a million small files are a few thousand tasks.
Measured per small file on one core: 15 µs to open and read it, and as much again for every message about it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from omnidata import corpus
from omnidata.builder.job import Job, read_stretch, stages
from omnidata.builder.layout import Stretch, split_of
from omnidata.builder.records import Built
from omnidata.corpus.source import UNIT_RECORDS, Plain
from omnidata.schema import UserError
from omnidata.shards import BLOCK, sample_members

RunTasks = Callable[[Sequence[Any]], Iterator[tuple[Any, Any]]]  # executors.run_tasks with an executor
MANY_UNITS = 1000  # of more units than this, small ones are weighed in runs that hold UNIT_RECORDS
TASKS, MOST = 512, 256  # as many tasks as keep any number of workers busy; at most so many files in one


@dataclass(frozen=True, slots=True)
class Opened(Plain):
    """A source file, and the hash of what is in it."""

    file: corpus.SourceFile
    digest: str


@dataclass(frozen=True, slots=True)
class OpenTask:
    """Look at some files."""

    number: int
    names: tuple[str, ...]
    format: str


@dataclass(frozen=True, slots=True)
class ScanTask:
    """Cut some files into units."""

    number: int
    files: tuple[corpus.SourceFile, ...]


@dataclass(frozen=True, slots=True)
class SurveyTask:
    """Find out more about some units that follow one another."""

    number: int
    stretches: tuple[Stretch, ...]
    files: tuple[corpus.SourceFile, ...]  # of each
    read_ids: bool
    num_probes: int


@dataclass(frozen=True, slots=True)
class Survey(Plain):
    """What a SurveyTask found out about one unit."""

    counts: tuple[int, ...]  # records per split
    record_bytes: int | None  # mean of the task's probes that became samples; None if none did
    ids: bytes  # blake2b-128 of every record's id, one after the other


def open_files(task: OpenTask) -> list[Opened | str]:
    """The files in order, as far as the first one that is none."""
    opened: list[Opened | str] = []
    for name in task.names:
        try:
            file = corpus.open_file(name, format=task.format)
        except UserError as error:
            return [*opened, str(error)]
        opened.append(Opened(file, file.digest()))
    return opened


def scan(task: ScanTask) -> list[list[corpus.Unit]]:
    """The units of each file."""
    return [list(corpus.scan(file)) for file in task.files]


def in_runs(items: Sequence[object], *, most: int = MOST) -> list[tuple[Any, ...]]:
    """The items as runs of one length, one per task."""
    length = min(most, max(1, len(items) // TASKS))
    return [tuple(items[start : start + length]) for start in range(0, len(items), length)]


def in_order(run: RunTasks, tasks: Sequence[Any]) -> list[Any]:
    """The answers of tasks that answer with a list, put together in the order of the tasks."""
    answers = {task.number: answer for task, answer in run(tasks)}
    return [each for task in tasks for each in answers[task.number]]


# --- units ------------------------------------------------------------------------------------------------


def weighed_together(stretches: Sequence[Stretch]) -> Iterator[tuple[Stretch, ...]]:
    """The units one by one; if there are many, runs of small ones that follow one another.

    To weigh some records of each of a million small files would be to build them all.
    """
    most = UNIT_RECORDS if len(stretches) > MANY_UNITS else 0
    together: list[Stretch] = []
    held = 0
    for stretch in stretches:
        if together and held + stretch.num_records > most:
            yield tuple(together)
            together, held = [], 0
        together.append(stretch)
        held += stretch.num_records
    yield tuple(together)


def survey(job: Job, task: SurveyTask) -> list[Survey]:
    """Count each unit's records by split, and build a few to see how many bytes they take."""
    found = [
        _counted(job, file, stretch, read_ids=task.read_ids)
        for file, stretch in zip(task.files, task.stretches, strict=True)
    ]
    sizes = [
        num_bytes(built)
        for file, stretch, count in probes(task)
        for built in stages(job).run(islice(read_stretch(file, stretch), count))
        if isinstance(built, Built)
    ]
    mean = sum(sizes) // len(sizes) if sizes else None
    return [Survey(counts, mean, ids) for counts, ids in found]


def _counted(
    job: Job, file: corpus.SourceFile, stretch: Stretch, *, read_ids: bool
) -> tuple[tuple[int, ...], bytes]:
    """Records a split, and the hashes of their ids if those are wanted."""
    splits = job.settings.splits
    if not read_ids:
        return (stretch.num_records, *(0 for _ in splits[1:])), b""
    ids, counts = bytearray(), Counter[str]()
    for _, record in read_stretch(file, stretch):
        counts[split_of(identity(record), job.settings)] += 1
        ids += hashlib.blake2b(identity(record).encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return tuple(counts[split] for split in splits), bytes(ids)


def probes(task: SurveyTask) -> Iterator[tuple[corpus.SourceFile, Stretch, int]]:
    """(file, unit, number of its first records): the task's probes, spread over its units."""
    length = len(task.stretches)
    chosen = Counter(number * length // task.num_probes for number in range(task.num_probes))
    for at, count in chosen.items():
        yield task.files[at], task.stretches[at], count


def identity(record: Any) -> str:
    """What decides a record's split: its id, or its place if there is none (a line that is no JSON)."""
    return record.id or f"{record.source}:{record.locator}"


def num_bytes(built: Built) -> int:
    """Bytes of a sample in a tar."""
    return sum(BLOCK + len(data) + -len(data) % BLOCK for _, data in sample_members(built.sample))
