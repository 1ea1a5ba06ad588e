"""Workers that are killed, signalled or crash: the stream goes on unchanged, or stops and says why."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import re
import signal
import socket
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_dataset import build_tiny_dataset

from omnidata.loader import workers
from omnidata.loader.assembler import Assembler
from omnidata.loader.buffers import Borrower, Lender
from omnidata.loader.loader import PackLoader
from omnidata.loader.reader import LoadError
from omnidata.schema import UserError

SETTINGS = {"global_batch": 2, "max_tokens": 450, "window_samples": 60, "image_size": 24}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """150 training samples of 0-2 images in 10 shards."""
    return build_tiny_dataset(tmp_path_factory.mktemp("workers") / "data", num_samples=158)


def loader(data, **settings) -> PackLoader:
    return PackLoader(data, **(SETTINGS | {"num_epochs": 2} | settings))


def contents(microbatch):
    return (
        microbatch.keys,
        microbatch.step,
        microbatch.input_ids.tolist(),
        microbatch.images.numpy().tobytes(),
    )


@pytest.fixture(scope="module")
def undisturbed(data):
    return [contents(microbatch) for microbatch in loader(data)]


def worker_pids() -> list[int]:
    return [process.pid for process in multiprocessing.active_children()]


# --- death ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_killed_worker_changes_nothing(data, undisturbed, num_workers):
    found, killed = [], 0
    with pytest.warns(RuntimeWarning, match=r"died \(killed by SIGKILL\).* a new one goes on"):
        for number, microbatch in enumerate(loader(data, num_workers=num_workers)):
            found.append(contents(microbatch))
            if number in (5, 12, 20):  # one that has answered since the last time
                os.kill(worker_pids()[0], signal.SIGKILL)
                killed += 1
    assert killed == 3 and found == undisturbed
    assert not worker_pids()


def test_workers_killed_while_they_work_change_nothing(data, undisturbed, monkeypatch):
    """Killed by themselves, in the middle of a microbatch that the others do not have."""
    parent, assemble = os.getpid(), Assembler.assemble

    def deadly(self, work, memory=None):
        first = work.documents[0].place.key if work.documents else "none"  # the epoch's tail is padded
        marker = Path(data, f"killed-{first}-{work.epoch}")
        if os.getpid() != parent and len(list(Path(data).glob("killed-*"))) < 2 and not marker.exists():
            marker.touch()
            os._exit(3)  # as a library that gives up
        return assemble(self, work, memory)

    monkeypatch.setattr(Assembler, "assemble", deadly)
    with pytest.warns(RuntimeWarning, match="exit code 3"):
        found = [contents(microbatch) for microbatch in loader(data, num_workers=2)]
    assert found == undisturbed


def test_workers_that_always_die_stop_the_run_and_are_named(data, monkeypatch):
    parent, assemble = os.getpid(), Assembler.assemble

    def deadly(self, work, memory=None):
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return assemble(self, work, memory)

    monkeypatch.setattr(Assembler, "assemble", deadly)
    with (
        pytest.warns(RuntimeWarning),
        pytest.raises(LoadError, match=r"SIGKILL.*reading sample-.*another one"),
    ):
        list(loader(data, num_workers=2))
    assert not worker_pids()


def test_workers_killed_at_every_start_stop_the_run(data):
    done = threading.Event()

    def kill_on_sight():
        children = Path(f"/proc/self/task/{threading.main_thread().native_id}/children")
        while not done.is_set():
            for pid in map(int, children.read_text().split()):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.001)

    killer = threading.Thread(target=kill_on_sight)
    killer.start()
    try:
        with pytest.warns(RuntimeWarning), pytest.raises(LoadError, match="worker died"):
            for _ in loader(data, num_workers=1, num_epochs=None):
                pass
    finally:
        done.set()
        killer.join()


def test_deaths_that_go_on_stop_the_run_in_spite_of_progress(data):
    microbatches = iter(loader(data, num_workers=1, num_epochs=None))
    with pytest.warns(RuntimeWarning), pytest.raises(LoadError, match="worker died"):
        for number, _ in enumerate(microbatches):
            if number % 10 == 5:
                os.kill(worker_pids()[0], signal.SIGKILL)
            assert number < 100


def test_an_error_in_a_worker_is_raised_in_the_training_process(data, monkeypatch, capfd):
    def broken(self, work, memory=None):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Assembler, "assemble", broken)
    with pytest.raises(ZeroDivisionError, match="a bug") as raised:
        list(loader(data, num_workers=2))
    assert re.search(
        r"in a loader worker: number \d \(pid \d+\), reading sample-", raised.value.__notes__[-1]
    )
    assert not worker_pids()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("where", ["omnidata.loader.reader.parse", "omnidata.images.pixels.decode_resized"])
def test_what_runs_out_of_memory_names_the_sample_and_leaves_none_out(data, monkeypatch, where, num_workers):
    def too_much(*_, **__):
        raise MemoryError

    monkeypatch.setattr(where, too_much)
    with pytest.raises(
        LoadError, match=r"^out of memory at sample sample-\d+ of .*/shards/train-\d+\.tar at"
    ):
        list(loader(data, num_workers=num_workers, on_error="skip"))
    assert not worker_pids()


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory")])
def test_a_worker_without_memory_for_a_buffer_is_one_clear_line(data, monkeypatch, error, capfd):
    def too_much(*_):
        raise error

    monkeypatch.setattr(Borrower, "memory", too_much)
    with pytest.raises(LoadError, match=r"ran out of memory: number \d \(pid \d+\), reading sample-.*fewer"):
        list(loader(data, num_workers=2))
    assert "Traceback" not in capfd.readouterr().err


def test_an_error_of_a_sample_that_is_not_its_damage_names_it(data, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("omnidata.images.pixels.decode_resized", broken)
    with pytest.raises(ZeroDivisionError, match="a bug") as raised:
        list(loader(data))
    assert raised.value.__notes__[0].startswith("at sample sample-")


# --- no answer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_stopped_worker_changes_nothing_and_nobody_waits_beyond_the_timeout(data, undisturbed, num_workers):
    found, longest, last = [], 0.0, time.monotonic()
    with pytest.warns(RuntimeWarning, match=r"no answer in 0\.5 s.*number \d \(pid \d+\), reading sample-"):
        for number, microbatch in enumerate(loader(data, num_workers=num_workers, worker_timeout=0.5)):
            found.append(contents(microbatch))
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
            if number in (5, 20):
                os.kill(worker_pids()[0], signal.SIGSTOP)
    assert found == undisturbed and longest < 5
    assert not worker_pids()


@pytest.mark.parametrize("stop_at", ["in_its_answer", "before_it_reads"])
def test_a_worker_stopped_within_a_message_changes_nothing(data, undisturbed, monkeypatch, stop_at):
    """Half an answer is in the socket, or the socket is full of what the worker does not read."""
    parent, sent = os.getpid(), Connection._send
    marker = Path(data, f"stopped-{stop_at}")

    def stopping(self, buffer, *rest):
        if os.getpid() != parent and not marker.exists():
            marker.touch()
            sent(self, buffer[: len(buffer) // 2])
            os.kill(os.getpid(), signal.SIGSTOP)
        return sent(self, buffer, *rest)

    def stopped(*arguments):
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        return read_tasks(*arguments)

    def shrink(connection):
        with socket.socket(fileno=os.dup(connection.fileno())) as end:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)

    read_tasks, limit = workers._read_tasks, workers._limit_waits
    settings = {"num_workers": 1, "worker_timeout": 0.5}
    if stop_at == "in_its_answer":
        monkeypatch.setattr(Connection, "_send", stopping)
    else:
        monkeypatch.setattr(workers, "_read_tasks", stopped)
        monkeypatch.setattr(workers, "_limit_waits", lambda end, seconds: (limit(end, seconds), shrink(end)))
        settings["prefetch"] = 1000  # more than the socket holds
    with pytest.warns(RuntimeWarning, match=r"no answer in 0\.5 s"):
        found = [contents(microbatch) for microbatch in loader(data, **settings)]
    assert marker.exists() and found == undisturbed


def test_workers_that_never_answer_stop_the_run_and_are_named(data, monkeypatch):
    monkeypatch.setattr(Assembler, "assemble", lambda *_: time.sleep(60))
    with (
        pytest.warns(RuntimeWarning),
        pytest.raises(LoadError, match=r"no answer in 0\.3 s.*reading sample-.*raise worker_timeout"),
    ):
        list(loader(data, num_workers=2, worker_timeout=0.3))
    assert not worker_pids()


def test_a_trainer_that_is_long_away_takes_no_worker_for_stuck(data, undisturbed, recwarn):
    found = []
    for microbatch in loader(data, num_workers=2, worker_timeout=0.2):
        found.append(contents(microbatch))
        if len(found) == 3:
            time.sleep(1)  # an evaluation
    assert found == undisturbed and not [one for one in recwarn if one.category is RuntimeWarning]


def test_a_timeout_must_be_positive(data):
    with pytest.raises(UserError, match="worker_timeout 0"):
        loader(data, worker_timeout=0)


# --- signals and ends -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_to_a_whole_job_leave_the_workers_alone(data, undisturbed, number):
    """Sent from the first moment on: to workers that are just being forked, and again and again."""
    done, received = threading.Event(), []
    before = signal.signal(number, lambda *_: received.append(number))

    def shoot():
        children = Path(f"/proc/self/task/{threading.main_thread().native_id}/children")
        while not done.is_set():
            for pid in [*map(int, children.read_text().split()), os.getpid()]:
                with suppress(ProcessLookupError):  # the epoch has ended
                    os.kill(pid, number)
            time.sleep(0.0005)

    shooter = threading.Thread(target=shoot)
    shooter.start()
    try:
        for _ in range(3):
            found = [contents(microbatch) for microbatch in loader(data, num_workers=2)]
            assert found == undisturbed
    finally:
        done.set()
        shooter.join()
        signal.signal(number, before)
    assert received


def start(function, *arguments):
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


def _read_and_wait(data, path) -> None:
    microbatches = iter(loader(data, num_workers=2, num_epochs=None))
    next(microbatches)
    Path(path).write_text(" ".join(map(str, worker_pids())))
    time.sleep(60)


def test_workers_end_with_a_training_process_that_is_killed(data, tmp_path):
    process = start(_read_and_wait, data, tmp_path / "pids")
    while not (tmp_path / "pids").exists() or not (tmp_path / "pids").read_text():
        time.sleep(0.01)
    pids = (tmp_path / "pids").read_text().split()
    process.kill()
    process.join()
    deadline = time.monotonic() + 20
    while any(Path("/proc", pid).exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(pids) == 2 and not [pid for pid in pids if Path("/proc", pid).exists()]


def _read_a_little(data) -> None:
    global kept
    kept = iter(loader(data, num_workers=2, num_epochs=None))
    next(kept)


def test_a_process_may_end_with_workers_at_work(data):
    process = start(_read_a_little, data)
    process.join(timeout=30)
    assert process.exitcode == 0


def test_an_iteration_that_is_given_up_ends_its_workers(data):
    microbatches = iter(loader(data, num_workers=2))
    next(microbatches)
    assert len(worker_pids()) == 2
    del microbatches
    assert not worker_pids()


# --- shared memory ----------------------------------------------------------------------------------------


def test_microbatches_that_are_kept_stay_as_they_are(data, undisturbed):
    kept = list(loader(data, num_workers=2))
    assert [contents(microbatch) for microbatch in kept] == undisturbed


def test_a_view_of_the_images_keeps_them(data):
    microbatches = iter(loader(data, num_workers=1, num_epochs=None))
    first = next(one for one in microbatches if len(one.images)).images
    views = first[:1].permute(0, 2, 3, 1).reshape(-1), first.numpy()[0]
    before = [torch.as_tensor(view).clone() for view in views]
    del first
    for _ in itertools.islice(microbatches, 60):  # each of the buffers is written many times
        pass
    assert all(torch.equal(torch.as_tensor(view), old) for view, old in zip(views, before, strict=True))


def test_a_buffer_is_lent_again_only_when_it_is_free():
    lender, borrower = Lender(), Borrower()
    buffer, loan, descriptor = lender.lend(100)
    borrower.memory(loan, descriptor)[:6] = range(6)
    array = lender.array(buffer, (2, 3))
    assert array.tolist() == [[0, 1, 2], [3, 4, 5]]
    row = array[1]
    del array, buffer
    other, second, descriptor = lender.lend(100)
    assert second.is_new and second.number != loan.number
    os.close(descriptor)
    del row
    again, third, descriptor = lender.lend(100)
    assert again.number == loan.number and not third.is_new and descriptor is None
    lender.take_back(other)
    lender.take_back(again)
    *_, larger, descriptor = lender.lend(3 << 20)
    assert larger.is_new and larger.num_bytes == 3 << 20 and larger.forget == (other.number,)
    assert len(borrower.memory(larger, descriptor)) == 3 << 20
    assert isinstance(np.frombuffer(again.memory, np.uint8), np.ndarray)
