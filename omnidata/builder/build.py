"""Build: from raw corpora to a complete dataset, resumable at every step.

    (1) check_folder   is --out ours to write to?                                   durable
    (2) open_inputs    what the user named must exist: sources, tokenizer or model  corpus, profiles
    (3) hold_locks     nobody else may build here                                   durable
    (4) prepare        the plan in .build/plan.json if it is ours, else a new one   build_plan
    (5) build_shards   every shard that is not done yet, on any executor            worker, executors
    (6) drop_repeats   with --dedup exact                                           dedup
    (7) complete       index, rejects, card, other readers' files; manifest last    finalize

What is in the output folder decides what a run still has to do, so running the same command again is all
that an interrupted build needs. ``.build/`` is removed at the very end.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace

from omnidata.builder.build_plan import BuildPlan, make_plan, read_plan, write_plan
from omnidata.builder.dedup import drop_repeats
from omnidata.builder.finalize import complete, first_rejects
from omnidata.builder.identity import what_changed
from omnidata.builder.inputs import Inputs, open_inputs
from omnidata.builder.interruptions import interruptible, one_clear_line
from omnidata.builder.job import Job
from omnidata.builder.last_words import last_words
from omnidata.builder.layout import ShardTask, cut_shards
from omnidata.builder.progress import Progress
from omnidata.builder.report import BuildReport, examples, partial_report, report_of
from omnidata.builder.settings import BuildSettings, RunOptions
from omnidata.builder.view import View, open_view_inputs, plan_of
from omnidata.builder.worker import ShardResult, Tally, read_part, work
from omnidata.builder.workspace import check_folder, clear, hold_locks, leave
from omnidata.durable import Store
from omnidata.executors import (
    Executor,
    InlineExecutor,
    ProcessExecutor,
    num_cpus,
    run_tasks,
)
from omnidata.locks import LockedError, locked
from omnidata.manifest import manifest_from_json
from omnidata.ray_executor import RayExecutor
from omnidata.schema import MANIFEST, PROCESSOR_DIR, TOKENIZER_DIR, UserError
from omnidata.start import worker_imports

EARLY_RECORDS, EARLY_SHARE = 1000, 0.05  # seen before --max-rejects, as a share, is applied to a part


def build(settings: BuildSettings, out: str, options: RunOptions, *, view: View | None = None) -> BuildReport:
    """Build, or go on building, the dataset ``out``; ``view``: from the samples of another one.

    Raises:
        UserError: the input, the settings or the folder are not as they must be; says what to do.
        BuildInterrupted: stopped by a signal; run again to go on.
    """
    store = Store(out)
    check_folder(store, options)
    with interruptible(), one_clear_line(store), tempfile.TemporaryDirectory(prefix="omnidata-") as folder:
        job = Job(out, settings, store.url)
        if view is not None:
            job = replace(job, base=view.path, refetch=view.refetch)
        with open_executor(job, options) as executor:
            run = functools.partial(run_tasks, executor)
            inputs = open_view_inputs(view, folder) if view else open_inputs(settings, folder, run)
            with hold_locks(store, options):
                plan = resume_plan(store, inputs.identity, options)
                if store.exists(MANIFEST):
                    return _built_before(store, inputs.identity)
                try:
                    plan = plan or prepare(store, job, inputs, executor, folder, view=view)
                    return _Run(store, job, plan, options, executor, inputs).run()
                except FileNotFoundError:
                    if options.task is None or not store.exists(MANIFEST):
                        raise
                    return _built_before(store, inputs.identity)  # another task just completed the dataset


# --- (4) the plan -----------------------------------------------------------------------------------------


def resume_plan(store: Store, identity: dict[str, object], options: RunOptions) -> BuildPlan | None:
    """The plan of the build that was begun here, if it is this one; None to begin anew."""
    plan = read_plan(store)
    if plan is not None:
        changes = what_changed(plan.identity, identity)
        if not changes:
            return plan
        if not options.overwrite:
            raise UserError(
                f"{store.url} holds an unfinished build of something else: {'; '.join(changes)}. "
                "Run it as it was, choose another --out, or begin anew with --overwrite."
            )
    if options.overwrite:
        clear(store)
    return None


def prepare(
    store: Store, job: Job, inputs: Inputs, executor: Executor, folder: str, *, view: View | None = None
) -> BuildPlan:
    """Make the plan and keep it; where several tasks start together, one does and the others wait."""
    with locked(store, "plan", wait=True):
        if (plan := read_plan(store)) is not None:
            return plan
        clear(store)
        for name in (TOKENIZER_DIR, PROCESSOR_DIR):
            store.write_folder(name, f"{folder}/{name}")
        run = functools.partial(run_tasks, executor)
        if view is not None:
            plan = plan_of(view, inputs.identity)
        else:
            plan = make_plan(inputs.identity, job.settings, inputs.files, run)
        write_plan(store, plan)
        return plan


def _built_before(store: Store, identity: dict[str, object]) -> BuildReport:
    """For whoever comes when the dataset is complete: all is well if it is the same dataset."""
    manifest = manifest_from_json(store.read_bytes(MANIFEST), where=f"{store.url}/{MANIFEST}")
    base = identity.get("base", {})
    inputs = [{k: v for k, v in entry.items() if base or k != "num_records"} for entry in manifest.inputs]
    found = (manifest.settings, inputs, manifest.base)
    if found != (identity["settings"], identity["inputs"], base):
        raise UserError(
            f"{store.url} already holds a complete dataset of other settings or inputs. Choose another --out."
        )
    leave(store)
    return report_of(
        manifest,
        out=store.url,
        shards_built=0,
        samples_built=0,
        seconds=0.0,
        samples_per_second=0.0,
        first_rejects=[],
    )


@contextlib.contextmanager
def open_executor(job: Job, options: RunOptions) -> Iterator[Executor]:
    """Where the build's tasks run."""
    function = functools.partial(work, job)
    preload = worker_imports(model=job.settings.model, max_slices=job.settings.max_slices)
    private = Store(job.out).is_private or any(
        "memory:" in str(name) for name in (*job.settings.source, job.settings.image_root, job.base)
    )
    if private or options.executor == "inline":
        executor: Executor = InlineExecutor(function)
    elif options.executor == "ray":
        executor = RayExecutor(function, num_workers=options.workers, folder=_start_of_paths(job))
    else:
        executor = ProcessExecutor(function, num_workers=options.workers or num_cpus(), preload=preload)
    try:
        yield executor
    finally:
        executor.close()


