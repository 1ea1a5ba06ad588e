"""Copy: from datasets to one complete dataset, resumable at every step.

    (1) open_inputs    the datasets, and which of their samples are chosen           inputs
    (2) check_folder   is --out ours to write to?                                    builder.workspace
    (3) hold_locks     nobody else may build here
    (4) prepare        tokenizer/ and processor/ of the first input; the plan        builder.build_plan
    (5) copy_shards    every shard that is not done yet, in worker processes         worker
    (6) complete       index, rejects, card, other readers' files; manifest last     finalize

As in a build, what is in the output folder decides what a run still has to do. The plan names the inputs by
their content, so a copy goes on only from the same ones.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterator, Sequence

from omnidata.builder.build import resume_plan
from omnidata.builder.build_plan import BuildPlan, write_plan
from omnidata.builder.identity import versions
from omnidata.builder.interruptions import interruptible, one_clear_line
from omnidata.builder.settings import RunOptions
from omnidata.builder.worker import ShardResult, Tally, read_part
from omnidata.builder.workspace import check_folder, clear, hold_locks, leave
from omnidata.copier.columns import united
from omnidata.copier.finalize import common_settings, complete, make_origin
from omnidata.copier.inputs import Input, open_inputs
from omnidata.copier.layout import CopyTask, cut_shards
from omnidata.copier.report import CopyProgress, CopyReport
from omnidata.copier.settings import CopySettings
from omnidata.copier.worker import CopyJob
from omnidata.durable import SCRATCH, Store
from omnidata.executors import Executor, InlineExecutor, ProcessExecutor, num_cpus, run_tasks
from omnidata.manifest import manifest_from_json
from omnidata.schema import MANIFEST, PROCESSOR_DIR, SCHEMA_VERSION, TOKENIZER_DIR, Manifest, UserError

PRELOAD = ("omnidata.copier.worker", "omnidata.without_pandas")
BYTES_A_WORKER = 64 << 20  # copied in this process before another one would have started


def copy(settings: CopySettings, out: str, options: RunOptions, *, dry_run: bool = False) -> CopyReport:
    """Copy, or go on copying, into the dataset ``out``.

    Raises:
        UserError: the datasets or the folder are not as they must be; says what to do.
        BuildInterrupted: stopped by a signal; run again to go on.
    """
    inputs = open_inputs(settings, out)
    tasks = cut_shards([each.chosen for each in inputs], [each.nbytes for each in inputs], settings)
    if dry_run:
        return _report(settings, out, inputs, tasks)
    store = Store(out)
    if not options.overwrite and _is_done(store, settings, inputs):
        with hold_locks(store, options):
            leave(store)
        return _report(settings, out, inputs, tasks, store=store)
    check_folder(store, options)
    with interruptible(), one_clear_line(store), hold_locks(store, options):
        identity = identity_of(settings, inputs)
        if resume_plan(store, identity, options) is None:
            _prepare(store, inputs[0], identity)
        _check_space(store, tasks)
        progress = CopyProgress(sum(task.num_samples for task in tasks), len(tasks), options.quiet)
        executor = open_executor(store, inputs, options, num_bytes=sum(task.num_bytes for task in tasks))
        with contextlib.closing(progress), executor as opened:
            results, copied = copy_shards(store, tasks, opened, progress)
        complete(store, settings, inputs, [(task, results[task]) for task in tasks])
    return _report(settings, out, inputs, tasks, store=store, copied=copied, seconds=progress.seconds)


def identity_of(settings: CopySettings, inputs: Sequence[Input]) -> dict[str, object]:
    """Everything that decides the bytes of the copy, in the form of a build's."""
    files = [
        {
            "source": each.dataset.path,
            "num_bytes": sum(shard.num_bytes for shard in each.dataset.manifest.shards),
            "digest": each.digest,
            "rows": hashlib.blake2b(each.rows.tobytes(), digest_size=16).hexdigest(),
        }
        for each in inputs
    ]
    return {
        "schema_version": SCHEMA_VERSION,
        "settings": settings.to_json(),
        "versions": versions(),
        "inputs": files,
    }


def _is_done(store: Store, settings: CopySettings, inputs: Sequence[Input]) -> bool:
    """Whether this very copy was complete when it was stopped, and only .build/ was left to remove."""
    if not (store.exists(SCRATCH) and store.exists(MANIFEST)):
        return False
    manifest = manifest_from_json(store.read_bytes(MANIFEST), where=f"{store.url}/{MANIFEST}")
    common = common_settings([each.dataset.manifest.settings for each in inputs], settings)
    if not manifest.origin:
        return False
    content = manifest.origin["inputs"][0]["content"] if settings.command == "export" else None
    origin = make_origin(settings, inputs, list(manifest.splits), content=content)
    return (manifest.settings, manifest.origin) == (common, origin)


def _prepare(store: Store, first: Input, identity: dict[str, object]) -> None:
    """Begin anew: what belongs to all samples, and then the plan, which makes the copy resumable."""
    clear(store)
    source = Store(first.dataset.path)
    for name in (TOKENIZER_DIR, PROCESSOR_DIR):
        if source.names(name):
            store.write_folder(name, source.local_copy(name))
    write_plan(store, BuildPlan(identity, (), ()))


