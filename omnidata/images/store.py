"""Where an image's bytes are: ImageRef -> bytes.

    bytes in the record          as they are
    data:image/png;base64,…      unpacked
    coco/0001.jpg                under the image root: a folder, a .zip or a .tar, local or at an fsspec URL
    /data/coco/0001.jpg          inside the root folder (without one: the source's), or with allow_any_path
    s3://bucket/0001.jpg         object stores through fsspec, with allow_remote: they take your credentials
    https://…                    only with allow_http, and then only from public addresses (web.py)

A record's path is somebody else's word: ``../../etc/passwd`` and whatever else leads out of the root is
refused. What a record got wrong is a RejectError; a disk or a store that fails is not, and stops the build.
"""

from __future__ import annotations

import base64
import binascii
import errno
import os
import posixpath
import stat
import unicodedata
from collections.abc import Collection
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

import fsspec

from omnidata.images.archives import Archive, is_archive, open_archive
from omnidata.images.header import MAX_BYTES, MAX_FETCHED_BYTES
from omnidata.images.web import Permit, fetch, is_public
from omnidata.schema import ImageRef, RejectError, UserError

# Protocols that a record (not the user) may name. Others reach hosts of the record's choosing (ssh, ftp, smb,
# webhdfs, git), start processes, or chain ("zip::http://…").
RECORD_PROTOCOLS = frozenset(
    ("memory", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss", "r2", "hf")
)
_NO_SUCH_FILE = frozenset(
    (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)
)


class ImageStore:
    """Reads the images of one source; may be pickled and forked.

    >>> ImageStore("photos.zip").read(ImageRef("coco/0001.jpg"))[:2]
    b'\\xff\\xd8'
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | None,
        *,
        allow_http: bool = False,
        allow_remote: Collection[str] = (),  # protocols that a record may name: s3, gs, …
        allow_any_path: bool = False,  # absolute paths may lead anywhere
        assumed: bool = False,  # nobody chose the root: it need not exist
        max_bytes: int = MAX_BYTES,
        permit: Permit = is_public,  # which addresses allow_http may reach
    ) -> None:
        self.root = None if root is None else _strip_file(os.fspath(root))
        self.allow_http = allow_http
        self.allow_remote = frozenset(allow_remote)
        self.allow_any_path = allow_any_path
        self.assumed = assumed
        self.max_bytes = max_bytes
        self._permit = permit
        self.respelled = 0  # pictures found under another Unicode form of their name
        self._archive: Archive | None = None
        if self.root is not None and not assumed:
            self._check_root(self.root)

    def _check_root(self, root: str) -> None:
        if root.lower().endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")):
            raise UserError(f"--image-root {root}: a compressed tar cannot be read at random; unpack it")
        if _protocol(root) in ("http", "https"):
            if not self.allow_http:
                raise UserError(f"--image-root {root}: needs --allow-http")
        elif is_archive(root) and not os.path.isdir(root):
            self._archive = open_archive(root)
        elif _protocol(root):
            if not _file_system(root)[0].exists(root):
                raise UserError(f"--image-root {root}: does not exist")
        elif not os.path.isdir(root):
            raise UserError(f"--image-root {root}: not a folder, nor a .zip or .tar file")

    def digest(self) -> str | None:
        """A hash that follows what an archive holds; None for a folder, which nobody can read in full."""
        return self._archive.digest() if self._archive else None

    def read(self, ref: ImageRef) -> bytes:
        """The image's encoded bytes; RejectError if the record does not lead to any."""
        if ref.data is not None:
            return ref.data
        assert ref.path is not None, "an ImageRef has a path or data"
        if ref.path[:5].lower() == "data:":
            return _unpack_data_uri(ref.path)
        if "\0" in ref.path or not ref.path:
            raise RejectError("image_missing", f"{ref.path[:200]!r} is no path")
        path = _strip_file(ref.path)
        if _protocol(path):
            return self._read_url(path, chosen_by_user=False)
        try:
            return self._read_path(path)
        except RejectError as error:
            if error.reason != "image_missing":
                raise
            return self._read_otherwise(path, is_url=path != ref.path, error=error)

    def _read_path(self, path: str) -> bytes:
        if os.path.isabs(path) and self.allow_any_path:
            return _read_file(path, self.max_bytes)
        if self.root is None:
            return self._read_unrooted(path)
        return self._read_rooted(self.root, path)

    def _read_otherwise(self, path: str, *, is_url: bool, error: RejectError) -> bytes:
        """Other spellings of a name that was not found: percent-decoded in a file URL, NFC and NFD.

        A corpus that was written on a Mac names ``é`` in two characters (NFD), its pictures may have come in
        one (NFC). What was found so is remembered in ``respelled``.
        """
        names = [path, *([unquote(path)] if is_url else [])]
        forms = [unicodedata.normalize(form, name) for name in names for form in ("NFC", "NFD")]
        for other in dict.fromkeys([*names[1:], *forms]):
            if other == path:
                continue
            try:
                data = self._read_path(other)
            except RejectError as again:
                if again.reason != "image_missing":
                    raise
                continue
            if other not in names:
                self.respelled += 1
            return data
        raise error

    def _read_unrooted(self, path: str) -> bytes:
        if not os.path.isabs(path):
            raise RejectError(
                "image_missing", f"{path!r} is relative and there is no image root: give --image-root"
            )
        raise RejectError(
            "image_forbidden",
            f"{path!r}: give --image-root a folder above, or --allow-any-path if you trust the records",
        )

    def _read_rooted(self, root: str, path: str) -> bytes:
        if self._archive:
            return self._read_member(_inside(root, path))
        if _protocol(root):
            return self._read_url(posixpath.join(root, _inside(root, path)), chosen_by_user=True)
        return _read_file(_join_local(root, path), self.max_bytes)

    def _read_member(self, name: str) -> bytes:
        assert self._archive is not None
        try:
            return self._archive.read(name, max_bytes=self.max_bytes)
        except KeyError:
            raise RejectError("image_missing", f"no member {name!r} in {self.root}") from None

    def _check_protocol(self, protocol: str, url: str) -> None:
        """A record is somebody else's word: it spends the builder's credentials only if told so."""
        if protocol not in RECORD_PROTOCOLS or "::" in url:
            raise RejectError("image_forbidden", f"{url[:200]}: a record may not use {protocol}://")
        if protocol not in self.allow_remote:
            raise RejectError(
                "image_forbidden",
                f"{url[:200]}: a record may use your access to {protocol}:// with --allow-remote {protocol}",
            )

    def _read_url(self, url: str, *, chosen_by_user: bool) -> bytes:
        protocol = _protocol(url)
        if protocol in ("http", "https"):
            if not self.allow_http:
                raise RejectError("image_forbidden", f"{url}: images from the web need --allow-http")
            return fetch(url, max_bytes=min(self.max_bytes, MAX_FETCHED_BYTES), permit=self._permit)
        if not chosen_by_user:
            self._check_protocol(protocol, url)
        return _read_remote(url, self.max_bytes)


def check_remote(protocols: Collection[str]) -> None:
    """UserError for a protocol that --allow-remote does not know, or whose package is not installed."""
    for protocol in protocols:
        if protocol not in RECORD_PROTOCOLS:
            raise UserError(f"--allow-remote {protocol}: choose from {', '.join(sorted(RECORD_PROTOCOLS))}")
        try:
            fsspec.get_filesystem_class(protocol)
        except (ImportError, ValueError) as error:
            raise UserError(f"--allow-remote {protocol}: {error}") from None


def _protocol(path: str) -> str:
    """``s3://b/x`` -> ``s3``; empty for a plain path."""
    head, separator, _ = path.partition("://")
    return head.lower() if separator and "/" not in head else ""


def _strip_file(path: str) -> str:
    """``file:///data/x``, ``file://localhost/data/x`` -> ``/data/x``: the same rules as for a plain path."""
    if _protocol(path) not in ("file", "local"):
        return path
    rest = path.partition("://")[2]
    for host in ("localhost/", "127.0.0.1/"):
        if rest.lower().startswith(host):
            return rest[len(host) - 1 :]
    return rest


def _inside(root: str, path: str) -> str:
    """``path`` normalised and relative; RejectError if it leads out of the root."""
    inside = posixpath.normpath(path)
    if inside.startswith(("/", "..")) and (inside[0] == "/" or inside.split("/")[0] == ".."):
        raise RejectError(
            "image_forbidden",
            f"{path!r} leads out of the image root {root}; give --image-root a folder above",
        )
    return inside


def _join_local(root: str, path: str) -> str:
    """Lexical: a symbolic link inside the root is its owner's will and is followed."""
    if os.path.isabs(path):
        top, whole = os.path.abspath(root), os.path.normpath(path)
        if os.path.commonpath((top, whole)) != top:
            detail = (
                f"{path!r} is outside the image root {root}; give --image-root a folder above both, or "
                "--allow-any-path if you trust the records"
            )
            raise RejectError("image_forbidden", detail)
        return whole
    return os.path.join(root, _inside(root, path))


def _read_file(path: str, max_bytes: int) -> bytes:
    try:
        # Without O_NONBLOCK opening a named pipe would wait for its writer, for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno not in _NO_SUCH_FILE:
            raise
        raise RejectError("image_missing", f"{path}: {error.strerror}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise RejectError("image_missing", f"{path}: not a regular file")
        if not status.st_size:  # so say the kernel's own files, which may never end
            raise RejectError("image_missing", f"{path}: the file is empty, or none of a disk")
        _check_size(path, status.st_size, max_bytes)
        with open(descriptor, "rb", buffering=0, closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def _read_remote(url: str, max_bytes: int) -> bytes:
    file_system, path = _file_system(url)
    try:
        size = file_system.size(path)
        _check_size(url, size or 0, max_bytes)
        return file_system.cat_file(path)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise RejectError("image_missing", f"{url}: {error}") from None
    except (OSError, RejectError):  # the network's or the store's; trying again may help
        raise
    except Exception as error:  # noqa: BLE001  a cloud's own kinds: no credentials, no such bucket
        raise RejectError("image_missing", f"{url}: {type(error).__name__}: {error}") from None


def _file_system(url: str) -> tuple[Any, str]:
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: {error}") from None


def _check_size(path: str, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise RejectError("image_too_large", f"{path}: {size:,} bytes; the limit is {max_bytes:,}")


def _unpack_data_uri(uri: str) -> bytes:
    """``data:image/png;base64,iVBOR…`` -> the bytes; percent-encoded bodies too."""
    head, separator, body = uri.partition(",")
    if not separator:
        raise RejectError("image_corrupt", "data: URI without a comma")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode("".join(unquote_to_bytes(body).decode("ascii").split()), validate=True)
    except (binascii.Error, UnicodeDecodeError) as error:
        raise RejectError("image_corrupt", f"data: URI is not base64: {error}") from None
