"""Fetch an image from the public web, and from nowhere else.

A record's URL is somebody else's word: ``http://169.254.169.254/…`` or ``http://localhost:8080/`` would make
the build fetch secrets of the network that it runs in. So every address a host resolves to must be public,
the connection goes to the very address that was checked (a second look-up could answer differently), and
each redirect is checked again. Proxies of the environment are not used: they resolve names themselves.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from typing import Any
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


# IANA's special-purpose registries (RFC 6890 and after), and addresses that clouds answer themselves.
_SPECIAL_V4 = tuple(
    ipaddress.ip_network(text)
    for text in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24"),
        *("192.168.0.0/16", "192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24"),
        *("224.0.0.0/4", "240.0.0.0/4", "168.63.129.16/32"),
    )
)
_GLOBAL_V6 = ipaddress.ip_network("2000::/3")  # all that is given out; whatever lies outside is special
_SPECIAL_V6 = tuple(
    ipaddress.ip_network(text)
    for text in ("2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20")
)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def is_public(address: str) -> bool:
    """Whether an IP address is on the public internet: ``is_public("10.0.0.1")`` -> False."""
    ip = ipaddress.ip_address(address.split("%")[0])
    if isinstance(ip, ipaddress.IPv4Address):
        return not any(ip in network for network in _SPECIAL_V4)
    if ip.ipv4_mapped or ip in _NAT64:
        return is_public(str(ip.ipv4_mapped or ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
    return ip in _GLOBAL_V6 and not any(ip in network for network in _SPECIAL_V6)


def fetch(url: str, *, max_bytes: int, permit: Permit = is_public) -> bytes:
    """The body of ``url``; RejectError image_forbidden, image_missing or image_too_large."""
    deadline = time.monotonic() + DEADLINE
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return _follow(url, max_bytes=max_bytes, permit=permit, deadline=deadline)
        except RejectError:
            raise
        except (_Passing, OSError, http.client.HTTPException, ValueError) as error:  # ValueError: bad chunks
            if attempt == ATTEMPTS or time.monotonic() > deadline:
                detail = f"{url}: {type(error).__name__}: {error} ({attempt} attempts)"
                raise RejectError("image_missing", detail) from None
            time.sleep(0.2 * 2**attempt)
    raise AssertionError("unreachable")


def _follow(url: str, *, max_bytes: int, permit: Permit, deadline: float) -> bytes:
    for _ in range(MAX_REDIRECTS + 1):
        connection, target = _connect(url, permit, deadline)
        try:
            connection.request("GET", target, headers=_HEADERS)
            with contextlib.closing(connection.getresponse()) as response:
                location = response.getheader("Location")
                if response.status in (301, 302, 303, 307, 308) and location:
                    url = urljoin(url, location)
                    continue
                _check_status(url, response.status)
                return _read_body(url, response, max_bytes=max_bytes)
        finally:
            connection.hang_up()
    raise RejectError("image_missing", f"{url}: more than {MAX_REDIRECTS} redirects")


def _check_status(url: str, status: int) -> None:
    if status in _RETRY_STATUS:
        raise _Passing(f"HTTP status {status}")
    if status != 200:
        raise RejectError("image_missing", f"{url}: HTTP status {status}")


def _read_body(url: str, response: http.client.HTTPResponse, *, max_bytes: int) -> bytes:
    body = bytearray()
    while piece := response.read1(65536):
        body += piece
        if len(body) > max_bytes:
            raise RejectError("image_too_large", f"{url}: more than {max_bytes:,} bytes")
    if response.length:  # what is still due by Content-Length: the connection was cut
        raise _Passing(f"ended {response.length:,} bytes early")
    return bytes(body)


def _connect(url: str, permit: Permit, deadline: float) -> tuple[_PinnedHTTP, str]:
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
    connection.deadline = deadline
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
    """Connects to one of ``addresses`` while asking for ``host``; nothing it does outlasts ``deadline``."""

    addresses: Sequence[tuple[str, int]] = ()
    deadline = 0.0

    def connect(self) -> None:
        self._socket = self._dial()
        self.sock = _Timed(self._socket, self.deadline)

    def _dial(self) -> socket.socket:
        *others, last = self.addresses
        for address in others:
            with contextlib.suppress(OSError):  # an IPv6 address, say, that is not reached from here
                return socket.create_connection(address, _left(self.deadline))
        return socket.create_connection(last, _left(self.deadline))

    def hang_up(self) -> None:
        """Close everything; ``close`` alone keeps the socket for the answer that is being read."""
        self.close()
        if (dialled := getattr(self, "_socket", None)) is not None:
            dialled.close()


class _PinnedHTTPS(_PinnedHTTP):
    default_port = http.client.HTTPS_PORT

    def _dial(self) -> socket.socket:
        plain = super()._dial()
        plain.settimeout(_left(self.deadline))  # of the whole handshake
        try:
            return ssl.create_default_context().wrap_socket(plain, server_hostname=self.host)
        except BaseException:
            plain.close()
            raise


def _left(deadline: float) -> float:
    """Seconds that the next step may take; TimeoutError if there are none."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError(f"not finished after {DEADLINE:.0f} s")
    return min(TIMEOUT, left)


class _Timed:
    """What http.client asks of a socket; a server that drips byte after byte does not move the deadline."""

    def __init__(self, dialled: socket.socket, deadline: float) -> None:
        self._socket, self._deadline = dialled, deadline

    def sendall(self, data: bytes) -> None:
        self._socket.settimeout(_left(self._deadline))
        self._socket.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_TimedReader(self._socket, self._deadline))

    def close(self) -> None:
        """Left to ``hang_up``: an answer may still be read."""


class _TimedReader(io.RawIOBase):
    def __init__(self, dialled: socket.socket, deadline: float) -> None:
        self._socket, self._deadline = dialled, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._socket.settimeout(_left(self._deadline))
        return self._socket.recv_into(buffer)
