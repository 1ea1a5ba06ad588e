"""Workers: processes that assemble microbatches ahead of the training process.

    training process                                   worker
    Work, and a buffer with room for its images ──▶    Assembler
    Parts, in the order of the works             ◀──   small arrays by the socket, images in the buffer

Every worker has a socket of its own and shares nothing with the others, so one that is killed (no memory
left, a crash inside a decoder) takes nothing with it. What it had in hand goes to a fresh one: works are pure
functions, the same microbatches come out in the same order. Workers that die again and again stop the run.
One that does not answer in time (stopped, or a disk that hangs) is killed, and so is one more that died.
"""

from __future__ import annotations

import errno
import multiprocessing
import multiprocessing.connection
import os
import queue
import signal
import socket
import struct
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import reduction, util
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import numpy as np

from omnidata.executors import how_it_ended
from omnidata.loader.buffers import Borrower, Buffer, Lender, Loan
from omnidata.loader.heap import keep_freed_memory
from omnidata.loader.microbatch import Parts
from omnidata.loader.processor_pixels import Layout, pack_tensors, unpack_tensors
from omnidata.loader.reader import LESS_MEMORY, LoadError, Work

if TYPE_CHECKING:
    from omnidata.loader.assembler import Assembler

MAX_DEATHS = 3  # of workers, in one iteration, before it gives up
TIMEOUT = 300.0  # seconds that the training process waits for a worker
_PARENT_CHECK = 2.0  # seconds between a worker's looks whether its training process still lives
_LOOK = 1.0  # seconds: at most what one look at the workers counts of their timeout
_END = 5.0  # seconds that a killed worker may take to end; while a disk hangs it does not
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # a scheduler's, to a whole job


@dataclass(slots=True, eq=False)
class _Task:
    """A work that was handed out and is not answered yet."""

    index: int  # in the order of the works
    work: Work
    buffer: Buffer | None = None  # None: no images


@dataclass(frozen=True, slots=True)
class Tensors:
    """An answer's images lie in the buffer, as named tensors."""

    layout: Layout


@dataclass(slots=True, eq=False)
class _Worker:
    number: int
    process: Any
    connection: Connection
    replaces: bool = False  # one that died
    answered: bool = False  # anything yet
    waited: float = 0.0  # seconds that the training process has waited since its last answer
    stuck: bool = False  # it did not answer in time, and was killed
    lender: Lender = field(default_factory=Lender)
    tasks: deque[_Task] = field(default_factory=deque)  # a worker answers in this order

    def __str__(self) -> str:
        keys = [document.place.key for task in list(self.tasks)[:1] for document in task.work.documents]
        return f"number {self.number} (pid {self.process.pid}), reading {', '.join(keys) or 'nothing'}"

    def kill_as_stuck(self) -> None:
        """The next look at the workers replaces it."""
        self.stuck = True
        self.process.kill()


