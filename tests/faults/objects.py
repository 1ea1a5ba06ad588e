"""An object store that fails: S3 (moto's server) behind a proxy that answers late, short, wrong, or with 5xx.

A build and a load complete with the very same bytes, or end in one clear line; wrong bytes are found.
"""

from __future__ import annotations

import http.client
import logging
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tiny_corpus import digests
from tiny_dataset import build_tiny_dataset

from faults.building import INLINE, in_child, peace
from faults.table import Row
from omnidata.loader import PackLoader
from omnidata.schema import UserError
from omnidata.verify.run import verify

KINDS = ("5xx", "timeout", "short", "wrong")
READ_TIMEOUT = 0.3  # seconds of the client
REFUSED, OTHER_BYTES, MANY_LINES = 3, 4, 5  # exit codes of a child


@dataclass
class Weather:
    """What the proxy does to the next requests."""

    kind: str | None = None
    chance: float = 0.0
    only: str = ""  # in the path
    dice: random.Random = field(default_factory=random.Random)

    def strikes(self, path: str) -> bool:
        """Whether this request fails."""
        return self.kind is not None and self.only in path and self.dice.random() < self.chance


def rows(folder: Path, short: bool) -> Iterator[Row]:
    """Builds and loads in each weather, at a chance and always."""
    weather = Weather()
    times = 1 if short else 2
    with _store(weather):
        yield from builds(folder, weather, times, short)
        yield from loads(folder, weather, times)


def builds(folder: Path, weather: Weather, times: int, short: bool) -> Iterator[Row]:
    """From S3 to S3. Wrong bytes are those that are written: nobody has hashed a stranger's pictures."""
    small = peace(folder, samples_per_shard=100)
    store = _client()
    store.mkdir("raw")
    store.put(str(small.corpus.folder), "raw/c", recursive=True)
    for kind in KINDS[:1] if short else KINDS:
        with Row("flaky object store, build", kind).timed() as row:
            for number in range(times):
                row.tried += 1
                weather.dice.seed(number)
                here = folder / "fetched"

                def build(number: int = number, kind: str = kind, here: Path = here) -> None:
                    out = f"s3://made-{kind}-{number}/data"
                    _client().mkdir(out.split("/")[2])
                    with _in(weather, kind, 0.05):
                        small.corpus.build(
                            out, options=INLINE, source=_there(small), image_root="s3://raw/c/photos"
                        )
                    _client().get(out, str(here), recursive=True)

                code = in_child(lambda build=build: _judged(build))
                _count(row, code, f"{number}")
                if code == 0:
                    found = digests(here)
                    shards = {name: value for name, value in found.items() if name.startswith("shards/")}
                    wanted = {name: small.digests[name] for name in shards if name in small.digests}
                    if shards != wanted and (kind != "wrong" or verify(here, deep=True, num_workers=1).ok):
                        row.fail("lost", f"{number}: other bytes")
                shutil.rmtree(here, ignore_errors=True)
        yield row


def _there(small: Any) -> tuple[str, ...]:
    return tuple(f"s3://raw/c/{Path(source).name}" for source in small.corpus.settings.source)


def loads(folder: Path, weather: Weather, times: int) -> Iterator[Row]:
    """The shards, and the whole dataset with its manifest and index."""
    data = build_tiny_dataset(folder / "data", num_samples=16, num_val=2)
    whole = _microbatches(str(data))
    _client().mkdir("data")
    _client().put(str(data), "data/d", recursive=True)
    for kind in KINDS:
        with Row("flaky object store, load", kind).timed() as row:
            for number in range(times):
                for only, chance in (("shards/", 0.2), ("shards/", 1.0), ("", 0.1)):
                    row.tried += 1
                    weather.dice.seed(number)

                    def load(kind: str = kind, only: str = only, chance: float = chance) -> None:
                        with _in(weather, kind, chance, only):
                            found = _microbatches("s3://data/d")
                        os._exit(0 if found == whole else OTHER_BYTES)

                    code = in_child(lambda load=load: _judged(load))
                    _count(row, code, f"{number}, {only or 'all'} at {chance}")
                    if chance == 1.0 and code == 0:
                        row.fail("not_found", f"{number}: a store that always fails is read")
        yield row


