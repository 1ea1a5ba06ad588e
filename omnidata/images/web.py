"""Fetch an image from the public web, and from nowhere else.

A record's URL is somebody else's word: ``http://169.254.169.254/…`` or ``http://localhost:8080/`` would make
the build fetch secrets of the network that it runs in. So every address a host resolves to must be public,
the connection goes to the very address that was checked (a second look-up could answer differently), and
each redirect is checked again. Proxies of the environment are not used: they resolve names themselves.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from urllib.parse import quote, urljoin, urlsplit

from omnidata.schema import RejectError

MAX_REDIRECTS = 5
TIMEOUT = 20.0  # seconds for one connection, and between two pieces of an answer
DEADLINE = 60.0  # seconds for everything
ATTEMPTS = 3
_RETRY_STATUS = frozenset((408, 429, 500, 502, 503, 504))
_HEADERS = {"User-Agent": "omnidata", "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"}

Permit = Callable[[str], bool]


class _Passing(Exception):
    """A failure that the next attempt may not have."""


def is_public(address: str) -> bool:
    """Whether an IP address is on the public internet: ``is_public("10.0.0.1")`` -> False."""
    ip = ipaddress.ip_address(address.split("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        embedded = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if embedded or ip in _NAT64:
            return is_public(str(embedded or ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def fetch(url: str, *, max_bytes: int, permit: Permit = is_public) -> bytes:
    """The body of ``url``; RejectError image_forbidden, image_missing or image_too_large."""
    deadline = time.monotonic() + DEADLINE
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return _follow(url, max_bytes=max_bytes, permit=permit, deadline=deadline)
        except (_Passing, OSError, http.client.HTTPException) as error:
            if attempt == ATTEMPTS or time.monotonic() > deadline:
                detail = f"{url}: {type(error).__name__}: {error} ({attempt} attempts)"
                raise RejectError("image_missing", detail) from None
            time.sleep(0.2 * 2**attempt)
    raise AssertionError("unreachable")


def _follow(url: str, *, max_bytes: int, permit: Permit, deadline: float) -> bytes:
    for _ in range(MAX_REDIRECTS + 1):
        connection, target = _connect(url, permit)
        try:
            connection.request("GET", target, headers=_HEADERS)
            with contextlib.closing(connection.getresponse()) as response:
                location = response.getheader("Location")
                if response.status in (301, 302, 303, 307, 308) and location:
                    url = urljoin(url, location)
                    continue
                _check_status(url, response.status)
                return _read_body(url, response, max_bytes=max_bytes, deadline=deadline)
        finally:
            connection.close()
    raise RejectError("image_missing", f"{url}: more than {MAX_REDIRECTS} redirects")


def _check_status(url: str, status: int) -> None:
    if status in _RETRY_STATUS:
        raise _Passing(f"HTTP status {status}")
    if status != 200:
        raise RejectError("image_missing", f"{url}: HTTP status {status}")


def _read_body(url: str, response: http.client.HTTPResponse, *, max_bytes: int, deadline: float) -> bytes:
    body = bytearray()
    while piece := response.read(65536):
        body += piece
        if len(body) > max_bytes:
            raise RejectError("image_too_large", f"{url}: more than {max_bytes:,} bytes")
        if time.monotonic() > deadline:
            raise RejectError("image_missing", f"{url}: not finished after {DEADLINE:.0f} s")
    if response.length:  # what is still due by Content-Length: the connection was cut
        raise _Passing(f"ended {response.length:,} bytes early")
    return bytes(body)


def _connect(url: str, permit: Permit) -> tuple[http.client.HTTPConnection, str]:
    """A connection to checked addresses, and the request target."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise RejectError("image_missing", f"{url!r} is not a valid URL: {error}") from None
    if parts.scheme not in ("http", "https") or not host:
        raise RejectError("image_forbidden", f"{url!r}: only http and https are fetched")
    kind = _PinnedHTTPS if parts.scheme == "https" else _PinnedHTTP
    connection = kind(host, port or kind.default_port, timeout=TIMEOUT)
    connection.addresses = _resolve(host, connection.port, permit)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return connection, quote(target, safe="/?%:@!$&'()*+,;=~-._[]")


def _resolve(host: str, port: int, permit: Permit) -> list[tuple[str, int]]:
    """The addresses of ``host``; refused if any of them is not permitted."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError as error:
        raise RejectError("image_missing", f"{host!r} is not a valid host name: {error}") from None
    addresses = [str(entry[4][0]) for entry in found]
    private = [address for address in addresses if not permit(address)]
    if private:
        raise RejectError(
            "image_forbidden", f"{host!r} resolves to {private[0]}, which is not a public address"
        )
    return [(address, port) for address in addresses]


class _PinnedHTTP(http.client.HTTPConnection):
    """Connects to one of ``addresses`` while asking for ``host``."""

    addresses: Sequence[tuple[str, int]] = ()

    def connect(self) -> None:
        *others, last = self.addresses
        for address in others:
            with contextlib.suppress(
                OSError
            ):  # a host may have an IPv6 address that is not reached from here
                self.sock = socket.create_connection(address, self.timeout)
                return
        self.sock = socket.create_connection(last, self.timeout)


class _PinnedHTTPS(_PinnedHTTP):
    default_port = http.client.HTTPS_PORT

    def connect(self) -> None:
        super().connect()
        self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)
