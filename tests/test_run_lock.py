"""One run per folder: a second one is refused with the first one's name; a dead one's lock is taken over."""

import json
import multiprocessing
import os
import socket
import time

import pytest
import torch

from omnidata.schema import UserError
from pipelines import run_lock
from pipelines.parallel import World
from pipelines.run_lock import RunLock

WORLD = World(0, 1, torch.device("cpu"), "single")


def hold(run_dir, ready):
    with RunLock(run_dir, WORLD):
        ready.set()
        time.sleep(60)


def test_a_second_run_is_refused_and_a_dead_one_is_taken_over(tmp_path):
    context = multiprocessing.get_context("forkserver")
    ready = context.Event()
    first = context.Process(target=hold, args=(tmp_path, ready))
    first.start()
    try:
        assert ready.wait(60)
        with (
            pytest.raises(UserError, match=f"process {first.pid} on host {socket.gethostname()}"),
            RunLock(tmp_path, WORLD),
        ):
            pass
    finally:
        first.kill()
        first.join()
    with RunLock(tmp_path, WORLD):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    assert (tmp_path / "run.lock").read_text() == ""


def test_a_fresh_file_of_another_host_is_a_run_that_lives(tmp_path, monkeypatch):
    path = tmp_path / "run.lock"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7}))
    with pytest.raises(UserError, match="process 7 on host elsewhere"), RunLock(tmp_path, WORLD):
        pass
    old = time.time() - run_lock.LIVE_SECONDS - 1
    os.utime(path, (old, old))
    with RunLock(tmp_path, WORLD):
        assert json.loads(path.read_text())["pid"] == os.getpid()