def _microbatches(url: str) -> list[Any]:
    remote = {"attempts": 3, "backoff": 0.01}
    loader = PackLoader(url, global_batch=2, max_tokens=400, num_epochs=1, image_size=24, remote=remote)
    return [(each.keys, each.input_ids.tolist(), each.images.numpy().tobytes()) for each in loader]


def _judged(work: Callable[[], None]) -> None:
    """In a child: its exit code says what came of it."""
    try:
        work()
    except UserError as error:
        os._exit(REFUSED if "\n" not in str(error) else MANY_LINES)


def _count(row: Row, code: int, what: str) -> None:
    if code == OTHER_BYTES:
        row.fail("lost", f"{what}: trained on other bytes")
    elif code not in (0, REFUSED):
        row.fail("not_found", f"{what}: exit code {code}, no clear line")


# --- the store --------------------------------------------------------------------------------------------


@contextmanager
def _in(weather: Weather, kind: str, chance: float, only: str = "") -> Iterator[None]:
    """The proxy lives in the parent, the child tells it by a request of its own."""
    _tell(f"{kind}/{chance}/{only.strip('/')}")
    try:
        yield
    finally:
        _tell("calm/0/")


def _tell(words: str) -> None:
    host, port = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    connection.request("GET", f"/-/weather/{words}")
    connection.getresponse().read()
    connection.close()


def _client() -> Any:
    import fsspec

    return fsspec.filesystem("s3", skip_instance_cache=True)


@contextmanager
def _store(weather: Weather) -> Iterator[None]:
    import fsspec
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), _proxy(weather, server.get_host_and_port()))
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    names = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    names["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{proxy.server_port}"
    before, conf = dict(os.environ), dict(fsspec.config.conf)
    os.environ.update(names)
    quick = {"read_timeout": READ_TIMEOUT, "retries": {"max_attempts": 1}}
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL + 1)
    s3fs.S3FileSystem.retries, retries = 2, s3fs.S3FileSystem.retries
    fsspec.config.conf["s3"] = {"config_kwargs": quick}
    try:
        yield
    finally:
        s3fs.S3FileSystem.retries = retries
        fsspec.config.conf.clear()
        fsspec.config.conf.update(conf)
        os.environ.clear()
        os.environ.update(before)
        proxy.shutdown()
        server.stop()


def _proxy(weather: Weather, behind: tuple[str, int]) -> type[BaseHTTPRequestHandler]:
    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            """Nothing."""

        def _any(self) -> None:
            if self.path.startswith("/-/weather/"):
                kind, chance, weather.only = self.path.split("/")[3:6]
                weather.kind, weather.chance = kind, float(chance)
                self._answer(200, [], b"")
                return
            strikes = weather.strikes(self.path)
            body = self._body()
            if strikes and weather.kind == "5xx":
                self._answer(weather.dice.choice([500, 503]), [], b"")
                return
            if strikes and weather.kind == "timeout":
                time.sleep(READ_TIMEOUT * 2)
                self.close_connection = True
                return
            if strikes and weather.kind == "wrong" and body:
                body, strikes = _flipped(body, weather.dice), False
            connection = http.client.HTTPConnection(*behind, timeout=30)
            connection.request(self.command, self.path, body, dict(self.headers))
            response = connection.getresponse()
            content = response.read()
            connection.close()
            if strikes and weather.kind == "wrong" and content:
                content = _flipped(content, weather.dice)
            cut = strikes and weather.kind == "short" and self.command == "GET"
            self._answer(response.status, response.getheaders(), content, cut=cut)

        def _body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def _answer(self, status: int, headers: list, content: bytes, *, cut: bool = False) -> None:
            self.send_response_only(status)
            for name, value in headers:
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            length = len(content)
            if self.command == "HEAD":
                length = int(dict((k.lower(), v) for k, v in headers).get("content-length", 0))
            self.send_header("Content-Length", str(length))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[: len(content) // 2] if cut else content)
            self.close_connection = self.close_connection or cut

    for method in ("GET", "PUT", "POST", "DELETE", "HEAD"):
        setattr(Proxy, f"do_{method}", Proxy._any)
    return Proxy


def _flipped(raw: bytes, dice: random.Random) -> bytes:
    changed = bytearray(raw)
    changed[dice.randrange(len(raw))] ^= 1 << dice.randrange(8)
    return bytes(changed)
