"""Executors: every task's result once, whoever dies."""

import os
import signal
import subprocess
import sys
import time

import pytest

from omnidata.executors import (
    InlineExecutor,
    ProcessExecutor,
    WorkerDiedError,
    one_thread,
    run_tasks,
)
from omnidata.schema import UserError


def double(task, report):
    report(task)
    return task * 2


def die_until(task, report):
    """(path, times): be killed so many times, counting in a file; then answer."""
    path, times = task
    with open(path, "a+") as file:
        file.write("x")
        file.seek(0)
        count = len(file.read())
    if count <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return count


def fail(task, report):
    raise task


def fail_until(task, report):
    path, times = task
    with open(path, "a+") as file:
        file.write("x")
        file.seek(0)
        if len(file.read()) <= times:
            raise OSError(5, "the network sneezed")
    return "well"


def run_out_of_memory(task, report):
    raise MemoryError


@pytest.fixture(params=["inline", "processes"])
def start(request):
    started = []

    def executor(work):
        made = InlineExecutor(work) if request.param == "inline" else ProcessExecutor(work, num_workers=2)
        started.append(made)
        return made

    yield executor
    for made in started:
        made.close()


def test_every_result_once_and_progress_on_the_way(start):
    seen = []
    results = dict(run_tasks(start(double), range(1, 20), on_progress=lambda task, data: seen.append(data)))
    assert results == {task: 2 * task for task in range(1, 20)}
    assert sorted(seen) == list(range(1, 20))


def test_a_users_mistake_and_a_bug_come_through(start):
    with pytest.raises(UserError, match="no such corpus"):
        list(run_tasks(start(fail), [UserError("no such corpus")]))


def test_a_bug_in_a_worker_shows_its_traceback():
    executor = ProcessExecutor(fail, num_workers=1)
    with pytest.raises(RuntimeError, match=r"(?s)raise task.*ZeroDivisionError: who divides"):
        list(run_tasks(executor, [ZeroDivisionError("who divides")]))
    executor.close()


def test_a_passing_io_error_is_tried_again_a_full_disk_is_not(start, tmp_path):
    assert dict(run_tasks(start(fail_until), [(tmp_path / "two", 2)])) == {(tmp_path / "two", 2): "well"}
    with pytest.raises(OSError, match="sneezed"):
        list(run_tasks(start(fail_until), [(tmp_path / "three", 3)]))
    executor = start(fail)
    with pytest.raises(OSError, match="No space"):
        list(run_tasks(executor, [OSError(28, "No space left on device")]))


def test_a_killed_worker_costs_its_own_task_one_attempt(tmp_path):
    executor = ProcessExecutor(die_until, num_workers=2)
    tasks = [(tmp_path / "healthy", 0), (tmp_path / "twice", 2), *((tmp_path / str(i), 0) for i in range(6))]
    results = dict(run_tasks(executor, tasks))
    executor.close()
    assert results[tmp_path / "twice", 2] == 3
    assert all(count == 1 for (path, times), count in results.items() if times == 0), "others ran once"


def test_a_task_that_always_kills_its_worker_ends_the_run_at_once(tmp_path):
    executor = ProcessExecutor(die_until, num_workers=2)
    begin = time.monotonic()
    with pytest.raises(WorkerDiedError, match=r"killed by SIGKILL.*while reading line 7, 3 times in a row"):
        list(run_tasks(executor, [(tmp_path / "always", 99)], last_words=lambda task: "line 7"))
    executor.close()
    assert len((tmp_path / "always").read_text()) == 3
    assert time.monotonic() - begin < 30


def test_out_of_memory_counts_as_a_death():
    executor = ProcessExecutor(run_out_of_memory, num_workers=1)
    with pytest.raises(WorkerDiedError, match="exit code 137"):
        list(run_tasks(executor, [1]))
    executor.close()


def _threads(task, report):
    return os.environ["OMP_NUM_THREADS"], os.environ["TOKENIZERS_PARALLELISM"]


def _where(task, report):
    return os.getcwd()


def test_workers_work_where_the_parent_is(start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # their server was started somewhere else
    assert dict(run_tasks(start(_where), [1])) == {1: str(tmp_path)}


def test_one_thread_restores_the_environment(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("RAYON_NUM_THREADS", raising=False)
    with one_thread():
        assert os.environ["OMP_NUM_THREADS"] == os.environ["RAYON_NUM_THREADS"] == "1"
    assert os.environ["OMP_NUM_THREADS"] == "7" and "RAYON_NUM_THREADS" not in os.environ


ORPHANS = """
import sys, time, os
sys.path.insert(0, {tests!r})
from test_executors import sleep_and_tell
from omnidata.executors import ProcessExecutor
if __name__ == "__main__":
    executor = ProcessExecutor(sleep_and_tell, num_workers=2)
    executor.submit(sys.argv[1] + "/a")
    executor.submit(sys.argv[1] + "/b")
    executor.wait()
"""


def sleep_and_tell(path, report):
    with open(path, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(60)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:  # a zombie that nobody has waited for is dead
        return file.read().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")
def test_workers_do_not_outlive_a_killed_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(ORPHANS.format(tests=os.path.dirname(__file__)))
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path)])
    names = [tmp_path / "a", tmp_path / "b"]
    deadline = time.monotonic() + 60
    while not all(name.exists() and name.read_text() for name in names) and time.monotonic() < deadline:
        time.sleep(0.05)
    pids = [int(name.read_text()) for name in names]
    parent.kill()
    parent.wait()
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)
