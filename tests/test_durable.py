"""Durable files: whole or not there, one builder at a time."""

import errno
import fcntl
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from omnidata import durable, locks
from omnidata.durable import Store
from omnidata.locks import LockedError, locked
from omnidata.schema import UserError


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    return Store(tmp_path / "data" if request.param == "local" else f"memory://{tmp_path.name}")


def test_what_is_written_is_read(store):
    store.write_bytes("shards/a.tar", b"one")
    with store.write("shards/b.tar") as file:
        file.write(b"two")
    assert store.names("shards") == ["a.tar", "b.tar"]
    assert store.read_bytes("shards/a.tar") == b"one" and store.size("shards/b.tar") == 3
    assert store.size("shards/c.tar") is None and not store.exists("shards/c.tar")
    store.write_bytes("shards/a.tar", b"again")
    with store.open("shards/a.tar") as file:
        file.seek(2)
        assert file.read() == b"ain"
    store.remove("shards")
    assert store.names("shards") == []


def test_a_block_that_raises_leaves_the_old_file_and_no_other(store):
    store.write_bytes("index", b"old")
    with pytest.raises(ZeroDivisionError), store.write("index") as file:
        file.write(b"half of the ne")
        _ = 1 / 0
    assert store.read_bytes("index") == b"old"
    assert store.names(durable.TEMP) == []


def test_a_folder_is_copied_out_and_in(store, tmp_path):
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "x").write_bytes(b"x")
    (source / "y").write_bytes(b"y")
    store.write_folder("tokenizer", str(source))
    copy = Path(store.local_copy("tokenizer"))
    assert (copy / "deep" / "x").read_bytes() == b"x" and (copy / "y").read_bytes() == b"y"


@pytest.mark.parametrize("step", ["open", "sync", "rename", "settle"])
def test_killed_at_any_step_the_file_is_old_or_new(tmp_path, step):
    store = Store(tmp_path)
    store.write_bytes("file", b"old")

    def die(name, path):
        if name == step:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        durable.on_step = die
        store.write_bytes("file", b"new" * 100_000)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert store.read_bytes("file") == (b"new" * 100_000 if step == "settle" else b"old")
    store.remove_temps("file")
    assert store.names(durable.TEMP) == []


def test_a_full_disk_leaves_no_file(tmp_path):
    """RLIMIT_FSIZE makes the kernel refuse a write as a full disk does, without being root."""
    import resource

    store = Store(tmp_path)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            store.write_bytes("file", bytes(3_000_000))
        except OSError as error:
            os._exit(error.errno)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == errno.EFBIG and code in durable.HOPELESS
    assert not store.exists("file") and store.names(durable.TEMP) == []


def test_an_unknown_protocol_is_the_users_mistake():
    with pytest.raises(UserError, match="nosuch"):
        Store("nosuch://bucket/data")


# --- locks ------------------------------------------------------------------------------------------------


def _hold(url, ready, release):
    with locked(Store(url), "build"):
        ready.set()
        release.wait(20)


def test_a_second_holder_is_refused_and_a_killed_one_is_not_missed(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, release = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(tmp_path, ready, release))
    holder.start()
    assert ready.wait(20)
    with pytest.raises(LockedError, match=f'"pid": {holder.pid}'), locked(Store(tmp_path), "build"):
        pass
    with locked(Store(tmp_path), "other"):
        pass
    holder.kill()
    holder.join()
    with locked(Store(tmp_path), "build"):
        pass


def test_tasks_share_a_lock_and_exclude_a_whole_build(tmp_path):
    store = Store(tmp_path)
    shared = locked(store, "build", shared=True)
    with locked(store, "build", shared=True), shared, pytest.raises(LockedError), locked(store, "build"):
        pass
    with locked(store, "build"), pytest.raises(LockedError), locked(store, "build", shared=True):
        pass


def test_a_lease_in_a_remote_store(monkeypatch, tmp_path):
    store = Store(f"memory://{tmp_path.name}")
    with locked(store, "build"):
        for shared in (False, True):
            with pytest.raises(LockedError), locked(store, "build", shared=shared):
                pass
    with locked(store, "build"):
        monkeypatch.setattr(locks, "LEASE_SECONDS", -1.0)  # its holder has not refreshed it for long
        monkeypatch.setattr(
            locks.threading, "Thread", lambda **_: type("T", (), {"start": lambda self: None})()
        )
        with locked(store, "build"):
            pass


def test_removing_the_folder_of_a_lock_does_not_let_two_in(tmp_path):
    """The holder removes .build/ when all is complete; who comes then must lock the new file, not the old."""
    store = Store(tmp_path)
    with locked(store, "build"):
        store.remove(durable.SCRATCH)
        with locked(store, "build"), pytest.raises(LockedError), locked(store, "build"):
            pass


@pytest.mark.parametrize("when", ["open", "stat"])
def test_the_folder_of_a_lock_may_vanish_at_any_moment(tmp_path, monkeypatch, when):
    """Its holder removes it when all is complete: before we open the lock's file, or once we hold it."""
    store, times = Store(tmp_path), []

    def vanish(*_, **__):
        if len(times) < 3:
            times.append(when)
            store.remove(durable.SCRATCH)

    make_folder, flock = durable.make_folder, fcntl.flock
    if when == "open":
        monkeypatch.setattr(locks, "make_folder", lambda path: (make_folder(path), vanish()))
    else:
        monkeypatch.setattr(fcntl, "flock", lambda *arguments: (flock(*arguments), vanish()))
    with locked(store, "build"), pytest.raises(LockedError), locked(store, "build"):
        pass
    assert len(times) == 3
