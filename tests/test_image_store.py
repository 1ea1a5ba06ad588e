"""Where an image's bytes come from, and what a record may not reach."""

import base64
import os
import pickle
import shutil
import tarfile
import zipfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnidata.images.header import MAX_BYTES, MAX_FETCHED_BYTES
from omnidata.images.store import ImageStore, check_remote
from omnidata.schema import ImageRef, RejectError, UserError

FILES = {
    "a/1.jpg": b"one" * 100,
    "a/b/2.png": b"two",
    "3.jpg": bytes(range(256)) * 300,
    "übung 4.jpg": b"four",
}


def reason(store, path):
    with pytest.raises(RejectError) as error:
        store.read(ImageRef(path))
    assert error.value.detail
    return error.value.reason


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images") / "root"
    for name, data in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    (root.parent / "outside.jpg").write_bytes(b"secret")
    (root.parent / "root2").mkdir()
    (root.parent / "root2" / "x.jpg").write_bytes(b"secret")
    return root


def make_zip(folder, target, compression):
    with zipfile.ZipFile(target, "w", compression) as archive:
        for name in FILES:
            archive.write(folder / name, name)
        archive.writestr("empty/", b"")
        archive.writestr("../outside.jpg", b"zip slip")
    return str(target)


def make_tar(folder, target, format):
    with tarfile.open(target, "w", format=format) as archive:
        archive.add(folder, ".")
        link = tarfile.TarInfo("./link.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "./a/1.jpg"
        archive.addfile(link)
        symlink = tarfile.TarInfo("./passwd")
        symlink.type, symlink.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(symlink)
    return str(target)


@pytest.fixture(
    scope="module",
    params=["folder", "file url", "memory", "stored zip", "zip", "ustar", "pax", "zip url", "tar url"],
)
def root(request, folder, tmp_path_factory):
    """One image root of each kind, all with the same files."""
    tmp = tmp_path_factory.mktemp("roots")
    if request.param == "folder":
        return str(folder)
    if request.param == "file url":
        return f"file://{folder}"
    if request.param == "memory":
        fsspec.filesystem("memory").put(str(folder) + "/", "/rooted/", recursive=True)
        return "memory://rooted"
    if request.param == "stored zip":
        return make_zip(folder, tmp / "x.zip", zipfile.ZIP_STORED)
    if request.param == "zip":
        return make_zip(folder, tmp / "x.ZIP", zipfile.ZIP_DEFLATED)
    if request.param == "ustar":
        return make_tar(folder, tmp / "x.tar", tarfile.GNU_FORMAT)
    if request.param == "pax":
        return make_tar(folder, tmp / "x.tar", tarfile.PAX_FORMAT)
    local = (
        make_zip(folder, tmp / "r.zip", 8)
        if request.param == "zip url"
        else make_tar(folder, tmp / "r.tar", 2)
    )
    fsspec.filesystem("memory").put(local, "/" + os.path.basename(local))
    return "memory://" + os.path.basename(local)


# --- roots --------------------------------------------------------------------------------------------------


def test_every_root_gives_every_file(root):
    store = ImageStore(root)
    for name, data in FILES.items():
        assert store.read(ImageRef(name)) == data
        assert store.read(ImageRef("./" + name.replace("/", "//"))) == data
    assert store.read(ImageRef("a/../3.jpg")) == FILES["3.jpg"]


def test_a_store_may_be_pickled(root):
    store = pickle.loads(pickle.dumps(ImageStore(root)))
    assert store.read(ImageRef("3.jpg")) == FILES["3.jpg"]


@pytest.mark.parametrize(
    "path", ["../outside.jpg", "a/../../outside.jpg", "../root2/x.jpg", "/etc/passwd", "..", "/"]
)
def test_nothing_outside_a_root_is_read(root, path):
    assert reason(ImageStore(root), path) == "image_forbidden"


@pytest.mark.parametrize("path", ["nope.jpg", "a", "a/1.jpg/x", "x" * 5000, "nul\0.jpg", "", "link2.jpg"])
def test_what_is_not_there_is_missing(root, path):
    assert reason(ImageStore(root), path) == "image_missing"


def test_too_large_is_refused_unread(root):
    assert reason(ImageStore(root, max_bytes=76_799), "3.jpg") == "image_too_large"
    assert ImageStore(root, max_bytes=76_800).read(ImageRef("3.jpg"))


def test_tar_links(folder, tmp_path):
    store = ImageStore(make_tar(folder, tmp_path / "x.tar", tarfile.GNU_FORMAT))
    assert store.read(ImageRef("link.jpg")) == FILES["a/1.jpg"]
    assert reason(store, "passwd") == "image_missing"


def read_many(store, names):
    return [store.read(ImageRef(name)) for name in names]


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_do_not_disturb_each_other(folder, tmp_path, kind, method):
    make = make_zip if kind == "zip" else make_tar
    store = ImageStore(make(folder, tmp_path / f"x.{kind}", zipfile.ZIP_DEFLATED if kind == "zip" else 1))
    names = list(FILES) * 300
    with ProcessPoolExecutor(2, mp_context=get_context(method)) as pool:
        results = list(pool.map(read_many, [store, store], [names, names[::-1]]))
    assert results[0] == [FILES[name] for name in names] == results[1][::-1]


def test_absolute_paths(folder):
    inside, outside = str(folder / "a/1.jpg"), str(folder.parent / "outside.jpg")
    for prefix in ("", "file://"):
        assert reason(ImageStore(None), prefix + outside) == "image_forbidden"
        for root in (None, str(folder)):
            store = ImageStore(root, allow_any_path=True)
            assert store.read(ImageRef(prefix + outside)) == b"secret"
        assert ImageStore(str(folder)).read(ImageRef(prefix + inside)) == FILES["a/1.jpg"]
        assert reason(ImageStore(str(folder)), prefix + outside) == "image_forbidden"
        assert reason(ImageStore(str(folder)), f"{prefix}{folder}/../outside.jpg") == "image_forbidden"
    assert reason(ImageStore(str(folder)), str(folder.parent / "root2/x.jpg")) == "image_forbidden"
    assert reason(ImageStore(str(folder), assumed=True), outside) == "image_forbidden"
    assert ImageStore(str(folder), assumed=True).read(ImageRef(inside)) == FILES["a/1.jpg"]
    assert reason(ImageStore(str(folder), assumed=True), "../outside.jpg") == "image_forbidden"


def test_an_assumed_root_stands_in_nobodys_way():
    for root in ("https://example.com/data", "nowhere"):
        store = ImageStore(root, assumed=True)
        assert store.read(ImageRef(data=b"pixels")) == b"pixels"
        assert reason(store, "x.jpg") in ("image_forbidden", "image_missing")


def test_a_relative_path_needs_a_root():
    assert reason(ImageStore(None), "a/1.jpg") == "image_missing"


def test_special_files_do_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    assert reason(ImageStore(str(tmp_path)), "pipe.jpg") == "image_missing"
    store = ImageStore(None, allow_any_path=True)
    assert reason(store, "/dev/zero") == "image_missing"
    for path in ("/proc/self/mem", "/proc/kmsg", "/proc/self/clear_refs"):  # regular, they say
        if os.path.exists(path):
            assert reason(store, path) == "image_missing"


def test_symbolic_links_in_a_root_are_followed(folder, tmp_path):
    (tmp_path / "coco").symlink_to(folder / "a")
    assert ImageStore(str(tmp_path)).read(ImageRef("coco/1.jpg")) == FILES["a/1.jpg"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_a_reject(tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"x")
    (tmp_path / "x.jpg").chmod(0)
    assert reason(ImageStore(str(tmp_path)), "x.jpg") == "image_missing"


def test_bad_roots_are_the_users_mistake(tmp_path):
    (tmp_path / "bad.zip").write_bytes(b"PK\x03\x04 no zip")
    (tmp_path / "bad.tar").write_bytes(b"x" * 2000)
    (tmp_path / "x.tar.gz").write_bytes(b"x")
    (tmp_path / "file.txt").write_bytes(b"x")
    for name in ("bad.zip", "bad.tar", "x.tar.gz", "file.txt", "nothing", "nothing.zip"):
        with pytest.raises(UserError, match="image-root"):
            ImageStore(str(tmp_path / name))
    for url in ("memory://nothing-here", "http://example.com/", "nosuchprotocol://x"):
        with pytest.raises(UserError):
            ImageStore(url)


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_the_digest_follows_an_archive_s_content(folder, tmp_path, kind):
    digests = {ImageStore(str(folder)).digest()}
    for content in (b"one", b"two!", b"too!"):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / "a.jpg").write_bytes(content)
        path = shutil.make_archive(str(tmp_path / "a"), kind, tmp_path / "in")
        digests.add(ImageStore(path).digest())
        assert ImageStore(path).digest() in digests
    assert None in digests and len(digests) == (4 if kind == "zip" else 3), "a tar has no checksums"


def test_a_truncated_tar_is_refused_at_once(folder, tmp_path):
    path = make_tar(folder, tmp_path / "x.tar", tarfile.GNU_FORMAT)
    with tarfile.open(path) as archive:
        last = max(archive.getmembers(), key=lambda member: member.offset_data + member.size)
        largest = max(archive.getmembers(), key=lambda member: member.size)
    assert last.offset > 0
    os.truncate(path, largest.offset_data + 1000)
    with pytest.raises(UserError, match="archive"):
        ImageStore(path)


def test_damage_in_an_archive_is_found(folder, tmp_path):
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = make_zip(folder, tmp_path / "x.zip", compression)
        store = ImageStore(path)
        with zipfile.ZipFile(path) as archive:
            at = archive.getinfo("a/1.jpg").header_offset + 30 + len("a/1.jpg") + 3
        with open(path, "r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 0xFF]))
        assert reason(store, "a/1.jpg") == "image_corrupt"
        assert store.read(ImageRef("a/b/2.png")) == FILES["a/b/2.png"]


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.jpg", bytes(80_000_000))
    store = ImageStore(str(tmp_path / "x.zip"), max_bytes=50_000_000)
    assert reason(store, "bomb.jpg") == "image_too_large"


def test_a_large_scan_is_read_and_a_large_download_is_not(tmp_path):
    (tmp_path / "scan.png").write_bytes(bytes(60_000_000))
    assert len(ImageStore(str(tmp_path)).read(ImageRef("scan.png"))) == 60_000_000
    assert MAX_FETCHED_BYTES < 60_000_000 < MAX_BYTES


@given(path=st.text(st.sampled_from("./ab:\\"), max_size=12))
def test_no_path_leads_out_of_a_root(folder, path):
    try:
        assert ImageStore(str(folder)).read(ImageRef(path)) in FILES.values()
    except RejectError as error:
        assert error.reason in ("image_missing", "image_forbidden")


# --- bytes and URLs in the record ---------------------------------------------------------------------------


def test_bytes_in_the_record():
    assert ImageStore(None).read(ImageRef(data=b"pixels")) == b"pixels"


@given(data=st.binary(max_size=200))
def test_data_uris(data):
    text = base64.b64encode(data).decode()
    quoted = "".join(f"%{byte:02X}" for byte in data)
    for uri in (
        f"data:image/png;base64,{text}",
        f"DATA:;BASE64,{text[:7]}\n {text[7:]}",
        f"data:image/x,{quoted}",
    ):
        assert ImageStore(None).read(ImageRef(uri)) == data


@pytest.mark.parametrize(
    "uri", ["data:", "data:image/png;base64", "data:;base64,@@@@", "data:;base64,abc", "data:;base64,é"]
)
def test_broken_data_uris(uri):
    assert reason(ImageStore(None), uri) == "image_corrupt"


def test_object_store_urls():
    fsspec.filesystem("memory").pipe("/bucket/x.jpg", b"remote")
    store = ImageStore(None, allow_remote=("memory",))
    assert store.read(ImageRef("memory://bucket/x.jpg")) == b"remote"
    assert reason(store, "memory://bucket/y.jpg") == "image_missing"
    for url in ("memory://bucket/x.jpg", "s3://bucket/x.jpg", "gs://bucket/x.jpg", "hf://datasets/x/y.jpg"):
        assert reason(ImageStore(None), url) == "image_forbidden"
    assert reason(store, "gs://bucket/x.jpg") == "image_forbidden"


def test_a_protocol_that_may_not_or_cannot_be_named():
    with pytest.raises(UserError, match="--allow-remote ftp: choose from"):
        check_remote(("ftp",))
    check_remote(("memory", "s3"))


@pytest.mark.parametrize(
    "url",
    [
        "ftp://h/x.jpg",
        "ssh://h/x.jpg",
        "smb://h/x.jpg",
        "github://o:r@main/x.jpg",
        "simplecache::http://127.0.0.1/x.jpg",
        "zip://x.jpg::http://127.0.0.1/x.zip",
        "memory://x::http://127.0.0.1/x.jpg",
        "http://example.com/x.jpg",
        "HTTPS://example.com/x.jpg",
    ],
)
def test_a_record_may_not_choose_its_protocol(url):
    assert reason(ImageStore(None), url) == "image_forbidden"


def test_an_error_of_a_cloud_s_own_kind_is_a_reject_of_one_record(monkeypatch):
    class NoCredentialsError(Exception):
        pass

    def refuse(self, path, **_):
        raise NoCredentialsError("Unable to locate credentials")

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "size", refuse)
    store = ImageStore(None, allow_remote=("memory",))
    with pytest.raises(RejectError, match="NoCredentialsError: Unable to locate") as error:
        store.read(ImageRef("memory://bucket/x.jpg"))
    assert error.value.reason == "image_missing"
