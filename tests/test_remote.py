"""Datasets at a URL: concurrency, retries, checksums, and the local cache."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from tiny_dataset import build_tiny_dataset

from omnidata.loader.cache import SampleCache
from omnidata.loader.loader import PackLoader
from omnidata.loader.reader import LoadError


class Unsteady(MemoryFileSystem):
    """A store in memory whose reads of shards fail, lie or dawdle as a test says."""

    protocol = "unsteady"
    store: dict = {}  # noqa: RUF012 (fsspec's own design)
    pseudo_dirs: list = [""]  # noqa: RUF012
    trouble = staticmethod(lambda path, attempt: None)
    attempts: dict = {}  # noqa: RUF012 ((path, start) -> number of reads)
    in_flight = most_in_flight = 0
    lock = threading.Lock()

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("unsteady://", "memory://"))

    def cat_file(self, path, start=None, end=None, **options):
        if not path.endswith(".tar"):
            return super().cat_file(path, start=start, end=end, **options)
        cls = Unsteady
        with cls.lock:
            cls.in_flight += 1
            cls.most_in_flight = max(cls.most_in_flight, cls.in_flight)
            cls.attempts[path, start] = attempt = cls.attempts.get((path, start), 0) + 1
        try:
            raw = super().cat_file(path, start=start, end=end, **options)
            changed = cls.trouble(raw, attempt)
            return raw if changed is None else changed
        finally:
            with cls.lock:
                cls.in_flight -= 1

    @classmethod
    def reset(cls, trouble=lambda raw, attempt: None) -> None:
        cls.trouble, cls.attempts = staticmethod(trouble), {}
        cls.in_flight = cls.most_in_flight = 0


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return build_tiny_dataset(
        tmp_path_factory.mktemp("remote") / "data", num_samples=68, samples_per_shard=20
    )


@pytest.fixture
def url(local):
    fsspec.register_implementation("unsteady", Unsteady, clobber=True)
    Unsteady.reset()
    Unsteady.store.clear()
    for path in filter(Path.is_file, local.rglob("*")):
        fsspec.filesystem("unsteady").pipe_file(f"/data/{path.relative_to(local)}", path.read_bytes())
    return "unsteady://data"


def contents(path, **settings):
    settings = {"remote": {"backoff": 0.001}} | settings
    one = PackLoader(
        path, global_batch=1, max_tokens=450, image_size=24, num_epochs=1, tail="pad", **settings
    )
    return [(m.keys, m.input_ids.tolist(), m.images.sum().item(), m.num_skipped) for m in one]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_remote_dataset_gives_the_same_microbatches(local, url, num_workers):
    assert contents(url, num_workers=num_workers) == contents(str(local))


def test_gets_run_at_once_up_to_the_limit(url):
    Unsteady.reset(lambda raw, attempt: time.sleep(0.005))
    contents(url, remote={"concurrency": 3})
    assert Unsteady.most_in_flight == 3


def fail_twice(raw, attempt):
    if attempt <= 2:
        raise OSError("connection reset")


def short_once(raw, attempt):
    return raw[:-1] if attempt == 1 else None


def lie_once(raw, attempt):
    return raw[:-600] + bytes(600) if attempt == 1 else None


@pytest.mark.parametrize("trouble, reads", [(fail_twice, 3), (short_once, 2), (lie_once, 2)])
def test_a_failed_short_or_wrong_read_is_tried_again(local, url, trouble, reads):
    Unsteady.reset(trouble)
    assert contents(url) == contents(str(local))
    assert set(Unsteady.attempts.values()) == {reads}


def test_after_the_last_attempt_the_sample_is_named(local, url):
    def always(raw, attempt):
        raise OSError("no route to host")

    Unsteady.reset(always)
    with pytest.raises(
        LoadError, match=r"sample-\d+ of unsteady://data/shards/train-\d+.tar.*no route to host"
    ):
        contents(url, remote={"attempts": 3, "backoff": 0.001})
    assert max(Unsteady.attempts.values()) == 3


def test_an_error_of_the_clouds_own_client_is_tried_again_and_named(local, url):
    """aiohttp's, botocore's, azure's ... are no OSError."""

    class PayloadError(Exception):
        pass

    def fail(raw, attempt):
        if attempt <= num_failures:
            raise PayloadError("response payload is not completed")

    Unsteady.reset(fail)
    num_failures = 2
    assert contents(url) == contents(str(local))
    num_failures = 100
    with pytest.raises(LoadError, match=r"sample-\d+ of .*PayloadError: response payload is not completed"):
        contents(url, remote={"attempts": 2, "backoff": 0.001})


def test_a_missing_shard_is_not_asked_for_again(local, url):
    fsspec.filesystem("unsteady").rm("/data/shards/train-00001.tar")
    with pytest.raises(LoadError, match=r"train-00001\.tar.*FileNotFoundError"):
        contents(url, remote={"backoff": 100})
    skipped = contents(url, on_error="skip", remote={"backoff": 100})
    assert sum(num_skipped for *_, num_skipped in skipped) == 20


def test_the_cache_saves_every_read_of_a_second_pass(local, url, tmp_path):
    remote = {"cache_dir": str(tmp_path / "cache")}
    first = contents(url, remote=remote)
    Unsteady.reset()
    assert contents(url, remote=remote) == first == contents(str(local))
    assert not Unsteady.attempts


def test_a_damaged_copy_in_the_cache_is_fetched_again(local, url, tmp_path):
    remote = {"cache_dir": str(tmp_path / "cache")}
    contents(url, remote=remote)
    for path in list((tmp_path / "cache").glob("??/*"))[:5]:
        path.write_bytes(path.read_bytes()[:-512] + bytes(512))
    Unsteady.reset()
    assert contents(url, remote=remote) == contents(str(local))
    assert 1 <= sum(Unsteady.attempts.values()) <= 5  # a sample may really end in zeros


# --- the cache itself -------------------------------------------------------------------------------------


def held(folder) -> int:
    return sum(path.stat().st_size for path in folder.glob("??/*"))


def test_the_least_recently_used_goes_first(tmp_path):
    cache = SampleCache(tmp_path, 1000)
    for number in range(10):
        cache.put(str(number), bytes(100))
        os.utime(cache._path(str(number)), (number, number))
    assert held(tmp_path) == 1000
    assert cache.get("0") == bytes(100)  # used again
    cache.put("new", bytes(100))
    assert held(tmp_path) <= 1000
    assert cache.get("0") and cache.get("new") and cache.get("1") is None and cache.get("9")


def test_what_is_larger_than_the_cap_is_not_kept(tmp_path):
    cache = SampleCache(tmp_path, 1000)
    cache.put("large", bytes(1001))
    assert cache.get("large") is None


def fill(folder, number):
    cache = SampleCache(folder, 20_000)
    for i in range(40):
        cache.put(f"{number}-{i}", bytes(900 + i))
        with cache._locked():
            assert held(cache.folder) <= 20_000
        assert cache.get(f"{number}-{i}") in (bytes(900 + i), None)


def test_processes_share_the_cap(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=fill, args=(tmp_path, number)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert 15_000 <= held(tmp_path) <= 20_000
    assert int((tmp_path / "size").read_text()) == held(tmp_path)
    assert not list(tmp_path.glob("??/.*"))