class Workers:
    """A few processes around one Assembler. A context manager: they end with it.

    Args:
        assembler: copied into every worker by the fork.
        prefetch: works in hand for each worker.
        timeout: seconds of waiting for one answer until its worker is killed and replaced.
    """

    def __init__(
        self, assembler: Assembler, *, num_workers: int, prefetch: int, timeout: float = TIMEOUT
    ) -> None:
        self._assembler, self._ahead = assembler, num_workers * max(prefetch, 1)
        self._timeout = timeout
        self._workers: list[_Worker] = []
        self._answers: dict[int, Parts | LoadError] = {}  # those that came before their turn
        self._num_deaths = 0
        # Also at exit, before multiprocessing waits for children: these would not end by themselves.
        self._stop = util.Finalize(self, _kill, args=(self._workers,), exitpriority=10)
        for number in range(num_workers):
            self._workers.append(self._start(number))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def map(self, works: Iterator[Work]) -> Iterator[Parts | LoadError]:
        """What the assembler makes of each, in order."""
        tasks = (_Task(index, work) for index, work in enumerate(works))
        num_open, wanted = 0, 0
        while True:
            while num_open < self._ahead and (task := next(tasks, None)):
                self._hand_out(task, min(self._workers, key=lambda worker: len(worker.tasks)))
                num_open += 1
            if not num_open:
                return
            while wanted not in self._answers:
                self._receive()
            yield self._answers.pop(wanted)
            num_open, wanted = num_open - 1, wanted + 1

    # --- one worker ---------------------------------------------------------------------------------------

    def _start(self, number: int, *, replaces: bool = False) -> _Worker:
        ours, theirs = multiprocessing.Pipe()
        _limit_waits(ours, self._timeout)
        process = multiprocessing.get_context("fork").Process(
            target=_serve,
            args=(theirs, ours, self._assembler, os.getpid()),
            name="omnidata-load",
            daemon=True,
        )
        with _signals_blocked():
            process.start()
        theirs.close()
        return _Worker(number, process, ours, replaces)

    def _hand_out(self, task: _Task, worker: _Worker) -> None:
        if not worker.tasks:
            worker.waited = 0.0
        worker.tasks.append(task)
        num_bytes, loan, descriptor = self._assembler.num_bytes(task.work), None, None
        task.buffer = None
        if num_bytes:
            task.buffer, loan, descriptor = worker.lender.lend(num_bytes)
        try:
            worker.connection.send((task.work, loan))
            if descriptor is not None:
                reduction.send_handle(worker.connection, descriptor, worker.process.pid)
        except BlockingIOError:  # it has read nothing for as long as the timeout
            worker.kill_as_stuck()
        except OSError:
            pass  # it died; _receive notices, with what it was last working on
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def _receive(self) -> None:
        """Wait for an answer, or for the end of a worker."""
        for worker in [worker for worker in self._workers if worker.stuck]:
            self._replace(worker)
        waiting = {worker.connection: worker for worker in self._workers}
        start = time.monotonic()
        ready = multiprocessing.connection.wait(list(waiting), min(_LOOK, self._timeout))
        for connection in ready:
            self._receive_from(waiting[connection])  # type: ignore[index]
        # A job that was stopped as a whole, and goes on, was not waiting all that time.
        waited = min(time.monotonic() - start, _LOOK)
        for worker in self._workers:
            if worker.tasks and worker.connection not in ready:
                worker.waited += waited
                if worker.waited >= self._timeout:
                    worker.kill_as_stuck()

    def _receive_from(self, worker: _Worker) -> None:
        try:
            answer = worker.connection.recv()
        except BlockingIOError:  # stopped in the middle of an answer
            worker.kill_as_stuck()
            return
        except (EOFError, OSError):
            self._replace(worker)
            return
        if _is_lack_of_memory(answer):
            raise LoadError(f"a loader worker ran out of memory: {worker}; {LESS_MEMORY}")
        if isinstance(answer, Exception) and not isinstance(answer, LoadError):
            answer.add_note(f"in a loader worker: {worker}")
            raise answer
        worker.answered, worker.waited = True, 0.0
        task = worker.tasks.popleft()
        self._answers[task.index] = _received(answer, task.buffer, worker.lender)

    def _replace(self, dead: _Worker) -> None:
        """Start another worker in its place, and hand its tasks to that one."""
        dead.process.join(_END)
        dead.connection.close()
        self._num_deaths += 1
        ending = _ending(dead.process.exitcode)
        if dead.stuck:
            ending = f"no answer in {self._timeout:g} s, the timeout; {ending}"
        died = f"a loader worker died ({ending}): {dead}"
        if self._num_deaths > MAX_DEATHS or (dead.replaces and not dead.answered):
            raise LoadError(f"{died}, and another one before it. {_ADVICE}")
        warnings.warn(f"{died}; a new one goes on in its place", RuntimeWarning, stacklevel=2)
        new = self._start(dead.number, replaces=True)
        self._workers[self._workers.index(dead)] = new
        for task in dead.tasks:
            self._hand_out(task, new)


_ADVICE = (
    f"If the machine ran out of memory, {LESS_MEMORY}; if a sample makes them crash, num_workers=0 shows "
    "where; if a slow disk or store needs longer to answer, raise worker_timeout"
)


def _limit_waits(connection: Connection, seconds: float) -> None:
    """No read or write within a message waits longer: the other end may have been stopped there."""
    whole = int(seconds)
    limit = struct.pack("@ll", whole, max(int((seconds - whole) * 1e6), 0 if whole else 1))
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


