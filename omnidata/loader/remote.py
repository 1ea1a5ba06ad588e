"""Remote: ranged reads of shards at any fsspec URL.

    cache (if there is one)  ->  ranged get, at most ``concurrency`` at once  ->  content hash  ->  cache

A read that fails, is short, or has the wrong content hash is tried again after 0.2, 0.4, 0.8 ... seconds.
What has been hashed right is handed on; after the last attempt the reason is.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omnidata.loader.cache import SampleCache
from omnidata.loader.sample_bytes import check_content, parse
from omnidata.plan.places import Place
from omnidata.shards import CorruptSampleError

if TYPE_CHECKING:
    from omnidata.dataset import Dataset


@dataclass(frozen=True, slots=True)
class Remote:
    """How to read a dataset that is not on a local disk."""

    concurrency: int = 16  # ranged gets in flight, for each worker
    attempts: int = 5  # for one sample, before it counts as unreadable
    backoff: float = 0.2  # seconds before the second attempt; doubled before each further one
    cache_dir: str | None = None  # a local folder that keeps what was read; one for all ranks of a node
    cache_bytes: int = 64 << 30  # what the folder may hold


class RemoteShards:
    """Ranged reads of a dataset at a URL; connected in the process that reads, so that forks are safe."""

    def __init__(self, dataset: Dataset, remote: Remote) -> None:
        self._url, self._identity, self._remote = dataset.path, dataset.digest, remote
        self._cache = SampleCache(remote.cache_dir, remote.cache_bytes) if remote.cache_dir else None
        self._connected: tuple[Any, str, ThreadPoolExecutor] | None = None

    def read(self, places: Sequence[Place]) -> list[bytes | Exception]:
        """The bytes of each place, or why there are none."""
        _, _, pool = self._connect()
        return list(pool.map(self._read_one, places))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_connected": None}

    def _connect(self) -> tuple[Any, str, ThreadPoolExecutor]:
        if self._connected is None:
            import fsspec

            filesystem, root = fsspec.core.url_to_fs(self._url)
            self._connected = filesystem, root, ThreadPoolExecutor(self._remote.concurrency, "omnidata-read")
        return self._connected

    def _read_one(self, place: Place) -> bytes | Exception:
        name = f"{self._identity}/{place.shard}/{place.offset}"
        failure: Exception = CorruptSampleError("no attempt was made")
        for attempt in range(self._remote.attempts):
            if attempt:
                time.sleep(self._remote.backoff * 2 ** (attempt - 1))
            try:
                return self._attempt(name, place)
            except (FileNotFoundError, MemoryError) as error:  # trying again will not make it appear
                return error
            except (OSError, EOFError, CorruptSampleError) as error:  # another attempt may cure it
                failure = error
        return failure

    def _attempt(self, name: str, place: Place) -> bytes:
        if self._cache and (raw := self._cache.get(name)) is not None:
            try:
                check_content(parse(raw, place), place)
                return raw
            except CorruptSampleError:  # the copy is damaged: fetch it again
                self._cache.discard(name)
        filesystem, root, _ = self._connect()
        try:
            raw = filesystem.cat_file(
                f"{root}/{place.shard}", start=place.offset, end=place.offset + place.nbytes
            )
        except (OSError, EOFError, MemoryError):
            raise
        except Exception as error:  # each cloud's client has errors of its own, which are no OSError
            raise OSError(f"{type(error).__name__}: {error}") from error
        check_content(parse(raw, place), place)
        if self._cache:
            self._cache.put(name, raw)
        return raw
