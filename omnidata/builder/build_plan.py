"""The plan of a build: what it is made from, and how the corpus is cut into shards. Kept in
``.build/plan.json`` until the dataset is complete, so that every run and every task builds the same shards.

    identity_of   settings, tokenizer, versions, inputs: all that can change a byte, but a folder's pictures
    make_plan     scan (units and their counts) ─▶ survey (splits, sizes, ids) ─▶ Stretch rows
    what_changed  why an unfinished build cannot go on
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import orjson

from omnidata.builder.layout import MIN_RECORD_BYTES, Stretch, stretch_from_json, stretch_to_json
from omnidata.builder.settings import BuildSettings
from omnidata.builder.worker import ScanTask, Survey, SurveyTask
from omnidata.durable import SCRATCH, Store
from omnidata.schema import UserError

PLAN = f"{SCRATCH}/plan.json"
PROBES = 64  # records built in all, to estimate how many bytes one takes …
PROBES_PER_UNIT = 4  # … or so many of every unit, where that is more
RunTasks = Callable[[Sequence[Any]], Iterator[tuple[Any, Any]]]  # executors.run_tasks with an executor


@dataclass(frozen=True)
class BuildPlan:
    """What .build/plan.json holds."""

    identity: dict[str, Any]
    stretches: tuple[Stretch, ...]
    duplicates: tuple[int, ...]  # positions of records refused by --duplicate-ids reject

    @property
    def num_records(self) -> int:
        """Records of the whole corpus."""
        return sum(stretch.num_records for stretch in self.stretches)

    def records_of_file(self, number: int) -> int:
        """Records of one input file."""
        return sum(stretch.num_records for stretch in self.stretches if stretch.file == number)


# --- on disk ----------------------------------------------------------------------------------------------


def read_plan(store: Store) -> BuildPlan | None:
    """The plan of an unfinished build, or None."""
    if not store.exists(PLAN):
        return None
    content = orjson.loads(store.read_bytes(PLAN))
    stretches = tuple(stretch_from_json(row) for row in content["stretches"])
    return BuildPlan(content["identity"], stretches, tuple(content["duplicates"]))


def write_plan(store: Store, plan: BuildPlan) -> None:
    """Keep the plan: from here on the build can be resumed."""
    content = {
        "identity": plan.identity,
        "stretches": [stretch_to_json(stretch) for stretch in plan.stretches],
        "duplicates": list(plan.duplicates),
    }
    store.write_bytes(PLAN, orjson.dumps(content))


# --- making one -------------------------------------------------------------------------------------------


def make_plan(
    identity: dict[str, Any], settings: BuildSettings, num_files: int, run: RunTasks, *, weigh: bool = False
) -> BuildPlan:
    """Scan and, where the settings need it, survey the corpus; ``weigh`` records even if they do not.

    Raises:
        UserError: there is not one record.
    """
    found = dict(run([ScanTask(number) for number in range(num_files)]))
    stretches: list[Stretch] = []
    start = 0
    for task in sorted(found, key=lambda task: task.file):
        for unit in found[task]:
            counts = (unit.num_records, *(0 for _ in settings.split))
            stretches.append(
                Stretch(task.file, unit, start, unit.num_records, counts, record_bytes=MIN_RECORD_BYTES)
            )
            start += unit.num_records
    if not start:
        raise UserError("the sources hold no record at all")
    read_ids = bool(settings.split) or settings.duplicate_ids == "reject"
    weigh = weigh or not settings.samples_per_shard
    if not read_ids and not weigh:
        return BuildPlan(identity, tuple(stretches), ())
    num_probes = max(PROBES_PER_UNIT, math.ceil(PROBES / len(stretches))) if weigh else 0
    tasks = [SurveyTask(number, each, read_ids, num_probes) for number, each in enumerate(stretches)]
    found = {task.number: answer for task, answer in run(tasks)}
    surveys = [found[number] for number in range(len(stretches))]
    repeated = repeats(b"".join(s.ids for s in surveys)) if settings.duplicate_ids == "reject" else ()
    return BuildPlan(identity, with_surveys(stretches, surveys), tuple(repeated))


def with_surveys(stretches: Sequence[Stretch], surveys: Sequence[Survey]) -> tuple[Stretch, ...]:
    """The stretches with what the surveys found; where no probe became a sample, the mean of the others."""
    known = [survey.record_bytes for survey in surveys if survey.record_bytes]
    fallback = max(MIN_RECORD_BYTES, sum(known) // len(known) if known else 0)
    return tuple(
        replace(stretch, counts=survey.counts, record_bytes=survey.record_bytes or fallback)
        for stretch, survey in zip(stretches, surveys, strict=True)
    )


def repeats(digests: bytes) -> list[int]:
    """Positions of the 16-byte digests that already stood further in front, sorted.

    Example: digests a, b, a, a -> [2, 3].
    """
    pairs = np.frombuffer(digests, dtype=[("high", ">u8"), ("low", ">u8")])
    order = np.lexsort((np.arange(len(pairs)), pairs["low"], pairs["high"]))
    in_order = pairs[order]
    same = in_order[1:] == in_order[:-1]
    return sorted(order[1:][same].tolist())