def _check_space(store: Store, tasks: Sequence[CopyTask]) -> None:
    """Refuse a disk that cannot hold what is left to copy, rather than find out after hours."""
    if not store.is_local:
        return
    left = sum(task.num_bytes for task in tasks if read_part(store, task) is None)
    free = shutil.disk_usage(store.full("")).free
    if left > free:
        raise UserError(
            f"{store.url}: {left / 1e9:,.1f} GB are to be written, {free / 1e9:,.1f} GB are free there. Free "
            "some space, or choose another --out; what is copied already is kept"
        )


@contextlib.contextmanager
def open_executor(
    store: Store, inputs: Sequence[Input], options: RunOptions, *, num_bytes: int
) -> Iterator[Executor]:
    """Where the shards are copied."""
    job = CopyJob(
        store.url,
        tuple(each.dataset.path for each in inputs),
        tuple(each.digest for each in inputs),
        tuple(each.key_prefix for each in inputs),
        tuple(united([each.kept for each in inputs])),
    )
    private = any(Store(path).is_private for path in (store.url, *job.paths))
    num_workers = min(options.workers or num_cpus(), num_bytes // BYTES_A_WORKER)
    if private or options.executor == "inline" or num_workers < 2:
        executor: Executor = InlineExecutor(job)
    else:
        executor = ProcessExecutor(job, num_workers=num_workers, preload=PRELOAD)
    try:
        yield executor
    finally:
        executor.close()


def copy_shards(
    store: Store, tasks: Sequence[CopyTask], executor: Executor, progress: CopyProgress
) -> tuple[dict[CopyTask, ShardResult], list[ShardResult]]:
    """Copy the shards that are not there; all results, and those of this run."""
    results: dict[CopyTask, ShardResult] = {}
    for task in tasks:
        if result := read_part(store, task):
            results[task] = result
            progress.resume(result.num_samples, 0)
    missing = [task for task in tasks if task not in results]

    def on_progress(task: CopyTask, tally: Tally) -> None:
        progress.update(task.path, tally.num_records, tally.num_bytes)

    copied = []
    for task, result in run_tasks(executor, missing, on_progress=on_progress):
        results[task] = result
        copied.append(result)
        progress.done_bytes += result.num_bytes
        progress.finish(task.path, result.num_samples, 0)
    return results, copied


# --- the report -------------------------------------------------------------------------------------------


def _report(
    settings: CopySettings,
    out: str,
    inputs: Sequence[Input],
    tasks: Sequence[CopyTask],
    *,
    store: Store | None = None,
    copied: Sequence[ShardResult] = (),
    seconds: float = 0.0,
) -> CopyReport:
    """What the copy came to, or (without a ``store``) would come to."""
    manifests = [each.dataset.manifest for each in inputs]
    num_records, num_samples = sum(m.num_records for m in manifests), sum(task.num_samples for task in tasks)
    splits: dict[str, int] = {}
    for task in tasks:
        splits[task.split] = splits.get(task.split, 0) + task.num_samples
    return CopyReport(
        out=out,
        command=settings.command,
        dry_run=store is None,
        inputs=[
            {
                "path": each.dataset.path,
                "num_records": each.dataset.manifest.num_records,
                "num_samples": each.dataset.manifest.num_samples,
                "num_taken": len(each.rows),
                "key_prefix": each.key_prefix,
            }
            for each in inputs
        ],
        num_records=num_records,
        num_samples=num_samples,
        num_rejects=num_records - num_samples,
        num_left_out=sum(m.num_samples for m in manifests) - num_samples,
        num_bytes=_num_bytes(store, tasks),
        splits=splits,
        num_shards=len(tasks),
        columns=_columns(inputs),
        shards_copied=len(copied),
        bytes_copied=sum(result.num_bytes for result in copied),
        seconds=round(seconds, 3),
    )


def _num_bytes(store: Store | None, tasks: Sequence[CopyTask]) -> int:
    if store is None:
        return sum(task.num_bytes for task in tasks)
    manifest: Manifest = manifest_from_json(store.read_bytes(MANIFEST), where=f"{store.url}/{MANIFEST}")
    return sum(shard.num_bytes for shard in manifest.shards)


def _columns(inputs: Sequence[Input]) -> list[str]:
    """What became of kept columns that the inputs do not share."""
    texts = []
    for field in united([each.kept for each in inputs]):
        types = {
            each.dataset.path: found.type
            for each in inputs
            for found in each.kept
            if found.name == field.name
        }
        if len(types) < len({each.dataset.path for each in inputs}):
            texts.append(f"{field.name!r} has no value in samples of datasets that did not keep it")
        if changed := [f"{kind} in {path}" for path, kind in types.items() if kind != field.type]:
            texts.append(f"{field.name!r} is {field.type} here, and was {', '.join(changed)}")
    return texts