def _is_lack_of_memory(error: object) -> bool:
    """Python's own, or the kernel's word where a buffer was to be mapped."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)


def _ending(exitcode: int | None) -> str:
    if exitcode is None:
        return f"killed, but not ended after {_END:g} s: a disk or network file system hangs"
    return how_it_ended(exitcode)


def _kill(workers: list[_Worker]) -> None:
    """They hold nothing that needs an orderly end."""
    for worker in workers:
        worker.process.kill()
        worker.process.join(_END)
        worker.connection.close()


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """No moment in which a new worker could act on a signal that was meant for the job."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# --- in the worker ----------------------------------------------------------------------------------------


def _serve(connection: Connection, others_end: Connection, assembler: Assembler, parent: int) -> None:
    """The life of a worker. Schedulers and Ctrl-C signal whole jobs, but training needs it to the end."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    others_end.close()
    import torch

    torch.set_num_threads(1)
    if assembler.has_processor:
        keep_freed_memory()
    tasks: queue.SimpleQueue[tuple[Work, Loan | None, int | None]] = queue.SimpleQueue()
    threading.Thread(target=_read_tasks, args=(connection, tasks, parent), daemon=True).start()
    borrower = Borrower()
    while True:
        work, loan, descriptor = tasks.get()
        try:
            memory = borrower.memory(loan, descriptor) if loan else None
            answer = _sendable(assembler.assemble(work, memory), memory)
        except Exception as error:
            connection.send(error)
            if _is_lack_of_memory(error):  # the training process has a line for it
                os._exit(1)
            raise
        connection.send(answer)


def _read_tasks(connection: Connection, tasks: queue.SimpleQueue, parent: int) -> None:
    """In a thread of its own: handing out work never waits for a worker, and none outlives the training."""
    exitcode = 1
    try:
        while os.getppid() == parent:
            if connection.poll(_PARENT_CHECK):
                work, loan = connection.recv()
                descriptor = reduction.recv_handle(connection) if loan and loan.is_new else None
                tasks.put((work, loan, descriptor))
    except (EOFError, ConnectionError):
        exitcode = 0  # the training process is gone
    except Exception:
        traceback.print_exc()
        raise
    finally:
        os._exit(exitcode)


def _sendable(parts: Parts | LoadError, memory: np.ndarray | None) -> object:
    """Parts whose images are in ``memory``, with what it takes to find them there."""
    if isinstance(parts, LoadError):
        return parts
    if isinstance(parts.images, np.ndarray):  # decoded in place
        return replace(parts, images=()), parts.images.shape
    if isinstance(parts.images, dict):
        layout = None if memory is None else pack_tensors(parts.images, memory)
        return (parts, None) if layout is None else (replace(parts, images={}), Tensors(layout))
    stop = 0
    for data in parts.images:
        start, stop = stop, stop + len(data)
        memory[start:stop] = np.frombuffer(data, np.uint8)  # type: ignore[index]
    return replace(parts, images=()), [len(data) for data in parts.images]


def _received(answer: Any, buffer: Buffer | None, lender: Lender) -> Parts | LoadError:
    """Undo ``_sendable``, in the training process."""
    if isinstance(answer, LoadError):
        if buffer:
            lender.take_back(buffer)
        return answer
    parts, found = answer
    if found is None:  # sent whole: no picture, or more than was foreseen
        if buffer:
            lender.take_back(buffer)
        return parts
    if isinstance(found, Tensors):
        assert buffer is not None, "tensors are laid out in memory that was lent"
        flat = lender.array(buffer, (len(buffer.memory),))
        return replace(parts, images=unpack_tensors(found.layout, flat))
    images: np.ndarray | tuple[object, ...]
    if buffer is None:
        images = () if isinstance(found, list) else np.empty(found, np.uint8)
    elif isinstance(found, list):
        stops = np.cumsum(found).tolist()
        images = tuple([buffer.memory[stop - size : stop] for size, stop in zip(found, stops, strict=True)])
        lender.take_back(buffer)
    else:
        images = lender.array(buffer, found)
    return replace(parts, images=images)
