"""``build-shards --dry-run``: what a build would find and make. Nothing is written to --out.

The corpus is scanned and a few records of every unit are weighed, as a build does for its plan. Then some
records from all over the corpus are built into a throw-away dataset, which shows ten samples as they would
come out and the first rejects.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from omnidata.builder.build import open_executor
from omnidata.builder.build_plan import BuildPlan, make_plan
from omnidata.builder.finalize import complete, first_rejects
from omnidata.builder.inputs import open_inputs
from omnidata.builder.job import Job
from omnidata.builder.layout import Piece, ShardTask, Stretch, cut_shards
from omnidata.builder.report import describe
from omnidata.builder.settings import BuildSettings, RunOptions
from omnidata.builder.worker import build_shard
from omnidata.corpus import SourceFile
from omnidata.dataset import Dataset
from omnidata.durable import Store
from omnidata.executors import run_tasks

if TYPE_CHECKING:
    from omnidata.inspect.samples import SampleView

NUM_RECORDS, NUM_SAMPLES, NUM_REJECTS = 200, 10, 5


@dataclass(frozen=True)
class DryRunReport:
    """What a build would do, as far as a sample of the corpus tells."""

    sources: list[dict[str, object]]  # source, format, num_bytes, num_records
    num_records: int
    splits: dict[str, int]  # records, before any is refused
    num_shards: int
    estimated_bytes: int
    num_tried: int  # records that were built to see
    tried_rejects: dict[str, int]
    first_rejects: list[dict[str, object]]
    views: list[SampleView]

    def to_json(self) -> dict[str, object]:
        """Plain JSON values."""
        samples = [view.as_dict() for view in self.views]
        return asdict(replace(self, views=[])) | {"samples": samples}

    def lines(self) -> list[str]:
        """For people; the samples are printed in colour by the command."""
        files = [
            f"  {entry['num_records']:>12,}  {entry['format']:<10} {entry['source']}"
            for entry in self.sources[:20]
        ]
        more = [f"  … and {len(self.sources) - 20:,} more"] if len(self.sources) > 20 else []
        splits = ", ".join(f"{split} {count:,}" for split, count in self.splits.items())
        return [
            f"{self.num_records:,} records ({splits}):",
            *files,
            *more,
            f"about {self.num_shards:,} shards, {self.estimated_bytes / 1e6:,.1f} MB",
            f"tried {self.num_tried:,} records, {sum(self.tried_rejects.values()):,} refused"
            + (f": {self.tried_rejects}" if self.tried_rejects else ""),
            *(f"  e.g. {describe(reject)}" for reject in self.first_rejects),
        ]


def dry_run(settings: BuildSettings, options: RunOptions) -> DryRunReport:
    """Look at the corpus; build a few records in a temporary folder."""
    from omnidata.inspect.samples import read_views  # a later stage: this looks at what it built

    with tempfile.TemporaryDirectory(prefix="omnidata-") as folder:
        job = Job(folder, settings, folder)
        with open_executor(job, options) as executor:
            run = functools.partial(run_tasks, executor)
            inputs = open_inputs(settings, folder, run)
            plan = make_plan(inputs.identity, settings, inputs.files, run, weigh=True)
        tried = replace(job, settings=replace(settings, split={}, samples_per_shard=None, shard_bytes=None))
        task = sample_task(plan.stretches, inputs.files)
        result = build_shard(tried, task, report=lambda tally: None)
        store, pairs = Store(folder), [(task, result)]
        rejects = first_rejects(store, pairs, limit=NUM_REJECTS)
        views = []
        if result.num_samples:
            part = BuildPlan(inputs.identity, tuple(piece.stretch for piece in task.pieces), ())
            complete(store, tried.settings, part, pairs, inputs.renderer)
            step = max(1, result.num_samples // NUM_SAMPLES)
            views = list(read_views(Dataset(folder), range(0, result.num_samples, step)[:NUM_SAMPLES]))
        counts = [sum(stretch.counts[at] for stretch in plan.stretches) for at in range(len(settings.splits))]
        return DryRunReport(
            sources=[
                {key: entry[key] for key in ("source", "format", "num_bytes")} | {"num_records": count}
                for entry, count in zip(inputs.identity["inputs"], plan.records_of_files(), strict=True)
            ],
            num_records=plan.num_records,
            splits=dict(zip(settings.splits, counts, strict=True)),
            num_shards=len(cut_shards(plan.stretches, settings, inputs.files)),
            estimated_bytes=sum(stretch.num_records * stretch.record_bytes for stretch in plan.stretches),
            num_tried=result.num_records,
            tried_rejects=result.rejects,
            first_rejects=rejects,
            views=views,
        )


def sample_task(stretches: Sequence[Stretch], files: Sequence[SourceFile]) -> ShardTask:
    """A shard of about NUM_RECORDS records: the first few of units from all over the corpus."""
    chosen = list(stretches[:: max(1, len(stretches) // NUM_SAMPLES)])
    share = max(1, NUM_RECORDS // len(chosen))
    pieces = []
    for stretch in chosen:
        count = min(share, stretch.num_records)
        pieces.append(Piece(replace(stretch, num_records=count, counts=(count,)), 0, count))
    read = {stretch.file: files[stretch.file] for stretch in chosen}
    return ShardTask("train", 0, tuple(pieces), files=read)