def _start_of_paths(job: Job) -> str | None:
    """The working folder, if any path of the build is relative."""
    paths = (job.out, job.settings.image_root or "/", job.base or "/", *job.settings.source)
    return None if all("://" in path or os.path.isabs(path) for path in paths) else os.getcwd()


# --- (5) to (7) -------------------------------------------------------------------------------------------


class _Run:
    """One run over a plan: builds what is missing, completes the dataset when nothing is."""

    def __init__(
        self,
        store: Store,
        job: Job,
        plan: BuildPlan,
        options: RunOptions,
        executor: Executor,
        inputs: Inputs,
    ) -> None:
        self.store, self.job, self.plan, self.options = store, job, plan, options
        self.executor, self.renderer = executor, inputs.renderer
        self.tasks = cut_shards(plan.stretches, job.settings, inputs.files, duplicates=plan.duplicates)
        self.results: dict[ShardTask, ShardResult] = {}
        self.built: list[ShardTask] = []  # by this run
        self.seen_rejects: list[dict[str, object]] = []  # the first of a shard that is not done yet

    def run(self) -> BuildReport:
        """Everything that is left to do."""
        progress = Progress(
            sum(task.num_records for task in self.my_tasks), len(self.my_tasks), self.options.quiet
        )
        try:
            self.build_shards(progress)
        finally:
            progress.close()
        self.refresh()
        if len(self.results) < len(self.tasks):
            return self._partial(progress)
        try:
            return self.finish(progress)
        except LockedError:  # another task came to the end at the same time, and completes the dataset
            return self._partial(progress)

    @functools.cached_property
    def my_tasks(self) -> list[ShardTask]:
        """The shards that this run is to build."""
        if self.options.finalize:
            return []
        part, parts = self.options.task or (0, 1)
        return self.tasks[part::parts]

    def refresh(self) -> None:
        """Look which shards are done, whoever built them."""
        for task in self.tasks:
            if task not in self.results and (result := read_part(self.store, task)):
                self.results[task] = result

    # --- shards -------------------------------------------------------------------------------------------

    def build_shards(self, progress: Progress) -> None:
        """Build those of my shards that are not there."""
        for task in self.my_tasks:
            if result := read_part(self.store, task):
                self.results[task] = result
                progress.resume(result.num_records, sum(result.rejects.values()))
        self._check_rejects(progress)
        missing = [task for task in self.my_tasks if task not in self.results]

        def on_progress(task: ShardTask, tally: Tally) -> None:
            progress.update(task.path, tally.num_records, tally.num_rejects)
            self.seen_rejects = self.seen_rejects or list(tally.first_rejects)
            self._check_rejects(progress)

        words = functools.partial(last_words, self.store)
        for task, result in run_tasks(self.executor, missing, on_progress=on_progress, last_words=words):
            self.results[task] = result
            self.built.append(task)
            progress.finish(task.path, result.num_records, sum(result.rejects.values()))
            self._check_rejects(progress)

    def _check_rejects(self, progress: Progress) -> None:
        limit, rejects, total = self.options.max_rejects, progress.num_rejects, progress.total_records
        if limit is None:
            return
        if limit < 1:
            early = progress.num_records >= max(EARLY_RECORDS, EARLY_SHARE * total)
            allowed = limit * (progress.num_records if early else total)
        else:
            allowed = limit
        if rejects > allowed:
            first = first_rejects(self.store, self.done) or self.seen_rejects
            raise UserError(
                f"{rejects:,} of {progress.num_records:,} records were refused, more than --max-rejects "
                f"allows. What is built is kept: run again with a higher limit to go on. All so far: "
                f"omnidata inspect {self.store.url} --rejects. The first:{examples(first)}"
            )

    @property
    def done(self) -> list[tuple[ShardTask, ShardResult]]:
        """Finished shards in order."""
        return [(task, self.results[task]) for task in self.tasks if task in self.results]

    # --- the end ------------------------------------------------------------------------------------------

    def finish(self, progress: Progress) -> BuildReport:
        """All shards are there: drop repeats if asked to, then complete the dataset."""
        with contextlib.nullcontext() if self.options.finalize else locked(self.store, "finalize"):
            if self.job.settings.dedup != "off":
                run, near = functools.partial(run_tasks, self.executor), self.job.settings.dedup == "near"
                self.results.update(drop_repeats(self.store, self.done, run, near=near))
            rejects = first_rejects(self.store, self.done)
            base = {"base": self.job.base}
            manifest = complete(self.store, self.job.settings, self.plan, self.done, self.renderer, **base)
        return report_of(manifest, first_rejects=rejects, **self._facts(progress))

    def _facts(self, progress: Progress) -> dict[str, object]:
        samples = sum(self.results[task].num_samples for task in self.built)
        return {
            "out": self.store.url,
            "shards_built": len(self.built),
            "samples_built": samples,
            "seconds": round(progress.seconds, 3),
            "samples_per_second": round(samples / max(progress.seconds, 1e-9), 1),
        }

    def _partial(self, progress: Progress) -> BuildReport:
        """Some shards are other tasks' to build."""
        if self.options.finalize:
            missing = [task.path for task in self.tasks if task not in self.results]
            raise UserError(
                f"{len(missing):,} of {len(self.tasks):,} shards are not built yet ({missing[0]}, …): "
                "run the tasks that are missing, then --finalize again."
            )
        return partial_report(self.done, num_shards=len(self.tasks), **self._facts(progress))
