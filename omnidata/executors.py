"""Executors: where tasks run. In this process, in worker processes, or on a Ray cluster (ray_executor.py).

An executor takes ``work``, a picklable function of (task, report), and deals tasks to its workers::

    submit(task)   start one; at most ``capacity`` may be running
    wait()         block until something happened: TaskProgress, Done, Failed or Died events
    close()        stop everything at once

``run_tasks`` on top of it is what the build calls. It keeps the workers busy, and a task whose worker died
is tried twice more. ``concurrent.futures`` is not used since it breaks the whole pool when one worker dies
and cannot tell whose task was the cause.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any, Protocol

from omnidata.durable import HOPELESS
from omnidata.schema import UserError

Work = Callable[[Any, Callable[[object], None]], object]  # (task, report) -> result
ATTEMPTS = 3  # one, and two more


@dataclass(frozen=True, slots=True)
class TaskProgress:
    """The worker reported on its way."""

    task: object
    data: object


@dataclass(frozen=True, slots=True)
class Done:
    """The task's result."""

    task: object
    result: object


@dataclass(frozen=True, slots=True)
class Failed:
    """The task raised."""

    task: object
    error: BaseException


@dataclass(frozen=True, slots=True)
class Died:
    """The worker ended without an answer; ``how`` says by what."""

    task: object
    how: str


Event = TaskProgress | Done | Failed | Died


class Executor(Protocol):
    """What ``run_tasks`` needs."""

    capacity: int

    def submit(self, task: object) -> None:
        """Start a task."""

    def wait(self) -> list[Event]:
        """Block until something happened."""

    def close(self) -> None:
        """Stop everything at once."""


class WorkerDiedError(UserError):
    """A task's workers died again and again."""


def run_tasks(
    executor: Executor,
    tasks: Iterable[Any],
    *,
    on_progress: Callable[[Any, Any], None] = lambda task, data: None,
    last_words: Callable[[Any], str] = lambda task: "",
) -> Iterator[tuple[Any, Any]]:
    """Run every task; yield (task, result) as they finish.

    Args:
        on_progress: called as (task, data) with what workers report on their way.
        last_words: called with a task that died; says what it was doing, for the message.

    Raises:
        WorkerDiedError: a task's worker died ``ATTEMPTS`` times.
        Exception: whatever a task raised. An OSError is tried again first, unless that cannot help.
    """
    waiting, retries, running = iter(tasks), deque[object](), 0
    failures: Counter[object] = Counter()
    while True:
        while running < executor.capacity:
            task = retries.popleft() if retries else next(waiting, None)
            if task is None:
                break
            executor.submit(task)
            running += 1
        if not running:
            return
        for event in executor.wait():
            if isinstance(event, TaskProgress):
                on_progress(event.task, event.data)
                continue
            running -= 1
            if isinstance(event, Done):
                yield event.task, event.result
                continue
            failures[event.task] += 1
            if failures[event.task] >= ATTEMPTS or not _worth_retrying(event):
                raise _final_error(event, last_words(event.task)) from None
            retries.append(event.task)


def _worth_retrying(event: Failed | Died) -> bool:
    if isinstance(event, Died):
        return True
    return isinstance(event.error, OSError) and event.error.errno not in HOPELESS


def _final_error(event: Failed | Died, words: str) -> BaseException:
    if isinstance(event, Failed):
        return event.error
    reading = f" while reading {words}" if words else ""
    return WorkerDiedError(
        f"the worker of {event.task} died ({event.how}){reading}, {ATTEMPTS} times in a row. "
        "If the kernel killed it for memory, use fewer --workers; "
        "if one record does it, take that record out of the corpus."
    )


def num_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- in this process --------------------------------------------------------------------------------------


class InlineExecutor:
    """One task at a time, here: for memory:// and for tests that look inside."""

    capacity = 1

    def __init__(self, work: Work) -> None:
        self._work = work
        self._tasks: deque[object] = deque()

    def submit(self, task: object) -> None:
        """Remember the task; ``wait`` runs it."""
        self._tasks.append(task)

    def wait(self) -> list[Event]:
        """Run the next task to its end."""
        task = self._tasks.popleft()
        events: list[Event] = []
        try:
            result = self._work(task, lambda data: events.append(TaskProgress(task, data)))
        except OSError as error:  # every other error is best seen with its own traceback
            return [*events, Failed(task, error)]
        return [*events, Done(task, result)]

    def close(self) -> None:
        """Nothing runs between calls."""


# --- worker processes -------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Worker:
    process: Any
    pipe: connection.Connection
    task: object = None


