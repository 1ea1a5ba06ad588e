"""The plan of a build: what it is made from, and how the corpus is cut into shards. Kept in
``.build/plan.json`` until the dataset is complete, so that every run and every task builds the same shards.

    identity_of   settings, tokenizer, versions, inputs: all that can change a byte, but a folder's pictures
    make_plan     scan (units and their counts) ─▶ survey (splits, sizes, ids) ─▶ Stretch rows
    what_changed  why an unfinished build cannot go on
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from omnidata.builder.layout import MIN_RECORD_BYTES, Stretch, stretch_from_json, stretch_to_json
from omnidata.builder.settings import BuildSettings
from omnidata.builder.survey import (
    RunTasks,
    ScanTask,
    Survey,
    SurveyTask,
    in_order,
    in_runs,
    weighed_together,
)
from omnidata.corpus import SourceFile
from omnidata.durable import SCRATCH, Store
from omnidata.schema import UserError

PLAN = f"{SCRATCH}/plan.json"
PROBES = 64  # records built in all, to estimate how many bytes one takes …
PROBES_PER_UNIT = 4  # … or so many of every unit (or run of small ones), if that is more


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

    def records_of_files(self) -> list[int]:
        """Records of each input file."""
        counts = [0] * len(self.identity["inputs"])
        for stretch in self.stretches:
            counts[stretch.file] += stretch.num_records
        return counts


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
    identity: dict[str, object],
    settings: BuildSettings,
    files: Sequence[SourceFile],
    run: RunTasks,
    *,
    weigh: bool = False,
) -> BuildPlan:
    """Scan and, if the settings need it, survey the corpus; ``weigh`` records even if they do not.

    Raises:
        UserError: there is not one record.
    """
    units = in_order(run, [ScanTask(number, some) for number, some in enumerate(in_runs(files))])
    stretches: list[Stretch] = []
    start, others = 0, tuple(0 for _ in settings.split)
    for number, of_file in enumerate(units):
        for unit in of_file:
            counts = (unit.num_records, *others)
            stretches.append(Stretch(number, unit, start, unit.num_records, counts, MIN_RECORD_BYTES))
            start += unit.num_records
    if not start:
        raise UserError("the sources hold no record at all")
    read_ids = bool(settings.split) or settings.duplicate_ids == "reject"
    weigh = weigh or not settings.samples_per_shard
    if not read_ids and not weigh:
        return BuildPlan(identity, tuple(stretches), ())
    num_probes = max(PROBES_PER_UNIT, math.ceil(PROBES / len(stretches))) if weigh else 0
    tasks = [
        SurveyTask(number, some, tuple(files[each.file] for each in some), read_ids, num_probes)
        for number, some in enumerate(weighed_together(stretches))
    ]
    surveys = in_order(run, tasks)
    repeated = repeats(b"".join(s.ids for s in surveys)) if settings.duplicate_ids == "reject" else ()
    return BuildPlan(identity, with_surveys(stretches, surveys), tuple(repeated))


def with_surveys(stretches: Sequence[Stretch], surveys: Sequence[Survey]) -> tuple[Stretch, ...]:
    """The stretches with what the surveys found; where no probe became a sample, the mean of the others."""
    known = [survey.record_bytes for survey in surveys if survey.record_bytes]
    fallback = max(MIN_RECORD_BYTES, sum(known) // len(known) if known else 0)
    return tuple(
        Stretch(
            each.file, each.unit, each.start, each.num_records, survey.counts, survey.record_bytes or fallback
        )
        for each, survey in zip(stretches, surveys, strict=True)
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
