"""Pictures from the web: only when allowed, only from public addresses."""

import contextlib
import http.server
import socket
import threading
import time

import pytest
from test_image_store import reason

from omnidata.images import web
from omnidata.images.store import ImageStore
from omnidata.schema import ImageRef


def drip(handler, in_headers):
    """A byte now and then, for ever: each comes long before any timeout between two bytes."""
    with contextlib.suppress(OSError):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + (b"X: " if in_headers else b"\r\n"))
        for _ in range(400):
            handler.wfile.write(b"x")
            handler.wfile.flush()
            time.sleep(0.05)


class Handler(http.server.BaseHTTPRequestHandler):
    """A small site: pictures, redirects, errors."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = self.path.split("?")[0]
        self.server.requests.append((self.path, self.headers["Host"]))
        routes = {
            "/hop": "/x.jpg",
            "/loop": "/loop",
            "/meta": "http://169.254.169.254/x",
            "/file": "file:///etc/passwd",
        }
        if path in routes:
            self.send_response(302)
            self.send_header("Location", routes[path])
            self.end_headers()
        elif path == "/negative":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nabc\r\n0\r\n\r\n")
        elif path in ("/drip", "/drip-headers"):
            drip(self, path == "/drip-headers")
        elif path == "/gone":
            self.send_error(404)
        elif path == "/busy" and self.server.requests.count((self.path, self.headers["Host"])) < 3:
            self.send_error(503)
        else:
            size = 5_000 if path == "/cut" else 2_000
            self.send_response(200)
            if path != "/endless":
                self.send_header("Content-Length", str(size))
            self.end_headers()
            self.wfile.write(b"x" * (100_000 if path == "/endless" else 2_000))


@pytest.fixture(scope="module")
def site():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def url(site):
    return f"http://localhost:{site.server_address[1]}"


def local(address):
    """Permits the test's own server besides what is public."""
    return address in ("127.0.0.1", "::1") or web.is_public(address)


def test_fetching_from_the_web(site, url):
    store = ImageStore(None, allow_http=True, permit=local)
    assert store.read(ImageRef(f"{url}/x y.jpg?size=ü")) == b"x" * 2000
    assert site.requests[-1] == ("/x%20y.jpg?size=%C3%BC", url.removeprefix("http://"))
    assert store.read(ImageRef(f"{url}/hop")) == b"x" * 2000
    assert store.read(ImageRef(f"{url}/busy")) == b"x" * 2000, "503 passes"
    assert ImageStore(url, allow_http=True, permit=local).read(ImageRef("a/1.jpg")) == b"x" * 2000


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/gone", "image_missing"),
        ("/loop", "image_missing"),
        ("/cut", "image_missing"),
        ("/meta", "image_forbidden"),
        ("/file", "image_forbidden"),
        ("/endless", "image_too_large"),
    ],
)
def test_what_the_web_may_not_do(url, path, why):
    assert reason(ImageStore(None, allow_http=True, permit=local, max_bytes=50_000), url + path) == why


def test_nobody_there_is_missing(monkeypatch):
    monkeypatch.setattr(web.time, "sleep", lambda _: None)
    assert (
        reason(ImageStore(None, allow_http=True, permit=local), "http://127.0.0.1:9/x.jpg") == "image_missing"
    )
    assert reason(ImageStore(None, allow_http=True), "http://no-such-host.invalid/x.jpg") == "image_missing"
    for bad in ("http://", "http://[::1", "http://host:99999/x", "http://a..b/x.jpg"):
        assert reason(ImageStore(None, allow_http=True), bad).startswith("image_")


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "127.0.0.1",
        "0.0.0.0",
        "10.1.2.3",
        "192.168.0.1",
        "172.16.0.1",
        "169.254.169.254",
        "100.64.0.1",
        "[::1]",
        "[fe80::1]",
        "[fd00::1]",
        "[::ffff:127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
        "2130706433",
        "224.0.0.1",
        "[ff02::1]",
        "255.255.255.255",
        "192.0.0.192",
        "168.63.129.16",
        "198.18.0.1",
        "203.0.113.7",
        "100.100.100.200",
        "[fec0::1]",
        "[3fff::1]",
        "[2001:db8::1]",
        "[64:ff9b:1::1]",
        "[::]",
        "[::a00:1]",
    ],
)
def test_private_addresses_are_refused(host):
    assert reason(ImageStore(None, allow_http=True), f"http://{host}/x.jpg") == "image_forbidden"


def test_a_private_address_is_never_contacted(site, url):
    before = len(site.requests)
    assert reason(ImageStore(None, allow_http=True), f"{url}/x.jpg") == "image_forbidden"
    assert len(site.requests) == before


def test_public_addresses():
    for address in ("8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"):
        assert web.is_public(address), address


@pytest.mark.parametrize("path", ["/drip", "/drip-headers"])
def test_a_server_that_drips_holds_nobody_past_the_deadline(url, path, monkeypatch):
    monkeypatch.setattr(web, "DEADLINE", 0.6)
    start = time.monotonic()
    assert reason(ImageStore(None, allow_http=True, permit=local), url + path) == "image_missing"
    assert time.monotonic() - start < 5


def test_chunks_that_are_none_are_refused(url, monkeypatch):
    monkeypatch.setattr(web, "ATTEMPTS", 1)
    assert reason(ImageStore(None, allow_http=True, permit=local), url + "/negative") == "image_missing"


def test_the_address_that_was_checked_is_the_one_that_is_dialled(site, monkeypatch):
    """A name server that answers with a public address first, and with a private one a moment later."""
    port, asked = site.server_address[1], []
    original = socket.getaddrinfo

    def rebinding(host, *arguments, **options):
        if host == "rebinding.test":
            asked.append(host)
            host = "127.0.0.1" if len(asked) == 1 else "127.0.0.2"
        return original(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    store = ImageStore(None, allow_http=True, permit=lambda address: address == "127.0.0.1")
    assert store.read(ImageRef(f"http://rebinding.test:{port}/x.jpg")) == b"x" * 2000
    assert len(asked) == 1 and site.requests[-1][1] == f"rebinding.test:{port}"