def start_server(preload: Sequence[str], **environment: str) -> None:
    """Let the server that workers are forked from import ``preload``, while this process does something else.

    There is one per process: only the first call says what it imports, and in which environment.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(preload))
    with one_thread(**environment):
        multiprocessing.forkserver.ensure_running()


class ProcessExecutor:
    """Worker processes of this machine, forked from a clean server that has imported ``preload`` once.

    A worker that dies is noticed at once, by its sentinel; only its own task is affected.
    """

    def __init__(self, work: Work, *, num_workers: int, preload: Sequence[str] = ()) -> None:
        self.capacity = num_workers
        self._work = work
        self._context = multiprocessing.get_context("forkserver")
        start_server(preload)
        # Workers wait for the end of this pipe, so that none outlives a parent that was killed.
        self._lifeline_end, self._lifeline = self._context.Pipe(duplex=False)
        self._workers: list[_Worker] = []

    def submit(self, task: object) -> None:
        """Give the task to an idle worker, starting one if there is none."""
        worker = next((worker for worker in self._workers if worker.task is None), None)
        if worker is None:
            worker = self._start()
        worker.task = task
        with contextlib.suppress(BrokenPipeError):  # dead already: wait() sees its sentinel
            worker.pipe.send(task)

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_serve, args=(self._work, os.getcwd(), theirs, self._lifeline_end), daemon=True
        )
        with one_thread():
            process.start()
        theirs.close()
        worker = _Worker(process, ours)
        self._workers.append(worker)
        return worker

    def wait(self) -> list[Event]:
        """Block until a worker sent something or died."""
        busy = [worker for worker in self._workers if worker.task is not None]
        ready = connection.wait(
            [handle for worker in busy for handle in (worker.pipe, worker.process.sentinel)]
        )
        events = []
        for worker in busy:
            if worker.pipe in ready or worker.process.sentinel in ready:
                events.append(self._event(worker))
        return events

    def _event(self, worker: _Worker) -> Event:
        task = worker.task
        try:
            kind, content = worker.pipe.recv()  # what it sent before it died still counts
        except (EOFError, OSError):
            worker.process.join()
            self._workers.remove(worker)
            return Died(task, how_it_ended(worker.process.exitcode))
        if kind == "progress":
            return TaskProgress(task, content)
        if kind == "failed":  # its process ends too
            worker.process.join()
            self._workers.remove(worker)
            return Failed(task, content)
        worker.task = None
        return Done(task, content)

    def close(self) -> None:
        """End all workers; they hold nothing that is not on disk or to be done again."""
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(5)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.pipe.close()
        self._workers.clear()
        self._lifeline.close()


@contextlib.contextmanager
def one_thread(**more: str) -> Iterator[None]:
    """Environment in which libraries that are imported use one thread: the workers are the parallelism."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
    wanted = dict.fromkeys(names, "1") | {"TOKENIZERS_PARALLELISM": "false"} | more
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def how_it_ended(exitcode: int | None) -> str:
    """A process's end in words: ``killed by SIGKILL``, ``exit code 3``."""
    if exitcode is not None and exitcode < 0:
        return f"killed by {signal.Signals(-exitcode).name}"
    return f"exit code {exitcode}"


def _serve(work: Work, folder: str, pipe: connection.Connection, lifeline: connection.Connection) -> None:
    """A worker's life: take a task, send what happens, until the pipe closes."""
    os.chdir(folder)  # the server may have been started elsewhere, and paths may be relative
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()
    gc.freeze()  # what was imported stays: the collector need not touch the pages shared with the server
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        try:
            result = work(task, lambda data: pipe.send(("progress", data)))
        except MemoryError:
            os._exit(137)  # as if the kernel had done it: a fresh process gets the memory back
        except Exception as error:
            pipe.send(("failed", portable(error)))
            raise SystemExit(1) from error
        pipe.send(("done", result))
        gc.collect()
        gc.freeze()  # what a task leaves behind (a vocabulary) stays too


def _end_with_parent(lifeline: connection.Connection) -> None:
    connection.wait([lifeline])
    os._exit(1)


def portable(error: Exception) -> Exception:
    """The error in a form that any process can unpickle: its kind where the build tells kinds apart."""
    text = "".join(traceback.format_exception(error))
    if isinstance(error, UserError):
        return UserError(str(error))
    if isinstance(error, OSError):
        copy = OSError(error.errno, error.strerror or str(error), error.filename)
        copy.add_note(f"in a worker:\n{text}")
        return copy
    return RuntimeError(f"in a worker:\n{text}")
